//! The planner: rows, spec and model facts in, a plan and its tasks out. Pure.
//!
//! What holds of every plan (see the property tests): each row lies in exactly one shard; shards
//! are contiguous, in row order, and only a split's last one is short; training shards are counted
//! before held-out ones; no shard mixes splits; one train task with its replicas and one
//! evaluation, which waits for the training.

use retort_core::{
    Code, Error, Result,
    id::{JobId, TaskId},
    spec::{Codec, HELD_OUT_CODEC, JobSpec},
    state::{Split, TaskKind, TaskState},
};
use retort_plan::training::Training;
use serde::{Deserialize, Serialize};

/// Most shards of one job.
pub const MAX_SHARDS: u64 = 100_000;
/// Answers of the held-out prompts that the evaluation writes out for the report.
pub const SAMPLES: u32 = 3;
/// Held-out rows that go first, so that the student can be judged while it trains.
const EARLY_HELD_OUT_ROWS: u64 = 64;
/// Held-out shards that go first, at most.
const EARLY_HELD_OUT_SHARDS: u32 = 4;

/// What the prompt set amounts to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RowCounts {
    pub train: u64,
    pub held_out: u64,
    /// Tokens of the training rows' completions, all of them, at most.
    pub train_target_tokens: u64,
    pub held_out_target_tokens: u64,
    /// Tokens of all prompts, about.
    pub prompt_tokens: u64,
    /// Tokens of the longest training row, at most.
    pub longest_row: u64,
}

impl RowCounts {
    /// Upper bounds for rows whose completions the teacher writes.
    pub fn generated(train: u64, held_out: u64, max_new_tokens: u32, prompt_tokens: u64) -> Self {
        let each = u64::from(max_new_tokens);
        Self {
            train,
            held_out,
            train_target_tokens: train.saturating_mul(each),
            held_out_target_tokens: held_out.saturating_mul(each),
            prompt_tokens,
            longest_row: prompt_tokens.saturating_add(each),
        }
    }
}

/// As `CreateJob` answers it; the fields are those of `retort.v1.Plan`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    pub train_rows: u64,
    pub held_out_rows: u64,
    pub train_shards: u32,
    pub held_out_shards: u32,
    pub max_target_tokens: u64,
    pub optimizer_steps: u32,
    pub teacher_parameters: u64,
    pub student_parameters: u64,
    pub max_store_bytes: u64,
    /// Absent of a job that was planned before there was one.
    #[serde(default)]
    pub training: Option<Training>,
}

impl Plan {
    pub fn shards(&self) -> u32 {
        self.train_shards + self.held_out_shards
    }

    /// Shard indices of a split, first and one past the last.
    pub fn shards_of(&self, split: Split) -> std::ops::Range<u32> {
        match split {
            Split::Train => 0..self.train_shards,
            Split::HeldOut => self.train_shards..self.shards(),
        }
    }
}

/// A contiguous piece of the prompt set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slice {
    pub shard: u32,
    pub split: Split,
    /// Line of the stored prompt set, from 0.
    pub first_row: u64,
    pub rows: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedTask {
    pub kind: TaskKind,
    /// Of a replica, from 1; else 0.
    pub number: u32,
    /// Present for `TaskKind::Shard`.
    pub slice: Option<Slice>,
    pub state: TaskState,
    /// Lower goes first.
    pub priority: i64,
}

impl PlannedTask {
    pub fn id(&self, job: &JobId) -> TaskId {
        match (self.kind, self.slice) {
            (TaskKind::Shard, slice) => TaskId::shard(job, slice.map_or(0, |slice| slice.shard)),
            (TaskKind::Train, _) => TaskId::train(job),
            (TaskKind::Replica, _) => TaskId::replica(job, self.number),
            (TaskKind::Evaluate, _) => TaskId::evaluate(job),
        }
    }
}

/// Cuts the prompt set into shards and names everything the job has to do.
///
/// Errors: `prompt-set-too-small` when a split has no row, `spec-invalid` when the shards or the
/// optimiser steps are too many to count.
pub fn plan(
    spec: &JobSpec,
    rows: &RowCounts,
    teacher_parameters: u64,
    student_parameters: u64,
    vocab_size: u32,
) -> Result<(Plan, Vec<PlannedTask>)> {
    for (split, count) in [("training", rows.train), ("held-out", rows.held_out)] {
        if count == 0 {
            return Err(Error::new(
                Code::PromptSetTooSmall,
                format!("{}: no {split} rows; a prompt set needs at least one of each split", spec.prompts.path),
            ));
        }
    }
    let shard_rows = spec.prompts.shard_rows.max(1);
    let shards = rows.train.div_ceil(shard_rows.into()).saturating_add(rows.held_out.div_ceil(shard_rows.into()));
    if shards > MAX_SHARDS {
        return Err(Error::new(
            Code::SpecInvalid,
            format!(
                "prompts.shard_rows is {shard_rows}, which makes {shards} shards of {} rows; a job has at most {MAX_SHARDS}: raise it",
                rows.train.saturating_add(rows.held_out)
            ),
        ));
    }
    let train = cut(Split::Train, 0, 0, rows.train, shard_rows);
    let train_shards = train.len() as u32;
    let held_out = cut(Split::HeldOut, train_shards, rows.train, rows.held_out, shard_rows);
    let trained = rows.train.saturating_mul(spec.teacher.completions().into());
    let steps = trained.div_ceil(spec.train.batch_rows.max(1).into()).saturating_mul(spec.train.passes.into());
    let optimizer_steps = u32::try_from(steps).map_err(|_| {
        Error::new(
            Code::SpecInvalid,
            format!("train.passes and train.batch_rows make {steps} optimiser steps, more than can be counted; lower the one or raise the other"),
        )
    })?;

    let plan = Plan {
        train_rows: trained,
        held_out_rows: rows.held_out,
        train_shards,
        held_out_shards: held_out.len() as u32,
        max_target_tokens: rows.train_target_tokens.saturating_add(rows.held_out_target_tokens),
        optimizer_steps,
        teacher_parameters,
        student_parameters,
        max_store_bytes: max_store_bytes(spec, rows, vocab_size),
        training: None,
    };
    let early = EARLY_HELD_OUT_ROWS.div_ceil(shard_rows.into()).min(EARLY_HELD_OUT_SHARDS.into());
    let mut tasks = Vec::with_capacity(train.len() + held_out.len() + 2);
    for slice in train {
        tasks.push(PlannedTask {
            kind: TaskKind::Shard,
            number: 0,
            slice: Some(slice),
            state: TaskState::Ready,
            priority: 10,
        });
    }
    for (nth, slice) in (0u64..).zip(held_out) {
        let priority = if nth < early { 0 } else { 20 };
        tasks.push(PlannedTask {
            kind: TaskKind::Shard,
            number: 0,
            slice: Some(slice),
            state: TaskState::Ready,
            priority,
        });
    }
    let training =
        |kind, number, priority| PlannedTask { kind, number, slice: None, state: TaskState::Ready, priority };
    tasks.push(training(TaskKind::Train, 0, 10));
    // After every job's train task: those can do without.
    tasks.extend((1..spec.train.workers()).map(|number| training(TaskKind::Replica, number, 15)));
    // An evaluation goes before another job's training: it is short and ends a job.
    tasks.push(PlannedTask {
        kind: TaskKind::Evaluate,
        number: 0,
        slice: None,
        state: TaskState::Waiting,
        priority: 0,
    });
    Ok((plan, tasks))
}

fn cut(split: Split, first_shard: u32, first_row: u64, rows: u64, shard_rows: u32) -> Vec<Slice> {
    (first_shard..)
        .zip((0..rows).step_by(shard_rows as usize))
        .map(|(shard, offset)| Slice {
            shard,
            split,
            first_row: first_row + offset,
            rows: (rows - offset).min(shard_rows.into()) as u32,
        })
        .collect()
}

/// An upper bound: every id and count before any compression.
fn max_store_bytes(spec: &JobSpec, rows: &RowCounts, vocab_size: u32) -> u64 {
    // A kept entry: four bytes of id, up to four of log-probability; a draw has a count beside them.
    let a_target = |codec: Codec| u64::from(codec.max_head(vocab_size)) * 8 + u64::from(codec.max_draws()) * 6 + 64;
    let train = rows.train_target_tokens.saturating_mul(a_target(spec.teacher.soft_targets.codec));
    let held_out = rows.held_out_target_tokens.saturating_mul(a_target(HELD_OUT_CODEC));
    // Token ids of the text itself, and its mask.
    let texts = rows.prompt_tokens.saturating_add(rows.train_target_tokens).saturating_add(rows.held_out_target_tokens);
    train.saturating_add(held_out).saturating_add(texts.saturating_mul(5))
}

#[cfg(test)]
mod tests;
