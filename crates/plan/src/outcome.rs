//! What a plan says. All of it is for `--json` too: bytes and seconds, no rounding.

use std::ops::Range;

use serde::Serialize;

use crate::{Assumptions, Cluster, Format, Layout, Work};

#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    pub teacher: Teacher,
    pub cluster: Cluster,
    pub work: Work,
    pub assumptions: Assumptions,
    pub score: Option<Section>,
    pub generate: Option<Section>,
    /// Ways to get completions and their soft targets, the cheapest first; only for both.
    pub routes: Vec<Route>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Teacher {
    pub name: String,
    pub parameters: u64,
    pub layers: u64,
    pub format: Format,
    pub weight_bytes: u64,
    /// Keys and values of one position in all layers, bf16.
    pub cache_bytes_per_token: u64,
    /// What a hop of a pipeline carries: one hidden state, bf16.
    pub hop_bytes_per_token: u64,
}

/// One kind of work.
#[derive(Clone, Debug, Serialize)]
pub struct Section {
    pub recommended: Option<Estimate>,
    pub reason: String,
    /// The fastest layout of each kind, the recommended one among them; where
    /// none of a kind fits, the largest, with why.
    pub layouts: Vec<Estimate>,
    /// The fewest GPUs of this kind that one group needs, by format.
    pub fits_from: Vec<Smallest>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Smallest {
    pub format: Format,
    /// None where 64 nodes do not do.
    pub gpus: Option<u32>,
    pub nodes: Option<u32>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Estimate {
    pub layout: Layout,
    /// Why it does not fit; such a layout has no speed.
    pub too_small: Option<String>,
    pub stages: Vec<Stage>,
    pub speed: Option<Speed>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Stage {
    /// Counted inside the group.
    pub node: u32,
    pub layers: Range<usize>,
    pub parameters: u64,
    /// These three are of each of the stage's GPUs.
    pub weight_bytes: u64,
    pub cache_bytes: u64,
    pub activation_bytes: u64,
    /// For one micro-batch.
    pub seconds: f64,
}

impl Stage {
    pub fn bytes(&self) -> u64 {
        self.weight_bytes.saturating_add(self.cache_bytes).saturating_add(self.activation_bytes)
    }
}

#[derive(Clone, Debug, Serialize)]
pub struct Speed {
    /// Of all copies together: scored tokens, prompts included, or generated ones, with the time for
    /// their prompts counted.
    pub tokens_per_second: f64,
    /// Generated tokens of all copies once prompts are read.
    pub decode_tokens_per_second: Option<f64>,
    pub bound: Bound,
    /// Tokens of a scoring micro-batch; sequences of a generating one.
    pub micro_batch: u64,
    /// Generated at once by a group.
    pub sequences: Option<u64>,
    /// Part of the time in which the slowest stage has work: the rest is bubble.
    pub busy: f64,
    pub hops: Vec<Hop>,
    pub job: Job,
}

/// What the slowest stage spends most of its time on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bound {
    Products,
    ReadingWeights,
    ReadingCache,
    AllReduce,
    Hops,
}

impl Bound {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Products => "products",
            Self::ReadingWeights => "reading weights",
            Self::ReadingCache => "reading the cache",
            Self::AllReduce => "all-reduce",
            Self::Hops => "hops",
        }
    }
}

/// From one stage to the next, across processes.
#[derive(Clone, Debug, Serialize)]
pub struct Hop {
    pub after_stage: u32,
    pub network: bool,
    pub bytes_per_second: f64,
    /// What it carries at most, in practice.
    pub limit_bytes_per_second: f64,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub struct Job {
    pub seconds: f64,
    /// Of the whole cluster: idle GPUs are paid as well.
    pub gpu_hours: f64,
    pub cost: Option<f64>,
}

/// A way to generate and score.
#[derive(Clone, Debug, Serialize)]
pub struct Route {
    pub name: String,
    pub job: Job,
}
