//! What a teacher engine is: something that writes or reads completions and says, at each of their
//! tokens, how the teacher's probability was distributed.

pub mod native;

use retort_artifact::soft_targets::Sequence;
use retort_core::{Code, Error, Result};
use retort_llama::Tokenizer;

use crate::{capture::Capture, sampling::Sampler};

/// Told the number of targets captured so far between steps; its error stops the work.
pub type Watch<'a> = &'a mut dyn FnMut(u64) -> Result<()>;

/// One copy of a teacher, loaded.
pub trait Engine {
    fn capabilities(&self) -> &Capabilities;

    fn tokenizer(&self) -> &Tokenizer;

    /// Tokens that end a completion.
    fn end_tokens(&self) -> &[u32];

    /// Writes a completion for each text (all of which is prompt) and captures its soft targets in
    /// the same pass. A completion ends with an end token, which is a target too, or after
    /// `max_new_tokens`. Answers in the order of `texts`.
    fn generate(
        &mut self,
        texts: &[Text],
        order: &Generation,
        capture: &Capture,
        watch: Watch,
    ) -> Result<Vec<Sequence>>;

    /// Captures the soft targets of given completions. Answers in the order of `texts`.
    fn score(&mut self, texts: &[Text], capture: &Capture, watch: Watch) -> Result<Vec<Sequence>>;
}

/// What an engine can do and what it is; asked before any work is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    pub engine: &'static str,
    pub engine_version: &'static str,
    /// `f32` or `bf16`.
    pub dtype: &'static str,
    pub vocab_size: u32,
    /// Most tokens of prompt and completion together.
    pub context: u32,
    /// Largest exact head.
    pub max_head: u32,
    pub max_draws: u32,
    pub generates: bool,
    pub scores: bool,
    pub teacher_sha256: String,
    /// Of the config files that, beside the weights, say how the model computes and reads: shape, end
    /// tokens, special tokens.
    pub config_sha256: String,
    pub tokenizer_sha256: String,
    pub chat_template_sha256: String,
}

/// A row of the prompt set, as the model reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text {
    /// Line of the prompt set.
    pub row: u64,
    pub row_id: String,
    pub tags: Vec<String>,
    pub token_ids: Vec<u32>,
    /// How many of `token_ids`, from the first, are prompt.
    pub prompt_tokens: usize,
}

/// How to write completions.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    pub sampler: Sampler,
    pub max_new_tokens: u32,
    /// Of each prompt.
    pub completions: u32,
    /// Texts that end a completion; the tokens that spell them are its last.
    pub stop: Vec<String>,
}

impl Capabilities {
    /// Refuses what the engine cannot do; nothing is ever done by halves.
    pub fn check(&self, generate: bool, capture: &Capture) -> Result<()> {
        let refused = if generate && !self.generates {
            "it writes no completions; score given ones".to_owned()
        } else if !generate && !self.scores {
            "it scores no given completions; generate them".to_owned()
        } else if capture.codec.max_head(self.vocab_size) > self.max_head {
            let asked = capture.codec.max_head(self.vocab_size);
            format!("its exact head holds at most {} tokens, {asked} are asked for", self.max_head)
        } else if capture.codec.max_draws() > self.max_draws {
            format!("it makes at most {} tail draws, {} are asked for", self.max_draws, capture.codec.max_draws())
        } else {
            return Ok(());
        };
        Err(Error::new(Code::ModelUnsupported, format!("the {} engine refuses: {refused}", self.engine)))
    }
}
