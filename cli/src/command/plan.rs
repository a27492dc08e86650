use std::{fs::File, io::Read as _, path::Path};

use clap::{Args, ValueEnum};
use retort_core::{Code, Error, Result};
use retort_model::Config;
use retort_plan::{Assumptions, Cluster, Format, Gpu, Mode, Model, Work, plan};

use super::Context;
use crate::{outcome::Outcome, spec_file};

mod render;
mod size;
#[cfg(test)]
mod tests;

/// A config is a few kilobytes.
const MOST_CONFIG_BYTES: u64 = 1 << 22;

/// Works out what a teacher needs and how fast it will be
///
/// Arithmetic on the teacher's config and the hardware's rates: memory and links of each stage, tokens
/// a second and GPU-hours of scoring and generating, which engine and layout to take, and what does
/// not fit. Nothing is run or contacted. docs/planning.md has the equations.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  retort plan --teacher llama-3.1-405b --nodes 2 --gpus 8 --gpu h100-sxm
  retort plan --teacher llama-3.1-405b --nodes 1 --dtype fp8 --mode score --tokens 1000000000
  retort plan --teacher llama-3.1-70b --gpu a100-80g --price-per-gpu-hour 2.10 --json
  retort plan --teacher ~/models/mine --gpus 1 --gpu-memory 24GB --tflops 70 --memory-bandwidth 900GB

Known teachers: llama-2-7b, -13b, -70b; llama-3-8b, -70b; llama-3.1-8b, -70b, -405b; llama-3.2-1b, -3b.")]
pub struct Plan {
    /// A known name, one in $RETORT_MODELS, a model's folder or its config.json
    #[arg(long, value_name = "NAME_OR_PATH")]
    teacher: String,
    #[command(flatten)]
    hardware: Hardware,
    #[command(flatten)]
    job: Job,
    #[command(flatten)]
    rates: Rates,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Hardware")]
struct Hardware {
    /// Machines
    #[arg(long, default_value_t = 1, value_name = "N")]
    nodes: u32,
    /// GPUs a machine
    #[arg(long, default_value_t = 8, value_name = "N")]
    gpus: u32,
    /// a100-40g, a100-80g, h100-sxm, h100-pcie, h200, b200, l40s or l4; what follows overrides its figures
    #[arg(long, default_value = "h100-sxm", value_name = "KIND")]
    gpu: String,
    /// Memory of a GPU, such as 80GiB
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    gpu_memory: Option<u64>,
    /// Peak of a GPU's dense bf16 products, TFLOP/s
    #[arg(long, value_name = "TFLOPS")]
    tflops: Option<f64>,
    /// Peak of its dense fp8 products, TFLOP/s; 0 where it has none
    #[arg(long, value_name = "TFLOPS")]
    fp8_tflops: Option<f64>,
    /// A second from a GPU's own memory, such as 3350GB
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    memory_bandwidth: Option<u64>,
    /// A second from a GPU to another of its node, one way, such as 450GB
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    node_bandwidth: Option<u64>,
    /// A second from a GPU to another node, one way, such as 50GB
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    link_bandwidth: Option<u64>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Job")]
struct Job {
    /// Score given completions, generate them, or both
    #[arg(long, value_enum, default_value_t = Task::Both)]
    mode: Task,
    /// How weights are held
    #[arg(long, value_enum, default_value_t = Dtype::Bf16)]
    dtype: Dtype,
    /// Which matrices fp8 means: those of the feed-forward of inner layers, as in Meta's
    /// Llama-3.1-405B-FP8, or every layer's
    #[arg(long, value_enum, default_value_t = Fp8Layers::Mlp)]
    fp8_layers: Fp8Layers,
    /// Rows of the job
    #[arg(long, default_value_t = 100_000, value_name = "N", conflicts_with = "tokens")]
    rows: u64,
    /// Target tokens of the job, instead of its rows
    #[arg(long, value_name = "N")]
    tokens: Option<u64>,
    /// Tokens of a row's prompt
    #[arg(long, default_value_t = 512, value_name = "N")]
    prompt_tokens: u64,
    /// Tokens of a row's completion: generated, or scored
    #[arg(long, default_value_t = 512, value_name = "N")]
    new_tokens: u64,
    /// Rows of a shard, as the spec's prompts.shard_rows
    #[arg(long, default_value_t = 1024, value_name = "N")]
    shard_rows: u64,
    /// Tokens that go through a stage at once when scoring
    #[arg(long, default_value_t = 4096, value_name = "N")]
    micro_batch: u64,
    /// Sequences that a group generates at once [default: as many as fit, at most 1024]
    #[arg(long, value_name = "N")]
    sequences: Option<u64>,
    /// Price of a GPU's hour, in any currency
    #[arg(long, value_name = "PRICE")]
    price_per_gpu_hour: Option<f64>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "What software reaches of the hardware's rates")]
struct Rates {
    /// Part of the peak that products reach
    #[arg(long, default_value_t = Assumptions::default().compute_efficiency, value_name = "PART")]
    efficiency: f64,
    /// bf16 TFLOP/s that a GPU was measured to reach on such products, instead of peak and efficiency
    #[arg(long, value_name = "TFLOPS")]
    measured_tflops: Option<f64>,
    /// Part of the memory's rate that reading weights and cache reaches
    #[arg(long, default_value_t = Assumptions::default().bandwidth_efficiency, value_name = "PART")]
    bandwidth_efficiency: f64,
    /// Part of the links' rates that transfers reach
    #[arg(long, default_value_t = Assumptions::default().link_efficiency, value_name = "PART")]
    link_efficiency: f64,
    /// Part of a GPU's memory that may be filled
    #[arg(long, default_value_t = Assumptions::default().memory_utilization, value_name = "PART")]
    memory_utilization: f64,
    /// A second over a hop between two native processes, whatever the link
    #[arg(long, default_value = "1GB", value_name = "SIZE", value_parser = size::parse)]
    hop_bandwidth: u64,
    /// Times longer that vLLM or SGLang takes to score with log-probabilities of the prompt
    #[arg(long, default_value_t = Assumptions::default().remote_scoring_cost, value_name = "TIMES")]
    remote_scoring_cost: f64,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Task {
    Score,
    Generate,
    Both,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Dtype {
    Bf16,
    Fp8,
    Int8,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Fp8Layers {
    Mlp,
    All,
}

impl Plan {
    pub fn run(self, context: &Context) -> Result<Outcome> {
        let (name, config) = teacher(&self.teacher)?;
        let cluster = self.hardware.cluster()?;
        let work = self.job.work();
        let plan = plan(&name, &config, self.job.format(), &cluster, &work, &self.rates.assumptions())?;
        let value =
            serde_json::to_value(&plan).map_err(|error| Error::internal(format!("cannot write JSON: {error}")))?;
        context.output.json(&value);
        context.output.text(&render::text(&plan));
        Ok(Outcome::Done)
    }
}

/// Its name and config. What is there as a path is taken as one; a name in `$RETORT_MODELS` goes before ours.
fn teacher(given: &str) -> Result<(String, Config)> {
    let path = Path::new(given);
    if path.is_dir() {
        return Ok((given.to_owned(), Config::from_dir(path)?));
    }
    if let Some(folder) = spec_file::imported(given).filter(|_| !path.exists()) {
        return Ok((given.to_owned(), Config::from_dir(Path::new(&folder))?));
    }
    if !path.exists() && !given.contains(std::path::MAIN_SEPARATOR) {
        let model = Model::find(given)?;
        return Ok((model.name.to_owned(), model.config()?));
    }
    let mut text = String::new();
    let file = File::open(path).map_err(|error| Error::io(path, error))?;
    file.take(MOST_CONFIG_BYTES).read_to_string(&mut text).map_err(|error| Error::io(path, error))?;
    let value = serde_json::from_str(&text)
        .map_err(|error| Error::new(Code::ModelMalformed, format!("{}: {error}", path.display())))?;
    Ok((given.to_owned(), Config::from_json(&path.display(), &value)?))
}

impl Hardware {
    fn cluster(&self) -> Result<Cluster> {
        let mut gpu = Gpu::find(&self.gpu)?;
        gpu.memory_bytes = self.gpu_memory.unwrap_or(gpu.memory_bytes);
        gpu.bf16_flops = self.tflops.map_or(gpu.bf16_flops, |tflops| tflops * 1e12);
        gpu.fp8_flops = match self.fp8_tflops {
            Some(0.0) => None,
            Some(tflops) => Some(tflops * 1e12),
            // Another peak is another GPU: what the preset says of fp8 does not hold for it.
            None if self.tflops.is_some() => None,
            None => gpu.fp8_flops,
        };
        let rate = |given: Option<u64>, preset: f64| given.map_or(preset, |bytes| bytes as f64);
        gpu.memory_bandwidth = rate(self.memory_bandwidth, gpu.memory_bandwidth);
        gpu.node_link = rate(self.node_bandwidth, gpu.node_link);
        gpu.network = rate(self.link_bandwidth, gpu.network);
        Ok(Cluster { nodes: self.nodes, gpus: self.gpus, gpu })
    }
}

impl Job {
    fn work(&self) -> Work {
        let mode = match self.mode {
            Task::Score => Mode::Score,
            Task::Generate => Mode::Generate,
            Task::Both => Mode::Both,
        };
        Work {
            mode,
            rows: self.tokens.map_or(self.rows, |tokens| tokens.div_ceil(self.new_tokens.max(1))),
            prompt_tokens: self.prompt_tokens,
            new_tokens: self.new_tokens,
            shard_rows: self.shard_rows,
            micro_batch: self.micro_batch,
            sequences: self.sequences,
            price_per_gpu_hour: self.price_per_gpu_hour,
        }
    }

    fn format(&self) -> Format {
        match (self.dtype, self.fp8_layers) {
            (Dtype::Bf16, _) => Format::Bf16,
            (Dtype::Fp8, Fp8Layers::Mlp) => Format::Fp8Mlp,
            (Dtype::Fp8, Fp8Layers::All) => Format::Fp8,
            (Dtype::Int8, _) => Format::Int8,
        }
    }
}

impl Rates {
    fn assumptions(&self) -> Assumptions {
        Assumptions {
            compute_efficiency: self.efficiency,
            measured_flops: self.measured_tflops.map(|tflops| tflops * 1e12),
            bandwidth_efficiency: self.bandwidth_efficiency,
            link_efficiency: self.link_efficiency,
            memory_utilization: self.memory_utilization,
            hop_bandwidth: self.hop_bandwidth as f64,
            remote_scoring_cost: self.remote_scoring_cost,
            ..Assumptions::default()
        }
    }
}
