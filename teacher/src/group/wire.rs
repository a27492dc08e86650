//! Between the plain data of a step and its messages. Whatever arrives is checked against what was
//! agreed before memory is taken for it.

use retort_artifact::soft_targets::Position;
use retort_core::{
    Code, Error, Result,
    spec::SoftTargets,
    wire::{soft_targets_from_proto, soft_targets_to_proto},
};
use retort_llama::{Piece as Run, Room, Share};
use retort_proto::{self as proto, step_piece};

use crate::{
    capture::Capture,
    sampling::Sampler,
    stage::step::{Ask, Begin, Piece, Step, Taken},
};

/// Most tokens of one step: a prompt of [`MAX_CONTEXT`], and what goes along with it.
pub(super) const MAX_STEP_TOKENS: usize = 1 << 18;
/// Longest text of a group, tokens.
pub(crate) const MAX_CONTEXT: u32 = 1 << 17;
/// Most lanes, and most slots of all lanes together.
const MAX_LANES: u32 = 1 << 10;
const MAX_SLOTS: u64 = 1 << 16;

pub(super) fn begin_to_proto(run: u64, begin: &Begin) -> proto::BeginRun {
    let soft_targets =
        SoftTargets { temperatures: begin.capture.temperatures.clone(), ..SoftTargets::of(begin.capture.codec) };
    proto::BeginRun {
        run,
        soft_targets: Some(soft_targets_to_proto(&soft_targets)),
        seed: begin.capture.seed,
        sampler: begin.sampler.as_ref().map(|sampler| proto::StepSampler {
            temperature: sampler.temperature,
            top_p: sampler.top_p,
            seed: sampler.seed,
            top_k: sampler.top_k,
            min_p: sampler.min_p,
            repetition_penalty: sampler.repetition_penalty,
        }),
        lanes: begin.room.lanes,
        slots: begin.room.slots,
        capacity: begin.room.capacity,
    }
}

pub(super) fn begin_from_proto(begin: proto::BeginRun) -> Result<(u64, Begin)> {
    let soft_targets = begin.soft_targets.ok_or_else(|| wrong("a run begins without saying what to capture"))?;
    let soft_targets = soft_targets_from_proto(soft_targets)?;
    soft_targets.check().map_err(|error| wrong(&error.message))?;
    let SoftTargets { codec, temperatures, .. } = soft_targets;
    let slots = u64::from(begin.lanes) * u64::from(begin.slots);
    if begin.lanes > MAX_LANES || slots > MAX_SLOTS {
        return Err(wrong(&format!(
            "a run of {} lanes with {} slots each; at most {MAX_LANES} lanes and {MAX_SLOTS} slots",
            begin.lanes, begin.slots
        )));
    }
    let sampler = begin.sampler.map(|sampler| Sampler {
        temperature: sampler.temperature,
        top_p: sampler.top_p,
        top_k: sampler.top_k,
        min_p: sampler.min_p,
        repetition_penalty: sampler.repetition_penalty,
        seed: sampler.seed,
    });
    let sane = |sampler: &Sampler| {
        (0.0..=f64::MAX).contains(&sampler.temperature)
            && sampler.top_p > 0.0
            && sampler.top_p <= 1.0
            && (0.0..=1.0).contains(&sampler.min_p)
            && sampler.repetition_penalty > 0.0
            && sampler.repetition_penalty.is_finite()
    };
    if !sampler.as_ref().is_none_or(sane) {
        return Err(wrong("a run samples in a way that no job may ask for"));
    }
    let room = Room { lanes: begin.lanes, slots: begin.slots, capacity: begin.capacity };
    let capture = Capture { codec, temperatures, seed: begin.seed };
    Ok((begin.run, Begin { capture, sampler, room }))
}

pub(super) fn step_to_proto(run: u64, index: u64, step: &Step, activation_bytes: usize) -> proto::StageStep {
    proto::StageStep {
        run,
        step: index,
        lane: step.lane,
        shares: step
            .shares
            .iter()
            .map(|share| proto::StepShare { from_slot: share.from, to_slot: share.to, positions: share.positions })
            .collect(),
        pieces: step
            .pieces
            .iter()
            .map(|piece| proto::StepPiece {
                slot: piece.run.slot,
                start: piece.run.start,
                tokens: piece.run.tokens,
                stream: piece.stream,
                ask: match piece.ask {
                    Ask::Nothing => None,
                    Ask::Score { first, .. } => Some(step_piece::Ask::ScoreFrom(first)),
                    Ask::Next => Some(step_piece::Ask::Next(true)),
                },
                score_next: match piece.ask {
                    Ask::Score { next, .. } => next,
                    Ask::Nothing | Ask::Next => None,
                },
            })
            .collect(),
        token_ids: step.token_ids.clone(),
        activation_bytes: activation_bytes as u64,
    }
}

/// Refuses a step that does not fit the run it belongs to.
pub(super) fn step_from_proto(step: proto::StageStep, room: &Room) -> Result<Step> {
    let outside = |what: &str, value: u32, end: u32| wrong(&format!("a step names {what} {value} of {end}"));
    if step.lane >= room.lanes.max(1) {
        return Err(outside("lane", step.lane, room.lanes));
    }
    let share = |share: proto::StepShare| {
        let (from, to, positions) = (share.from_slot, share.to_slot, share.positions);
        match (from.max(to) < room.slots, positions <= room.capacity) {
            (true, true) => Ok(Share { from, to, positions }),
            (false, _) => Err(outside("slot", from.max(to), room.slots)),
            (true, false) => Err(outside("position", positions, room.capacity)),
        }
    };
    let piece = |piece: proto::StepPiece| {
        let end = u64::from(piece.start) + u64::from(piece.tokens);
        match piece.slot {
            Some(slot) if slot >= room.slots => return Err(outside("slot", slot, room.slots)),
            Some(_) if end > u64::from(room.capacity) => {
                return Err(wrong(&format!("a step ends at position {end} of {}", room.capacity)));
            }
            _ => {}
        }
        if piece.tokens == 0 || piece.score_next.is_some() && !matches!(piece.ask, Some(step_piece::Ask::ScoreFrom(_)))
        {
            return Err(wrong("a step has a piece without tokens, or one that is scored on without being scored"));
        }
        let ask = match piece.ask {
            Some(step_piece::Ask::ScoreFrom(first)) if first > piece.tokens => {
                return Err(outside("target", first, piece.tokens));
            }
            Some(step_piece::Ask::ScoreFrom(first)) => Ask::Score { first, next: piece.score_next },
            Some(step_piece::Ask::Next(true)) => Ask::Next,
            Some(step_piece::Ask::Next(false)) | None => Ask::Nothing,
        };
        let run = Run { slot: piece.slot, start: piece.start, tokens: piece.tokens };
        Ok(Piece { run, stream: piece.stream, ask })
    };
    let shares = step.shares.into_iter().map(share).collect::<Result<_>>()?;
    let pieces = step.pieces.into_iter().map(piece).collect::<Result<Vec<_>>>()?;
    let tokens: u64 = pieces.iter().map(|piece| u64::from(piece.run.tokens)).sum();
    if tokens != step.token_ids.len() as u64 || tokens == 0 || tokens > MAX_STEP_TOKENS as u64 {
        return Err(wrong(&format!(
            "a step has {} token ids for pieces of {tokens} tokens; it must have as many, 1 to {MAX_STEP_TOKENS}",
            step.token_ids.len()
        )));
    }
    Ok(Step { lane: step.lane, shares, pieces, token_ids: step.token_ids })
}

pub(super) fn taken_to_proto(taken: Taken) -> proto::TakenPosition {
    let Position { head, tail, label_logprob, log_sum_exps } = taken.position;
    let (head_ids, head_logprobs) = head.into_iter().unzip();
    proto::TakenPosition {
        token: taken.token,
        label_logprob,
        head_ids,
        head_logprobs,
        tail_ids: tail.iter().map(|(id, _, _)| *id).collect(),
        tail_counts: tail.iter().map(|(_, count, _)| *count).collect(),
        tail_logprobs: tail.iter().map(|(_, _, logprob)| *logprob).collect(),
        log_sum_exps,
    }
}

pub(super) fn taken_from_proto(taken: proto::TakenPosition) -> Result<Taken> {
    let sizes = (taken.head_ids.len(), taken.tail_ids.len());
    if sizes != (taken.head_logprobs.len(), taken.tail_logprobs.len()) || taken.tail_counts.len() != sizes.1 {
        return Err(wrong("a target's ids and log-probabilities differ in number"));
    }
    let tail = taken.tail_ids.into_iter().zip(taken.tail_counts).zip(taken.tail_logprobs);
    Ok(Taken {
        token: taken.token,
        position: Position {
            head: taken.head_ids.into_iter().zip(taken.head_logprobs).collect(),
            tail: tail.map(|((id, count), logprob)| (id, count, logprob)).collect(),
            label_logprob: taken.label_logprob,
            log_sum_exps: taken.log_sum_exps,
        },
    })
}

/// A message that no stage of this version sends.
pub(super) fn wrong(what: &str) -> Error {
    Error::new(Code::GroupBroken, format!("{what}; is something else than a stage of this group at the other end?"))
}
