//! Soft targets of given completions: each text goes through the layers once, whole, and keeps no keys
//! and values behind.

use std::{collections::VecDeque, ops::Range};

use retort_artifact::soft_targets::Sequence;
use retort_core::Result;
use retort_llama::{Piece as Run, Room};

use super::limits;
use crate::{
    capture::Capture,
    engine::{Text, Watch},
    stage::{
        pipeline::Pipeline,
        step::{Ask, Begin, Piece, Step, Taken, stream},
    },
};

/// Steps of a shard for each that is on its way through the stages.
const STEPS: usize = 4;
/// Tokens that are worth a step of their own.
const LEAST_TOKENS: usize = 64;

pub(super) fn run(
    pipeline: &mut dyn Pipeline,
    texts: &[Text],
    capture: &Capture,
    watch: Watch,
) -> Result<Vec<Sequence>> {
    // Texts of like length lie side by side, where attention takes them together.
    let mut by_length: Vec<usize> = (0..texts.len()).collect();
    by_length.sort_by_key(|&at| (std::cmp::Reverse(texts[at].token_ids.len()), at));
    let tokens: usize = texts.iter().map(|text| text.token_ids.len()).sum();
    let batches = batches(texts, &by_length, step_tokens(tokens, pipeline.depth()));

    let room = Room { lanes: 0, slots: 0, capacity: 0 };
    pipeline.begin(&Begin { capture: capture.clone(), sampler: None, room })?;
    let mut done: Vec<Option<Sequence>> = texts.iter().map(|_| None).collect();
    let mut captured = 0;
    let mut waiting = VecDeque::new();
    let mut batches = batches.into_iter().peekable();
    while batches.peek().is_some() || !waiting.is_empty() {
        while waiting.len() < pipeline.depth()
            && let Some(batch) = batches.next()
        {
            watch(captured)?;
            let batch = &by_length[batch];
            pipeline.submit(step(texts, batch))?;
            waiting.push_back(batch);
        }
        let Some(batch) = waiting.pop_front() else { break };
        let mut taken = pipeline.next()?.into_iter();
        for &at in batch {
            let targets = texts[at].token_ids.len().saturating_sub(texts[at].prompt_tokens.max(1));
            captured += targets as u64;
            done[at] = Some(finish(&texts[at], taken.by_ref().take(targets)));
        }
        watch(captured)?;
    }
    Ok(done.into_iter().flatten().collect())
}

/// Most tokens of a step. With many stages a shard is cut into several steps for each that is on its way,
/// or the stages would wait for one another; but not so small that a stage reads its weights for little.
fn step_tokens(tokens: usize, depth: usize) -> usize {
    match depth {
        1 => limits::FORWARD_TOKENS,
        _ => (tokens / (STEPS * depth)).clamp(LEAST_TOKENS, limits::FORWARD_TOKENS),
    }
}

/// Runs of `order` of up to `most` tokens; a longer text is a run of its own.
fn batches(texts: &[Text], order: &[usize], most: usize) -> Vec<Range<usize>> {
    let mut batches: Vec<Range<usize>> = Vec::new();
    let mut tokens = 0;
    for (index, &at) in order.iter().enumerate() {
        let length = texts[at].token_ids.len();
        match batches.last_mut() {
            Some(last) if tokens + length <= most => {
                last.end = index + 1;
                tokens += length;
            }
            _ => {
                batches.push(index..index + 1);
                tokens = length;
            }
        }
    }
    batches
}

fn step(texts: &[Text], batch: &[usize]) -> Step {
    let piece = |&at: &usize| Piece {
        run: Run { slot: None, start: 0, tokens: texts[at].token_ids.len() as u32 },
        stream: stream(texts[at].row, 0),
        ask: Ask::Score { first: texts[at].prompt_tokens as u32 },
    };
    Step {
        lane: 0,
        shares: Vec::new(),
        pieces: batch.iter().map(piece).collect(),
        token_ids: batch.iter().flat_map(|&at| texts[at].token_ids.iter().copied()).collect(),
    }
}

fn finish(text: &Text, taken: impl Iterator<Item = Taken>) -> Sequence {
    let mut target_mask = vec![false; text.prompt_tokens.max(1).min(text.token_ids.len())];
    target_mask.resize(text.token_ids.len(), true);
    Sequence {
        row_id: text.row_id.clone(),
        row: text.row,
        tags: text.tags.clone(),
        token_ids: text.token_ids.clone(),
        target_mask,
        finish_reason: "given".to_owned(),
        positions: taken.map(|taken| taken.position).collect(),
    }
}
