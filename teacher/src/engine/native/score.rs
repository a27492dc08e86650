//! Soft targets of given completions. In one process each text goes through the layers whole and keeps no
//! keys and values behind; on its way through the stages of a group it is cut where a step is full, so
//! that all steps are alike and none is long.

use std::{collections::VecDeque, ops::Range};

use retort_artifact::soft_targets::{Position, Sequence};
use retort_core::Result;
use retort_llama::{Piece as Run, Room};

use super::limits;
use crate::{
    capture::Capture,
    engine::{Text, Watch},
    stage::{
        pipeline::Pipeline,
        step::{Ask, Begin, Piece, Step, stream},
    },
};

/// Steps of a shard for each that is on its way through the stages.
const STEPS: usize = 8;
/// Tokens of the smallest step; of larger ones, a multiple: as many rows as the host's kernels take at once.
const LEAST_TOKENS: usize = 96;
/// Texts that a step may find begun or leave unfinished: one each.
const CUT_TEXTS: u32 = 2;

/// Tokens of a text that a step takes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Cut {
    text: usize,
    tokens: Range<usize>,
    /// Where its keys and values wait, of a text that no single step takes whole.
    slot: Option<u32>,
}

pub(super) fn run(
    pipeline: &mut dyn Pipeline,
    texts: &[Text],
    capture: &Capture,
    watch: Watch,
) -> Result<Vec<Sequence>> {
    // Texts of like length lie side by side, where attention takes them together.
    let mut by_length: Vec<usize> = (0..texts.len()).collect();
    by_length.sort_by_key(|&at| (std::cmp::Reverse(texts[at].token_ids.len()), at));
    let steps = match pipeline.depth() {
        1 => whole(texts, &by_length, limits::FORWARD_TOKENS),
        depth => {
            let tokens: usize = texts.iter().map(|text| text.token_ids.len()).sum();
            cut(texts, &by_length, step_tokens(tokens, depth))
        }
    };

    pipeline.begin(&Begin { capture: capture.clone(), sampler: None, room: room(texts, &steps) })?;
    let mut positions: Vec<Vec<Position>> = texts.iter().map(|_| Vec::new()).collect();
    let mut captured = 0;
    let mut waiting = VecDeque::new();
    let mut steps = steps.into_iter().peekable();
    while steps.peek().is_some() || !waiting.is_empty() {
        while waiting.len() < pipeline.depth()
            && let Some(cuts) = steps.next()
        {
            watch(captured)?;
            pipeline.submit(step(texts, &cuts))?;
            waiting.push_back(cuts);
        }
        let Some(cuts) = waiting.pop_front() else { break };
        let mut taken = pipeline.next()?.into_iter();
        for cut in cuts {
            let wanted = piece(&texts[cut.text], &cut).wanted();
            captured += wanted as u64;
            positions[cut.text].extend(taken.by_ref().take(wanted).map(|taken| taken.position));
        }
        watch(captured)?;
    }
    Ok(texts.iter().zip(positions).map(|(text, positions)| finish(text, positions)).collect())
}

/// Steps of whole texts, in this order, up to `most` tokens each; a longer text is a step of its own.
fn whole(texts: &[Text], order: &[usize], most: usize) -> Vec<Vec<Cut>> {
    let mut steps: Vec<Vec<Cut>> = Vec::new();
    let mut tokens = 0;
    for &text in order {
        let length = texts[text].token_ids.len();
        let cut = Cut { text, tokens: 0..length, slot: None };
        match steps.last_mut() {
            Some(last) if tokens + length <= most => {
                last.push(cut);
                tokens += length;
            }
            _ => {
                steps.push(vec![cut]);
                tokens = length;
            }
        }
    }
    steps
}

/// Tokens of each step: several steps for each that is on its way, or the stages would wait for one another;
/// but not so small that a stage reads its weights for little.
fn step_tokens(tokens: usize, depth: usize) -> usize {
    let few = (tokens / (STEPS * depth)).min(limits::FORWARD_TOKENS);
    (few - few % LEAST_TOKENS).max(LEAST_TOKENS)
}

/// Steps of `most` tokens each but the last, one text after another.
fn cut(texts: &[Text], order: &[usize], most: usize) -> Vec<Vec<Cut>> {
    let mut steps: Vec<Vec<Cut>> = Vec::new();
    let mut room = 0;
    let mut cut_texts = 0;
    for &text in order {
        let length = texts[text].token_ids.len();
        let mut start = 0;
        let mut slot = None;
        while start < length {
            if room == 0 {
                steps.push(Vec::new());
                room = most;
            }
            let end = length.min(start + room);
            if end < length && slot.is_none() {
                // The one that was cut before ends in this step or before it, the next begins in this one.
                slot = Some(cut_texts % CUT_TEXTS);
                cut_texts += 1;
            }
            if let Some(step) = steps.last_mut() {
                step.push(Cut { text, tokens: start..end, slot });
            }
            room -= end - start;
            start = end;
        }
    }
    steps
}

fn room(texts: &[Text], steps: &[Vec<Cut>]) -> Room {
    let kept = steps.iter().flatten().filter(|cut| cut.slot.is_some());
    match kept.map(|cut| texts[cut.text].token_ids.len() as u32).max() {
        None => Room { lanes: 0, slots: 0, capacity: 0 },
        Some(capacity) => Room { lanes: 1, slots: CUT_TEXTS, capacity },
    }
}

fn step(texts: &[Text], cuts: &[Cut]) -> Step {
    let token_ids = cuts.iter().flat_map(|cut| &texts[cut.text].token_ids[cut.tokens.clone()]);
    Step {
        lane: 0,
        shares: Vec::new(),
        pieces: cuts.iter().map(|cut| piece(&texts[cut.text], cut)).collect(),
        token_ids: token_ids.copied().collect(),
    }
}

fn piece(text: &Text, cut: &Cut) -> Piece {
    let Range { start, end } = cut.tokens;
    let first = text.prompt_tokens.saturating_sub(start).min(end - start) as u32;
    let next = text.token_ids.get(end).copied().filter(|_| end >= text.prompt_tokens);
    Piece {
        run: Run { slot: cut.slot, start: start as u32, tokens: (end - start) as u32 },
        stream: stream(text.row, 0),
        ask: Ask::Score { first, next },
    }
}

fn finish(text: &Text, positions: Vec<Position>) -> Sequence {
    let mut target_mask = vec![false; text.prompt_tokens.max(1).min(text.token_ids.len())];
    target_mask.resize(text.token_ids.len(), true);
    Sequence {
        row_id: text.row_id.clone(),
        row: text.row,
        tags: text.tags.clone(),
        token_ids: text.token_ids.clone(),
        target_mask,
        finish_reason: "given".to_owned(),
        positions,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(row: u64, prompt_tokens: usize, tokens: usize) -> Text {
        let token_ids = (0..tokens as u32).map(|id| id + 1000 * row as u32).collect();
        Text { row_id: format!("row-{row}"), row, tags: Vec::new(), token_ids, prompt_tokens }
    }

    /// Every token once and in order, every target once, never two texts in one slot at a time.
    #[test]
    fn texts_are_cut_where_steps_are_full_and_nothing_is_lost() {
        let lengths = [700, 300, 97, 96, 95, 10, 2, 1, 1];
        for prompt in [0, 1, 50, 96, 97, 200] {
            let texts: Vec<Text> =
                lengths.iter().enumerate().map(|(row, &n)| text(row as u64, prompt.min(n), n)).collect();
            let order: Vec<usize> = (0..texts.len()).collect();
            for most in [96, 128, 1000, 5000] {
                let steps = cut(&texts, &order, most);
                let Room { slots, .. } = room(&texts, &steps);
                let mut seen: Vec<Vec<u32>> = vec![Vec::new(); texts.len()];
                let mut labels: Vec<Vec<u32>> = vec![Vec::new(); texts.len()];
                let mut kept: Vec<Option<(usize, u32)>> = vec![None; slots as usize];
                for (index, cuts) in steps.iter().enumerate() {
                    let step = step(&texts, cuts);
                    assert!(step.token_ids.len() == most || index + 1 == steps.len());
                    let mut at = 0;
                    for (cut, piece) in cuts.iter().zip(&step.pieces) {
                        let tokens = &step.token_ids[at..at + piece.run.tokens as usize];
                        at += tokens.len();
                        assert_eq!(piece.run.start as usize, seen[cut.text].len());
                        if let Some(slot) = piece.run.slot {
                            let held = kept[slot as usize].replace((cut.text, piece.run.start + piece.run.tokens));
                            assert!(piece.run.start == 0 || held == Some((cut.text, piece.run.start)));
                        }
                        let Ask::Score { first, next } = piece.ask else { panic!("{:?}", piece.ask) };
                        labels[cut.text].extend(tokens.iter().skip(piece.first_scored(first) as usize));
                        labels[cut.text].extend(next);
                        seen[cut.text].extend(tokens);
                    }
                    let slots: Vec<_> = cuts.iter().filter_map(|cut| cut.slot).collect();
                    assert!(slots.len() < 2 || slots[0] != slots[1] && slots.len() == 2, "{slots:?}");
                }
                for ((text, seen), labels) in texts.iter().zip(&seen).zip(&labels) {
                    assert_eq!(*seen, text.token_ids);
                    assert_eq!(*labels, text.token_ids[text.prompt_tokens.clamp(1, text.token_ids.len())..]);
                }
            }
        }
    }
}
