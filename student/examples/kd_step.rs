//! Tokens a second and peak memory of distillation steps on sparse targets.
//!
//! ```text
//! kd_step                          24 M student, 4 x 512, 64 entries a position: what `make bench-student` times
//! kd_step --model DIR --layers 10  a pruned teacher, 8 rows of 40 to 60 prompt and 60 to 128 completion tokens
//! kd_step --lora 16 [--int8]       adapters alone, of either, on a base as it is or in bytes
//! ```
//!
//! Prints one JSON object. `peak_gb` is over the whole run; `peak_of_steps_gb` leaves out making the model, Linux
//! only. `planned_gb` is what a job's plan says of such a student on a CPU.

use std::{fs, path::PathBuf, time::Instant};

use clap::Parser;
use retort_artifact::soft_targets::SparseTargets;
use retort_core::{
    random::{Counter, Purpose},
    spec::{Lora, LoraBase, Train},
};
use retort_llama::{Architecture, Config, Model};
use retort_plan::training::{Dtype, Student};
use retort_student::{
    batch::Limits,
    example::Example,
    kept_layers,
    trainer::{Options, Trainer},
};
use serde_json::json;
use tch::{Device, Kind};

#[derive(Parser)]
struct Args {
    /// Prune this Hugging Face folder instead of making random weights
    #[arg(long)]
    model: Option<PathBuf>,
    #[arg(long, default_value_t = 10)]
    layers: usize,
    /// Entries a soft target
    #[arg(long, default_value_t = 64)]
    k: usize,
    #[arg(long, default_value_t = 6)]
    steps: u32,
    /// Of the random student
    #[arg(long, default_value_t = 49_152)]
    vocab: i64,
    /// Rows a step, of the random student
    #[arg(long, default_value_t = 4)]
    batch: usize,
    /// Tokens a row, of the random student
    #[arg(long, default_value_t = 512)]
    length: usize,
    #[arg(long)]
    threads: Option<i32>,
    /// As `train.micro_batch_tokens` of a spec
    #[arg(long)]
    micro_batch_tokens: Option<u32>,
    #[arg(long)]
    bf16: bool,
    /// Rank of adapters, which alone train
    #[arg(long)]
    lora: Option<u32>,
    /// The adapters' base in bytes
    #[arg(long, requires = "lora")]
    int8: bool,
    /// Share of the adapters' inputs dropped
    #[arg(long, default_value_t = 0.0)]
    dropout: f64,
    #[arg(long)]
    activation_checkpointing: bool,
    /// The embeddings and the head stay as they are
    #[arg(long, conflicts_with = "lora")]
    freeze_embeddings: bool,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    retort_process::keep_freed_memory();
    let args = Args::parse();
    if let Some(threads) = args.threads {
        tch::set_num_threads(threads);
    }
    let kind = if args.bf16 { Kind::BFloat16 } else { Kind::Float };
    let (model, rows): (Model, Vec<(usize, usize)>) = match &args.model {
        Some(folder) => {
            let teacher = Model::load(folder, Device::Cpu, kind)?;
            let kept = kept_layers(teacher.config().num_hidden_layers as usize, args.layers);
            (teacher.prune_layers(&kept)?, (0..8).map(|i| (40 + 7 * i % 20, 60 + 23 * i % 69)).collect())
        }
        None => {
            let rows = vec![(1, args.length); args.batch];
            (Model::init(peer_shape(args.vocab), Device::Cpu, kind, 0)?, rows)
        }
    };
    let base = if args.int8 { LoraBase::Int8 } else { LoraBase::Model };
    let lora = args.lora.map(|rank| Lora { rank, base, dropout: args.dropout, ..Lora::default() });
    let model = match &lora {
        Some(lora) => model.adapt(lora, 0)?,
        None => model,
    };
    let vocab_size = u32::try_from(model.config().vocab_size)?;
    let parameters = model.config().parameters();
    let train = Train {
        batch_rows: u32::try_from(rows.len())?,
        micro_batch_tokens: args.micro_batch_tokens,
        activation_checkpointing: args.activation_checkpointing,
        freeze_embeddings: args.freeze_embeddings,
        ..Train::default()
    };
    let limits = Limits::of(&train, Device::Cpu);
    let longest_row = rows.iter().map(|(prompt, completion)| (prompt + completion) as u64).max().unwrap_or(0);
    let planned = Student { config: model.config(), lora: lora.as_ref(), train: &train, longest_row }
        .on(retort_plan::training::Device::Cpu, if args.bf16 { Dtype::Bf16 } else { Dtype::F32 });
    // The kernel forgets the highest size so far; where it cannot, both figures are the same.
    let peak_of_making = peak_gb();
    let _ = fs::write("/proc/self/clear_refs", "5");
    let mut trainer = Trainer::new(model, Options { train, steps: args.steps, limits })?;
    let mut rates = Vec::new();
    for step in 0..args.steps {
        let batch: Vec<Example> = (0u64..)
            .zip(&rows)
            .map(|(row, &(prompt, completion))| {
                example(u64::from(step) << 8 | row, prompt, completion, args.k, vocab_size)
            })
            .collect();
        let started = Instant::now();
        let report = trainer.step(&batch, &|| Ok(()))?;
        rates.push(report.tokens as f64 / started.elapsed().as_secs_f64());
    }
    // The first step warms memory up.
    let warm = &mut rates[1..];
    warm.sort_by(f64::total_cmp);
    println!(
        "{}",
        json!({
            "peer": "retort",
            "work": format!("KD step k={} {}", args.k, if args.bf16 { "bf16" } else { "fp32" }),
            "params_m": (parameters as f64 / 1e5).round() / 10.0,
            "tokens_per_s": (warm[warm.len() / 2] * 10.0).round() / 10.0,
            "trainable_m": (trainer.trainable() as f64 / 1e5).round() / 10.0,
            "peak_gb": peak_of_making.zip(peak_gb()).map(|(making, steps)| making.max(steps)),
            "peak_of_steps_gb": peak_gb(),
            "planned_gb": (planned.memory.total as f64 / 1e7).round() / 100.0,
        })
    );
    Ok(())
}

/// The student of the PyTorch script that this is held against.
fn peer_shape(vocab_size: i64) -> Config {
    Config {
        architecture: Architecture::Llama,
        hidden_size: 320,
        intermediate_size: 864,
        num_hidden_layers: 8,
        num_attention_heads: 5,
        num_key_value_heads: 1,
        head_dim: 64,
        vocab_size,
        rms_norm_eps: 1e-6,
        rope_theta: 1e5,
        rope_scaling: None,
        max_position_embeddings: 2048,
        tie_word_embeddings: true,
        qkv_bias: false,
        output_bias: false,
        mlp_bias: false,
        sliding_window: None,
        initializer_range: 0.02,
        bos_token_id: None,
        eos_token_ids: Vec::new(),
        pad_token_id: None,
    }
}

fn example(seed: u64, prompt: usize, completion: usize, k: usize, vocab_size: u32) -> Example {
    let mut random = Counter::new(seed, Purpose::Sample, 0, 0);
    let length = prompt + completion;
    let mut support = SparseTargets { offsets: vec![0], ..SparseTargets::default() };
    let token_ids = (0..length).map(|_| random.below(vocab_size.into()) as u32).collect();
    for _ in 0..completion {
        let mut ids: Vec<u32> = (0..k).map(|_| random.below(vocab_size.into()) as u32).collect();
        ids.sort_unstable();
        ids.dedup();
        let mass = 1.0 / ids.len() as f32;
        support.masses.extend(ids.iter().map(|_| mass));
        support.heads.extend(ids.iter().map(|_| true));
        support.logprobs.extend(ids.iter().map(|_| mass.ln()));
        support.top_ids.push(ids[0]);
        support.label_logprobs.push(-1.0);
        support.residuals.push(0.0);
        support.ids.extend(ids);
        support.offsets.push(support.ids.len() as u32);
    }
    let weights = vec![1.0; length - prompt];
    Example { token_ids, targets: (prompt as u32..length as u32).collect(), support, weights }
}

/// Highest resident size so far; Linux only.
fn peak_gb() -> Option<f64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kilobytes: f64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some((kilobytes / 1e4).round() / 100.0)
}
