//! The job spec: what a user writes in YAML, with defaults and the checks that need no file.

mod counts;
mod export;
mod idle;
mod lora;
mod loss;
mod prune;
mod soft_targets;
mod validate;
mod yaml;

use serde::{Deserialize, Deserializer, Serialize};

pub use export::{Export, GgufType};
pub use lora::{Lora, LoraBase, LoraTarget};
pub use loss::{Loss, Weight};
pub use prune::{Choose, Layers, Prune};
pub use soft_targets::{
    Codec, CodecName, Flat as FlatSoftTargets, HELD_OUT_CODEC, MAX_DRAWS, MAX_HEAD, MAX_TEMPERATURES, Quantiser,
    SoftTargets, TEMPERATURES,
};
pub use yaml::parse_yaml;

const ADAM_BETA1: f64 = 0.9;
/// Second moments follow over about 20 steps: runs here are short.
const ADAM_BETA2: f64 = 0.95;
const ADAM_EPSILON: f64 = 1e-8;
const ADAM_EMBEDDING_EPSILON: f64 = 1e-6;

/// What to distil, into what, and what counts as good enough.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobSpec {
    /// Names the promoted model: lower case letters, digits and dashes.
    pub name: String,
    /// Seeds every random choice of the job.
    #[serde(default)]
    pub seed: u64,
    pub prompts: Prompts,
    pub teacher: Teacher,
    pub student: Student,
    #[serde(default, deserialize_with = "section")]
    pub train: Train,
    #[serde(default, deserialize_with = "section")]
    pub gates: Gates,
    #[serde(default, deserialize_with = "section", skip_serializing_if = "is_default")]
    pub export: Export,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prompts {
    /// JSONL in OpenAI messages form; a path (relative to the spec's folder in YAML, absolute
    /// elsewhere) or a `file://` URL.
    pub path: String,
    /// Share of rows held out when no row says `"split"`, 0 < share < 1.
    #[serde(default = "default_held_out_fraction")]
    pub held_out_fraction: f64,
    /// Rows a shard, the unit of teacher work.
    #[serde(default = "default_shard_rows")]
    pub shard_rows: u32,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Teacher {
    /// A Hugging Face folder.
    pub model: String,
    #[serde(default = "default_pool")]
    pub pool: String,
    #[serde(default)]
    pub mode: TeacherMode,
    #[serde(default, deserialize_with = "section")]
    pub sampling: Sampling,
    #[serde(default, deserialize_with = "section")]
    pub soft_targets: SoftTargets,
}

impl Teacher {
    /// How many completions a training prompt has: one where they are given.
    pub fn completions(&self) -> u32 {
        match self.mode {
            TeacherMode::Generate => self.sampling.completions,
            TeacherMode::Score => 1,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TeacherMode {
    /// The teacher writes the completion; soft targets are captured in the same pass.
    #[default]
    Generate,
    /// The prompt file carries completions; the teacher scores them.
    Score,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f64,
    /// Nucleus mass in (0, 1].
    pub top_p: f64,
    pub max_new_tokens: u32,
    /// Only the likeliest so many; 0 for all. This and what follows is left out of JSON where it does
    /// nothing: a checkpoint knows its spec by the hash of that.
    #[serde(skip_serializing_if = "is_default")]
    pub top_k: u32,
    /// Only tokens at least this times as likely as the likeliest; 0 for all.
    #[serde(skip_serializing_if = "is_default")]
    pub min_p: f64,
    /// Of tokens that are there already; 1 leaves them.
    #[serde(skip_serializing_if = "is_one")]
    pub repetition_penalty: f64,
    /// Any of these ends a completion and stays its end.
    #[serde(deserialize_with = "section", skip_serializing_if = "Vec::is_empty")]
    pub stop: Vec<String>,
    /// Of each training prompt; a held-out prompt has one.
    #[serde(skip_serializing_if = "is_one")]
    pub completions: u32,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.7,
            top_p: 0.95,
            max_new_tokens: 128,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            stop: Vec::new(),
            completions: 1,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Student {
    #[serde(default = "default_pool")]
    pub pool: String,
    pub init: Init,
    /// Adapters that train in the student's stead; left out of JSON where the student itself does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<Lora>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Init {
    /// Some of the teacher's layers, heads and channels.
    Prune(Prune),
    /// A Hugging Face folder with the teacher's vocabulary.
    Checkpoint { model: String },
    /// Random weights in this shape, with the teacher's vocabulary.
    Config {
        hidden_size: u32,
        intermediate_size: u32,
        num_hidden_layers: u32,
        num_attention_heads: u32,
        num_key_value_heads: u32,
    },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Train {
    /// Passes over the training shards.
    pub passes: u32,
    /// Sequences an optimiser step.
    pub batch_rows: u32,
    /// Most tokens that go through the student at a time, but for a longer row, which goes alone; chosen for the
    /// device where it is absent. Of the result it changes the rounding alone. Left out of JSON where it is absent: a
    /// checkpoint knows its spec by the hash of that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro_batch_tokens: Option<u32>,
    pub learning_rate: f64,
    /// Share of the steps over which the learning rate rises from 0.
    pub warmup_ratio: f64,
    #[serde(skip_serializing_if = "is_default")]
    pub schedule: Schedule,
    /// Share of the steps over which a `wsd` schedule falls.
    #[serde(skip_serializing_if = "is_fifth")]
    pub decay_ratio: f64,
    pub weight_decay: f64,
    /// Of AdamW's running means of the gradient and of its square. Each is left out of JSON where it is the default: a
    /// checkpoint knows its spec by the hash of that.
    #[serde(skip_serializing_if = "is_adam_beta1")]
    pub adam_beta1: f64,
    #[serde(skip_serializing_if = "is_adam_beta2")]
    pub adam_beta2: f64,
    /// Added to the root of the mean square that a gradient is divided by.
    #[serde(skip_serializing_if = "is_adam_epsilon")]
    pub adam_epsilon: f64,
    /// The same of the embeddings and the head, whose rows of rare tokens have tiny gradients or, on sampled soft
    /// targets, seldom jolts (docs/decisions/021).
    #[serde(skip_serializing_if = "is_adam_embedding_epsilon")]
    pub adam_embedding_epsilon: f64,
    pub clip_norm: f64,
    #[serde(deserialize_with = "section", skip_serializing_if = "is_default")]
    pub loss: Loss,
    /// Optimiser steps between checkpoints; 0 means only at the end.
    pub checkpoint_steps: u32,
    /// The input embeddings and the head stay as they are. For a student that starts with its
    /// teacher's: the noise of sampled soft targets then has nowhere to settle (docs/fidelity.md).
    /// Left out of JSON where it is false: a checkpoint knows its spec by the hash of that.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub freeze_embeddings: bool,
    /// Blocks are computed once more on the way back, and of what happens in them only the input is kept.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub activation_checkpointing: bool,
    #[serde(deserialize_with = "section", skip_serializing_if = "is_default")]
    pub guard: Guard,
    /// Of the running average of the weights, which is what is judged and exported; 0 for none.
    #[serde(skip_serializing_if = "is_default")]
    pub ema_decay: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parallel: Option<Parallel>,
    #[serde(deserialize_with = "section", skip_serializing_if = "is_default")]
    pub keep: Keep,
    #[serde(skip_serializing_if = "is_default")]
    pub promote: Promote,
}

impl Train {
    /// Tokens of a micro-batch where [`Train::micro_batch_tokens`] is absent: on a CPU larger ones win nothing, a GPU
    /// is kept busy by them.
    pub const MICRO_BATCH_TOKENS_CPU: u32 = 1024;
    pub const MICRO_BATCH_TOKENS_GPU: u32 = 16_384;

    /// Where workers exchange weights, and not gradients.
    pub fn diloco(&self) -> Option<&Parallel> {
        self.parallel.as_ref().filter(|parallel| parallel.mode == Sharing::Diloco && parallel.workers > 1)
    }

    /// Workers that train the one model.
    pub fn workers(&self) -> u32 {
        self.parallel.as_ref().map_or(1, |parallel| parallel.workers)
    }
}

/// How several workers train one model.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parallel {
    /// Workers of the student's pool, at most: training goes on with those that are there.
    pub workers: u32,
    #[serde(default)]
    pub mode: Sharing,
    /// Optimiser steps that a worker does by itself between two exchanges (`diloco`).
    #[serde(default = "default_inner_steps")]
    pub inner_steps: u32,
    /// Of the exchange's Nesterov step (`diloco`).
    #[serde(default = "default_outer_learning_rate")]
    pub outer_learning_rate: f64,
    #[serde(default = "default_outer_momentum")]
    pub outer_momentum: f64,
}

impl Parallel {
    /// With the defaults.
    pub fn of(workers: u32) -> Self {
        Self {
            workers,
            mode: Sharing::default(),
            inner_steps: default_inner_steps(),
            outer_learning_rate: default_outer_learning_rate(),
            outer_momentum: default_outer_momentum(),
        }
    }
}

/// What workers that train one model exchange.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sharing {
    /// Every step's gradient, over the network: the result is one worker's.
    #[default]
    Synchronous,
    /// How far the weights have come after many steps, through the object store (Douillard et al., "DiLoCo:
    /// Distributed Low-Communication Training of Language Models", 2023).
    Diloco,
}

/// Checkpoints that stay in the store while the job trains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Keep {
    /// The newest so many: with two there is one to go back to should the newest be damaged.
    pub last: u32,
    /// Besides, the one with the lowest held-out KL.
    pub best: bool,
}

impl Default for Keep {
    fn default() -> Self {
        Self { last: 2, best: true }
    }
}

/// Which checkpoint the evaluation judges, and promotion takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Promote {
    #[default]
    Last,
    /// The one with the lowest held-out KL; the last where none was measured.
    Best,
}

/// When a step is left out, the weights as they were; up to five in a row.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Guard {
    /// Of the gradient's norm to its running mean, above this; 0 never.
    pub norm_ratio: f64,
    /// Of the loss to its running mean, above this; 0 never.
    pub loss_ratio: f64,
}

impl Default for Guard {
    fn default() -> Self {
        Self { norm_ratio: 20.0, loss_ratio: 5.0 }
    }
}

/// How the learning rate goes on after its rise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Half a cosine down to nothing (Loshchilov and Hutter, "SGDR", 2017).
    #[default]
    Cosine,
    /// A straight line down to nothing.
    Linear,
    /// It stays.
    Constant,
    /// It stays, and falls at the end ("warm-up, stable, decay": Hu et al., "MiniCPM", 2024), as `1 - sqrt(x)`
    /// (Haegele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", 2024).
    Wsd,
}

impl Default for Train {
    fn default() -> Self {
        Self {
            passes: 3,
            batch_rows: 8,
            micro_batch_tokens: None,
            learning_rate: 5e-4,
            warmup_ratio: 0.05,
            schedule: Schedule::default(),
            decay_ratio: 0.2,
            weight_decay: 0.01,
            adam_beta1: ADAM_BETA1,
            adam_beta2: ADAM_BETA2,
            adam_epsilon: ADAM_EPSILON,
            adam_embedding_epsilon: ADAM_EMBEDDING_EPSILON,
            clip_norm: 1.0,
            loss: Loss::default(),
            checkpoint_steps: 20,
            freeze_embeddings: false,
            activation_checkpointing: false,
            guard: Guard::default(),
            ema_decay: 0.0,
            parallel: None,
            keep: Keep::default(),
            promote: Promote::default(),
        }
    }
}

/// A candidate is promoted when every gate that is set holds on the held-out prompts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Gates {
    /// Mean KL(teacher || student), nats a token, at most.
    pub max_kl: Option<f64>,
    /// KL after over KL before training, at most.
    pub max_kl_ratio: Option<f64>,
    pub min_top1_agreement: Option<f64>,
    /// Student over teacher perplexity on the held-out completions, at most.
    pub max_perplexity_ratio: Option<f64>,
    /// Expected calibration error of the student, at most. Left out of JSON where it is absent: a checkpoint
    /// knows its spec by the hash of that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_calibration_error: Option<f64>,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn is_fifth(value: &f64) -> bool {
    *value == 0.2
}

fn is_adam_beta1(value: &f64) -> bool {
    *value == ADAM_BETA1
}

fn is_adam_beta2(value: &f64) -> bool {
    *value == ADAM_BETA2
}

fn is_adam_epsilon(value: &f64) -> bool {
    *value == ADAM_EPSILON
}

fn is_adam_embedding_epsilon(value: &f64) -> bool {
    *value == ADAM_EMBEDDING_EPSILON
}

fn is_one<T: Copy + Into<f64>>(value: &T) -> bool {
    (*value).into() == 1.0
}

/// A section whose keys are all left out, the heading left in, has its defaults; so has an empty list.
fn section<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

fn default_held_out_fraction() -> f64 {
    0.1
}

fn default_shard_rows() -> u32 {
    16
}

fn default_inner_steps() -> u32 {
    50
}

fn default_outer_learning_rate() -> f64 {
    0.7
}

fn default_outer_momentum() -> f64 {
    0.5
}

fn default_pool() -> String {
    "default".to_owned()
}
