//! Completions by continuous batching: a sequence that ends leaves its slot to the next one at once,
//! and soft targets are captured as the tokens are drawn.
//!
//! What all prompts of a shard begin with goes through the layers once, and so does a prompt of which
//! several completions are wanted. With many stages, the sequences are dealt over *lanes*, each with a
//! step of its own on its way, and lanes take turns; which sequences meet in a step follows from the
//! shard alone, never from what was ready first, so a shard computed again is the same.

mod lane;
mod prompts;

use retort_artifact::soft_targets::{Position, Sequence};
use retort_core::Result;
use retort_llama::{Config, Room};

use super::limits;
use crate::{
    capture::Capture,
    engine::{Generation, Text, Watch},
    stage::{
        pipeline::Pipeline,
        step::{Begin, Taken},
    },
};
use lane::Lane;
use prompts::Prompts;

pub(super) fn run(
    pipeline: &mut dyn Pipeline,
    config: &Config,
    number_bytes: u64,
    texts: &[Text],
    order: &Generation,
    capture: &Capture,
    watch: Watch,
) -> Result<Vec<Sequence>> {
    let mut prompts = Prompts::new(texts, order.completions);
    let capacity = prompts.longest() + order.max_new_tokens;
    let most = limits::cache_rows(config, number_bytes, capacity as usize);
    let wanted = prompts.sequences().len();
    let lanes = pipeline.depth().min(wanted).min(most).max(1);
    let slots = wanted.min(most).div_ceil(lanes) as u32;
    prompts.fit(slots);
    let shared = prompts.shared();
    let room = Room { lanes: lanes as u32, slots: slots + u32::from(shared > 0), capacity };
    pipeline.begin(&Begin { capture: capture.clone(), sampler: Some(order.sampler), room })?;

    let mut writing = Writing { order, ends: &config.eos_token_ids, sequences: Vec::new(), captured: 0 };
    writing.sequences = prompts.sequences().iter().copied().map(Written::new).collect();
    let mut lanes: Vec<Lane> = (0..lanes).map(|lane| Lane::new(lane as u32, slots, shared)).collect();
    loop {
        let mut idle = true;
        for lane in &mut lanes {
            if lane.on_its_way() {
                // Lanes take turns, so the oldest step is this one's.
                lane.apply(pipeline.next()?, &mut writing);
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
    sequences: Vec<Written>,
    captured: u64,
}

/// One completion, as far as it is written.
#[derive(Clone)]
struct Written {
    /// Index of its text.
    text: usize,
    completion: u32,
    tokens: Vec<u32>,
    positions: Vec<Position>,
    finish_reason: &'static str,
}

impl Writing<'_> {
    /// Adds a token; says whether the completion goes on.
    fn push(&mut self, sequence: usize, taken: Taken) -> bool {
        self.captured += 1;
        let written = &mut self.sequences[sequence];
        written.tokens.push(taken.token);
        written.positions.push(taken.position);
        if self.ends.contains(&taken.token) {
            written.finish_reason = "stop";
            return false;
        }
        written.tokens.len() < self.order.max_new_tokens as usize
    }
}

impl Written {
    fn new((text, completion): (usize, u32)) -> Self {
        Self { text, completion, tokens: Vec::new(), positions: Vec::new(), finish_reason: "length" }
    }

    fn finish(&self, text: &Text) -> Sequence {
        let mut token_ids = text.token_ids.clone();
        let mut target_mask = vec![false; token_ids.len()];
        target_mask.resize(token_ids.len() + self.tokens.len(), true);
        token_ids.extend(&self.tokens);
        Sequence {
            row_id: match self.completion {
                0 => text.row_id.clone(),
                more => format!("{}#{}", text.row_id, more + 1),
            },
            row: text.row,
            tags: text.tags.clone(),
            token_ids,
            target_mask,
            finish_reason: self.finish_reason.to_owned(),
            positions: self.positions.clone(),
        }
    }
}
