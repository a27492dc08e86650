//! What a plan is asked about, and what it takes for granted.

use retort_core::{Code, Error, Result};
use serde::Serialize;

use crate::Gpu;

/// Machines of one kind.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cluster {
    pub nodes: u32,
    /// GPUs a node.
    pub gpus: u32,
    pub gpu: Gpu,
}

/// What is to be done. Every row has the same length: means serve for the time, the longest rows
/// for the memory.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Work {
    pub mode: Mode,
    pub rows: u64,
    pub prompt_tokens: u64,
    /// Target tokens of a row: those that are generated, or whose soft targets are scored.
    pub new_tokens: u64,
    /// Rows of a shard: batches are composed inside one.
    pub shard_rows: u64,
    /// Tokens that go through a stage at once while scoring, and at most while prompts are read.
    pub micro_batch: u64,
    /// Sequences that a group generates at once; as many as fit where it is not given.
    pub sequences: Option<u64>,
    pub price_per_gpu_hour: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    Score,
    Generate,
    Both,
}

/// How much of the hardware's rates software reaches; `docs/planning.md` says why these.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Assumptions {
    /// Part of the peak that products reach.
    pub compute_efficiency: f64,
    /// bf16 operations a second that were measured; takes the place of peak and efficiency.
    pub measured_flops: Option<f64>,
    /// Part of the memory's rate that reading weights and keys reaches.
    pub bandwidth_efficiency: f64,
    /// Part of a link's rate that transfers reach.
    pub link_efficiency: f64,
    /// Part of the memory that weights, cache and activations may fill.
    pub memory_utilization: f64,
    /// Seconds that an all-reduce takes beside its bytes, inside a node.
    pub node_latency: f64,
    /// The same, and what a hop of the pipeline takes, across nodes.
    pub network_latency: f64,
    /// Bytes a second that a hop between two native processes carries at most, whatever the link:
    /// frames go through both hosts' memory and a gRPC stream.
    pub hop_bandwidth: f64,
    /// How many times longer a remote engine takes to score with log-probabilities of the prompt.
    pub remote_scoring_cost: f64,
}

impl Default for Assumptions {
    fn default() -> Self {
        Self {
            compute_efficiency: 0.5,
            measured_flops: None,
            bandwidth_efficiency: 0.8,
            link_efficiency: 0.7,
            memory_utilization: 0.9,
            node_latency: 15e-6,
            network_latency: 50e-6,
            hop_bandwidth: 1e9,
            remote_scoring_cost: 3.0,
        }
    }
}

impl Cluster {
    pub fn total_gpus(&self) -> u64 {
        u64::from(self.nodes) * u64::from(self.gpus)
    }

    pub fn validate(&self) -> Result<()> {
        whole("--nodes", u64::from(self.nodes), 1, 1024)?;
        whole("--gpus", u64::from(self.gpus), 1, 72)?;
        whole("--gpu-memory (bytes)", self.gpu.memory_bytes, 1 << 30, 1 << 42)?;
        rate("--tflops (operations a second)", self.gpu.bf16_flops)?;
        if let Some(flops) = self.gpu.fp8_flops {
            rate("the fp8 rate (operations a second)", flops)?;
        }
        rate("--memory-bandwidth (bytes a second)", self.gpu.memory_bandwidth)?;
        rate("--node-bandwidth (bytes a second)", self.gpu.node_link)?;
        rate("--link-bandwidth (bytes a second)", self.gpu.network)
    }
}

impl Work {
    /// Tokens of a row.
    pub fn row_tokens(&self) -> u64 {
        self.prompt_tokens + self.new_tokens
    }

    pub fn target_tokens(&self) -> u64 {
        self.rows.saturating_mul(self.new_tokens)
    }

    pub fn validate(&self) -> Result<()> {
        whole("--rows", self.rows, 1, 1_000_000_000_000)?;
        whole("--prompt-tokens", self.prompt_tokens, 1, 1 << 24)?;
        whole("--new-tokens", self.new_tokens, 1, 1 << 24)?;
        whole("--shard-rows", self.shard_rows, 1, 4096)?;
        whole("--micro-batch", self.micro_batch, 1, 1 << 20)?;
        if let Some(sequences) = self.sequences {
            whole("--sequences", sequences, 1, 1 << 20)?;
        }
        match self.price_per_gpu_hour {
            Some(price) if !(price.is_finite() && (0.0..=1e6).contains(&price)) => {
                Err(invalid(format!("--price-per-gpu-hour is {price}; it must be 0 to 1,000,000")))
            }
            _ => Ok(()),
        }
    }
}

impl Assumptions {
    pub fn validate(&self) -> Result<()> {
        let part = |name: &str, value: f64| match value > 0.0 && value <= 1.0 {
            true => Ok(()),
            false => {
                Err(invalid(format!("{name} is {value}; it is a part of the hardware's rate, above 0 and at most 1")))
            }
        };
        part("--efficiency", self.compute_efficiency)?;
        part("--bandwidth-efficiency", self.bandwidth_efficiency)?;
        part("--link-efficiency", self.link_efficiency)?;
        part("--memory-utilization", self.memory_utilization)?;
        if let Some(flops) = self.measured_flops {
            rate("--measured-tflops (operations a second)", flops)?;
        }
        rate("--hop-bandwidth (bytes a second)", self.hop_bandwidth)?;
        match (1.0..=1000.0).contains(&self.remote_scoring_cost) {
            true => Ok(()),
            false => {
                Err(invalid(format!("--remote-scoring-cost is {}; it must be 1 to 1,000", self.remote_scoring_cost)))
            }
        }
    }
}

fn whole(name: &str, value: u64, least: u64, most: u64) -> Result<()> {
    match (least..=most).contains(&value) {
        true => Ok(()),
        false => Err(invalid(format!("{name} is {value}; it must be {least} to {most}"))),
    }
}

fn rate(name: &str, value: f64) -> Result<()> {
    match value.is_finite() && (1e6..=1e18).contains(&value) {
        true => Ok(()),
        false => Err(invalid(format!("{name} is {value:e}; it must be 1e6 to 1e18"))),
    }
}

fn invalid(message: String) -> Error {
    Error::new(Code::SpecInvalid, message)
}
