//! The engine that computes here, on tch.

mod generate;
mod score;

use std::{
    cell::RefCell,
    path::{Path, PathBuf},
    rc::Rc,
};

use retort_artifact::{sha256_hex, soft_targets::Sequence};
use retort_core::{Code, Error, Result, spec::MAX_HEAD};
use retort_llama::{Config, Part, Tokenizer, tensors_sha256};
use time::{OffsetDateTime, macros::datetime};

use super::{Capabilities, Engine, Generation, Text, Watch};
use crate::{
    capture::Capture,
    fingerprint::Fingerprint,
    group::{Group, MAX_CONTEXT},
    stage::{
        Arithmetic, Stage,
        pipeline::{Local, Pipeline},
    },
    torch::model,
};

/// The day it is in every chat template: the one Llama 3.1's own template falls back on.
const PINNED_DATE: OffsetDateTime = datetime!(2024-07-26 00:00 UTC);

/// A model of [`retort_llama`] behind a [`Pipeline`], its tokenizer, and what is known of them.
pub struct Native {
    pipeline: Box<dyn Pipeline>,
    config: Config,
    /// Of a key or value.
    number_bytes: u64,
    tokenizer: Tokenizer,
    capabilities: Capabilities,
}

impl Native {
    /// Loads a Hugging Face folder.
    pub fn load(dir: &Path, arithmetic: &Arithmetic) -> Result<Self> {
        let fingerprint = Fingerprint::of(dir)?;
        let tokenizer = tokenizer(dir)?;
        let config = Config::from_dir(dir).map_err(model)?;
        let stage = Stage::load(dir, Part::whole(&config), arithmetic)?;
        let capabilities = Self::capabilities(dir, fingerprint.weights_sha256()?, &tokenizer, &config, arithmetic)?;
        let number_bytes = arithmetic.number_bytes() as u64;
        Ok(Self { pipeline: Box::new(Local::new(stage)), config, number_bytes, tokenizer, capabilities })
    }

    /// Has the stages of a group load a folder; this process, stage 0, reads no more weights than its own.
    pub fn load_in_group(dir: &Path, group: Rc<RefCell<Group>>, arithmetic: &Arithmetic) -> Result<Self> {
        let tokenizer = tokenizer(dir)?;
        let config = Config::from_dir(dir).map_err(model)?;
        let teacher_sha256 = {
            let mut group = group.borrow_mut();
            group.forget();
            let tensors = group.load(dir)?.tensors.iter();
            tensors_sha256(tensors.map(|(name, (shape, sha256))| (name.as_str(), shape.as_str(), sha256.as_slice())))
        };
        let mut capabilities = Self::capabilities(dir, teacher_sha256, &tokenizer, &config, arithmetic)?;
        // What a step on its way between stages may hold.
        capabilities.context = capabilities.context.min(MAX_CONTEXT);
        let number_bytes = arithmetic.number_bytes() as u64;
        Ok(Self { pipeline: Box::new(group), config, number_bytes, tokenizer, capabilities })
    }

    /// What the folder's engine will be, without its weights in memory; they are read once, for their hash.
    pub fn describe(dir: &Path, arithmetic: &Arithmetic) -> Result<Capabilities> {
        let fingerprint = Fingerprint::of(dir)?;
        let config = Config::from_dir(dir).map_err(model)?;
        Self::capabilities(dir, fingerprint.weights_sha256()?, &tokenizer(dir)?, &config, arithmetic)
    }

    fn capabilities(
        dir: &Path,
        teacher_sha256: String,
        tokenizer: &Tokenizer,
        config: &Config,
        arithmetic: &Arithmetic,
    ) -> Result<Capabilities> {
        let vocab_size = u32::try_from(config.vocab_size)
            .map_err(|_| Error::new(Code::ModelUnsupported, format!("a vocabulary of {}", config.vocab_size)))?;
        if tokenizer.vocab_size() > vocab_size {
            return Err(Error::new(
                Code::VocabularyMismatch,
                format!(
                    "{}: the tokenizer knows {} tokens and the model {vocab_size}; they do not belong together",
                    dir.display(),
                    tokenizer.vocab_size()
                ),
            ));
        }
        Ok(Capabilities {
            engine: arithmetic.engine(),
            engine_version: env!("CARGO_PKG_VERSION"),
            dtype: arithmetic.dtype(),
            vocab_size,
            context: u32::try_from(config.max_position_embeddings).unwrap_or(u32::MAX),
            max_head: vocab_size,
            max_draws: MAX_HEAD,
            generates: true,
            scores: true,
            teacher_sha256,
            config_sha256: config_sha256(dir)?,
            tokenizer_sha256: tokenizer.tokenizer_sha256(),
            chat_template_sha256: tokenizer.chat_template_sha256(),
        })
    }
}

fn tokenizer(dir: &Path) -> Result<Tokenizer> {
    let mut tokenizer = Tokenizer::from_dir(dir).map_err(model)?;
    // Some templates write today's date into the prompt; a shard computed again tomorrow must be the
    // same.
    tokenizer.pin_date(PINNED_DATE).map_err(model)?;
    Ok(tokenizer)
}

/// SHA-256 over the names and contents of the folder's config files, those that there are.
pub(crate) fn config_sha256(dir: &Path) -> Result<String> {
    let mut listing = Vec::new();
    for name in ["config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"] {
        match std::fs::read(dir.join(name)) {
            Ok(bytes) => {
                listing.extend_from_slice(format!("{name} {}\n", bytes.len()).as_bytes());
                listing.extend_from_slice(&bytes);
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io(dir.join(name), error)),
        }
    }
    Ok(sha256_hex(&listing))
}

impl Engine for Native {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    fn end_tokens(&self) -> &[u32] {
        &self.config.eos_token_ids
    }

    fn generate(
        &mut self,
        texts: &[Text],
        order: &Generation,
        capture: &Capture,
        watch: Watch,
    ) -> Result<Vec<Sequence>> {
        let about =
            generate::About { config: &self.config, tokenizer: &self.tokenizer, number_bytes: self.number_bytes };
        generate::run(&mut *self.pipeline, &about, texts, order, capture, watch)
    }

    fn score(&mut self, texts: &[Text], capture: &Capture, watch: Watch) -> Result<Vec<Sequence>> {
        score::run(&mut *self.pipeline, texts, capture, watch)
    }
}

/// The native engine of the model that was asked for last; loaded again only when another is asked
/// for or its files changed.
pub struct Loaded {
    arithmetic: Arithmetic,
    /// The stages that compute, where this process is the first of a group.
    group: Option<Rc<RefCell<Group>>>,
    engine: Option<(PathBuf, Fingerprint, Native)>,
    /// Of the folder that was asked about last.
    described: Option<(PathBuf, Fingerprint, Capabilities)>,
}

impl Loaded {
    pub fn new(arithmetic: Arithmetic) -> Self {
        Self { arithmetic, group: None, engine: None, described: None }
    }

    /// Models whose layers are spread over a group, each stage of which has this arithmetic.
    pub fn in_group(group: Group, arithmetic: Arithmetic) -> Self {
        Self { group: Some(Rc::new(RefCell::new(group))), ..Self::new(arithmetic) }
    }

    /// Says in the log what each stage of the group did since the last time.
    pub fn report(&self) {
        if let Some(group) = &self.group {
            group.borrow_mut().report();
        }
    }

    /// [`Native::describe`], read again only when another folder is asked about or its files changed.
    pub fn describe(&mut self, dir: &Path) -> Result<Capabilities> {
        let fingerprint = Fingerprint::of(dir)?;
        if let Some((path, known, capabilities)) = &self.described
            && path == dir
            && *known == fingerprint
        {
            return Ok(capabilities.clone());
        }
        let capabilities = match self.group {
            // Only its stages know the weights.
            Some(_) => self.get(dir)?.capabilities.clone(),
            None => Native::describe(dir, &self.arithmetic)?,
        };
        self.described = Some((dir.to_owned(), fingerprint, capabilities.clone()));
        Ok(capabilities)
    }

    pub fn get(&mut self, dir: &Path) -> Result<&mut Native> {
        let fingerprint = Fingerprint::of(dir)?;
        let current = matches!(&self.engine, Some((path, known, _)) if path == dir && *known == fingerprint);
        if !current {
            // The old weights go first: two teachers may not fit.
            self.engine = None;
            let started = std::time::Instant::now();
            let engine = match &self.group {
                Some(group) => Native::load_in_group(dir, Rc::clone(group), &self.arithmetic)?,
                None => Native::load(dir, &self.arithmetic)?,
            };
            tracing::info!(
                model = %dir.display(),
                parameters = engine.config.parameters(),
                dtype = engine.capabilities.dtype,
                seconds = started.elapsed().as_secs_f64(),
                "teacher loaded"
            );
            self.engine = Some((dir.to_owned(), fingerprint, engine));
        }
        match &mut self.engine {
            Some((_, _, engine)) => Ok(engine),
            None => Err(Error::internal("the teacher was loaded and is gone")),
        }
    }
}

/// Sizes of batches that fit beside the weights.
pub(crate) mod limits {
    use retort_llama::Config;

    /// Bytes the keys and values of one batch may take.
    pub(crate) const CACHE_BYTES: u64 = 2 << 30;
    /// Bytes the logits of one chunk may take in f32.
    pub(crate) const LOGITS_BYTES: u64 = 32 << 20;
    /// Padded positions of one forward pass without a cache.
    pub(crate) const FORWARD_TOKENS: usize = 4096;

    /// Rows of `tokens` positions each whose keys and values fit; at least one.
    pub(crate) fn cache_rows(config: &Config, bytes_a_number: u64, tokens: usize) -> usize {
        let a_token = 2
            * config.num_hidden_layers.unsigned_abs()
            * config.num_key_value_heads.unsigned_abs()
            * config.head_dim.unsigned_abs()
            * bytes_a_number;
        let a_row = a_token.saturating_mul(tokens.max(1) as u64).max(1);
        usize::try_from(CACHE_BYTES / a_row).unwrap_or(usize::MAX).clamp(1, 256)
    }

    /// Positions whose logits make one chunk; at least one.
    pub(crate) fn chunk_positions(vocab: i64) -> usize {
        usize::try_from(LOGITS_BYTES / (4 * vocab.unsigned_abs().max(1))).unwrap_or(1).max(1)
    }
}
