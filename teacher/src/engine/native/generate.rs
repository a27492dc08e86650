//! Completions by continuous batching: a sequence that ends leaves its slot to the next one at once,
//! and soft targets are captured as the tokens are drawn.
//!
//! What all prompts of a shard begin with goes through the layers once, and so does a prompt of which
//! several completions are wanted. With many stages, the sequences are dealt over *lanes*, each with a
//! step of its own on its way, and lanes take turns; which sequences meet in a step follows from the
//! shard alone, never from what was ready first, so a shard computed again is the same.

mod lane;
mod prompts;
mod stops;

use retort_artifact::soft_targets::{Position, Sequence};
use retort_core::Result;
use retort_llama::{Config, Room, Tokenizer};

use super::limits;
use crate::{
    capture::Capture,
    engine::{Generation, Text, Watch},
    stage::{
        pipeline::Pipeline,
        step::{Begin, Taken},
    },
    work::completion_id,
};
use lane::Lane;
use prompts::Prompts;
use stops::Stops;

/// What is to be known of the teacher beside its layers.
pub(super) struct About<'a> {
    pub(super) config: &'a Config,
    pub(super) tokenizer: &'a Tokenizer,
    /// Of a key or value.
    pub(super) number_bytes: u64,
}

pub(super) fn run(
    pipeline: &mut dyn Pipeline,
    about: &About,
    texts: &[Text],
    order: &Generation,
    capture: &Capture,
    watch: Watch,
) -> Result<Vec<Sequence>> {
    let mut prompts = Prompts::new(texts, order.completions);
    let capacity = prompts.longest() + order.max_new_tokens;
    let most = limits::cache_rows(about.config, about.number_bytes, capacity as usize);
    let wanted = prompts.sequences().len();
    let lanes = pipeline.depth().min(wanted).min(most).max(1);
    let slots = wanted.min(most).div_ceil(lanes) as u32;
    prompts.fit(slots);
    let shared = prompts.shared();
    let room = Room { lanes: lanes as u32, slots: slots + u32::from(shared > 0), capacity };
    pipeline.begin(&Begin { capture: capture.clone(), sampler: Some(order.sampler), room })?;

    let sequences = prompts.sequences().iter().map(|of| Written::new(*of, about.tokenizer, &order.stop)).collect();
    let mut writing = Writing { order, ends: &about.config.eos_token_ids, sequences, captured: 0 };
    let mut lanes: Vec<Lane> = (0..lanes).map(|lane| Lane::new(lane as u32, slots, shared)).collect();
    loop {
        let mut idle = true;
        for lane in &mut lanes {
            if lane.on_its_way() {
                // Lanes take turns, so the oldest step is this one's.
                lane.apply(pipeline.next()?, &mut writing)?;
                watch(writing.captured)?;
            }
            if let Some(step) = lane.next(texts, &mut prompts, &writing) {
                pipeline.submit(step)?;
                idle = false;
            }
        }
        if idle {
            break;
        }
    }
    Ok(writing.sequences.into_iter().map(|written| written.finish(&texts[written.text])).collect())
}

/// All completions of a shard.
struct Writing<'a> {
    order: &'a Generation,
    ends: &'a [u32],
    sequences: Vec<Written<'a>>,
    captured: u64,
}

/// One completion, as far as it is written.
struct Written<'a> {
    /// Index of its text.
    text: usize,
    completion: u32,
    tokens: Vec<u32>,
    positions: Vec<Position>,
    finish_reason: &'static str,
    /// Where texts are to end it.
    watched: Option<Stops<'a>>,
}

impl Writing<'_> {
    /// Adds a token; says whether the completion goes on.
    fn push(&mut self, sequence: usize, taken: Taken) -> Result<bool> {
        self.captured += 1;
        let written = &mut self.sequences[sequence];
        written.tokens.push(taken.token);
        written.positions.push(taken.position);
        if self.ends.contains(&taken.token) {
            written.finish_reason = "stop";
            return Ok(false);
        }
        if let Some(stops) = &mut written.watched
            && stops.reached(taken.token)?
        {
            written.finish_reason = "stop";
            return Ok(false);
        }
        Ok(written.tokens.len() < self.order.max_new_tokens as usize)
    }
}

impl<'a> Written<'a> {
    fn new((text, completion): (usize, u32), tokenizer: &'a Tokenizer, stop: &'a [String]) -> Self {
        let watched = (!stop.is_empty()).then(|| Stops::new(tokenizer, stop));
        Self { text, completion, tokens: Vec::new(), positions: Vec::new(), finish_reason: "length", watched }
    }

    fn finish(&self, text: &Text) -> Sequence {
        let mut token_ids = text.token_ids.clone();
        let mut target_mask = vec![false; token_ids.len()];
        target_mask.resize(token_ids.len() + self.tokens.len(), true);
        token_ids.extend(&self.tokens);
        Sequence {
            row_id: completion_id(&text.row_id, self.completion),
            row: text.row,
            tags: text.tags.clone(),
            token_ids,
            target_mask,
            finish_reason: self.finish_reason.to_owned(),
            positions: self.positions.clone(),
        }
    }
}
