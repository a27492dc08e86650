//! What a job amounts to: the report, and the workers' results it is made of. Stored as JSON in the
//! database and, for the job's owner, as `report.json` beside its artefacts.

use std::collections::BTreeMap;

use retort_artifact::{checkpoint::HeldOut, paths};
use retort_core::{id::JobId, pruning::Pruning};
use retort_plan::forecast;
use serde::{Deserialize, Serialize};

use crate::database::shards::Fidelity;

/// How a student stands to its teacher on the held-out prompts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Quality {
    /// Mean forward KL(teacher || student), nats a target token.
    #[serde(with = "number")]
    pub kl: f64,
    /// Share of positions where both agree on the most likely token.
    #[serde(with = "number")]
    pub top1_agreement: f64,
    #[serde(with = "number")]
    pub student_perplexity: f64,
    #[serde(with = "number")]
    pub teacher_perplexity: f64,
    /// Target tokens judged.
    pub tokens: u64,
    /// Expected calibration error of the student; absent where no worker said, as the next.
    #[serde(default)]
    pub calibration_error: Option<f64>,
    #[serde(default)]
    pub teacher_calibration_error: Option<f64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    pub row_id: String,
    pub prompt: String,
    pub teacher: String,
    pub student_before: String,
    pub student_after: String,
}

/// What the evaluation found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    pub before: Quality,
    pub after: Quality,
    #[serde(default)]
    pub before_by_tag: BTreeMap<String, Quality>,
    pub after_by_tag: BTreeMap<String, Quality>,
    pub samples: Vec<Sample>,
}

/// What the training run left.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainFinish {
    pub steps: u32,
    /// Store prefix of the checkpoint to judge.
    pub checkpoint_key: String,
    /// Store prefix of the weights before training.
    pub initial_key: String,
    /// Tokens that went through the student, prompts and all, each as often as it came. It was called
    /// `trained_tokens` before, here as in the report.
    #[serde(alias = "trained_tokens")]
    pub processed_tokens: u64,
    /// Of these, tokens that the loss was computed at; 0 where no worker said, as the next two.
    #[serde(default)]
    pub target_tokens: u64,
    /// Numbers that trained: of a student with adapters, theirs alone.
    #[serde(default)]
    pub trained_parameters: u64,
    /// The most that trained at once, the lead included.
    #[serde(default)]
    pub workers: u32,
    /// Of `steps`, those that the guard left out.
    #[serde(default)]
    pub left_out_steps: u32,
    pub seconds: f64,
    #[serde(with = "number")]
    pub tokens_per_second: f64,
    #[serde(with = "number")]
    pub final_loss: f64,
    /// Of a student that was cut out of its teacher.
    #[serde(default)]
    pub pruning: Option<Pruning>,
    /// How the student did on the way, oldest first.
    #[serde(default)]
    pub curve: Vec<HeldOut>,
}

impl TrainFinish {
    /// Optimiser steps of the checkpoint to judge.
    pub fn judged_step(&self, job: &JobId) -> u32 {
        paths::parse_checkpoint(job.as_str(), &self.checkpoint_key).map_or(self.steps, |(step, _)| step)
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GateResult {
    /// As the spec names it, such as `max_kl`.
    pub gate: String,
    #[serde(with = "number")]
    pub limit: f64,
    #[serde(with = "number")]
    pub value: f64,
    pub passed: bool,
}

/// An attempt that did not end in its result, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Redone {
    /// The task within its job, such as `shard-00012`.
    pub task: String,
    /// Fencing epoch of the attempt.
    pub epoch: u64,
    pub worker: String,
    pub reason: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub before: Quality,
    pub after: Quality,
    #[serde(default)]
    pub before_by_tag: BTreeMap<String, Quality>,
    pub after_by_tag: BTreeMap<String, Quality>,
    pub gates: Vec<GateResult>,
    pub samples: Vec<Sample>,
    /// Of all shards, held-out ones included.
    pub target_tokens: u64,
    pub store_bytes: u64,
    /// Of the training shards: held-out ones are captured more finely than the spec says.
    pub bytes_per_token: f64,
    /// Median of the shards' own rates; tokens a second of one worker.
    pub teacher_tokens_per_second: f64,
    #[serde(with = "number")]
    pub student_tokens_per_second: f64,
    /// Tokens that went through the student in training, prompts and all, each as often as it came.
    #[serde(alias = "trained_tokens")]
    pub processed_tokens: u64,
    /// Target tokens that the student was trained at, each as often as it came; 0 where no worker said, as
    /// `trained_parameters` and `workers`.
    #[serde(default)]
    pub trained_target_tokens: u64,
    /// Numbers that trained: of a student with adapters, theirs alone.
    #[serde(default)]
    pub trained_parameters: u64,
    /// Of the adapters; 0 without.
    #[serde(default)]
    pub lora_rank: u32,
    /// Of the weights' running average that was judged; 0 without.
    #[serde(default)]
    pub ema_decay: f64,
    /// The most that trained at once, the lead included.
    #[serde(default)]
    pub workers: u32,
    /// Optimiser steps that the guard left out.
    #[serde(default)]
    pub left_out_steps: u32,
    pub redone: Vec<Redone>,
    /// Shards that another job had computed.
    #[serde(default)]
    pub reused: u32,
    #[serde(default)]
    pub soft_targets: SoftTargets,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pruning: Option<Pruning>,
    /// Absent where the student was not judged on the way.
    #[serde(default)]
    pub forecast: Option<Forecast>,
    /// `models/{name}/versions/{n}`; empty when a gate failed.
    pub promoted: String,
    /// Where the artefacts lie, as store keys.
    pub artifacts: BTreeMap<String, String>,
}

/// The held-out curve continued.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Forecast {
    /// As it was measured, oldest first.
    pub curve: Vec<HeldOut>,
    pub fit: Option<forecast::Forecast>,
    /// Why there is no fit; empty where there is one.
    pub none: String,
    /// The learning rate fell over the run, so the forecast is mostly too low.
    pub decaying: bool,
}

/// What storing the soft targets cost, means over the target tokens of a split.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SoftTargets {
    pub train: Fidelity,
    pub held_out: Fidelity,
}

/// JSON has no infinity and no NaN: a number that is not finite is written as null and read back as
/// NaN, which passes no gate.
mod number {
    use serde::{Deserialize as _, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        if value.is_finite() { serializer.serialize_f64(*value) } else { serializer.serialize_none() }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN))
    }
}
