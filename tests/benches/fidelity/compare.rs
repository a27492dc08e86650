//! What a setting costs and keeps, against the whole distribution.

use retort_artifact::soft_targets::{
    Header, Limits, SCHEMA_VERSION, Sequence, SparseTargets, TailLogprobs, decode, encode,
};
use retort_core::spec::{Codec, SoftTargets};
use retort_teacher::capture::{Capture, Target};
use serde_json::{Value, json};
use tch::Kind;

use crate::{
    Failure,
    corpus::{Answered, Corpus},
    settings::{How, Setting},
    students::Student,
    training,
};

/// Rows a shard: the product's default, so that a file's own metadata weighs as it does there.
const SHARD_ROWS: usize = 16;
/// Where metadata weighs little: about 2,400 targets, what the default makes of longer answers.
const LARGE_SHARD_ROWS: usize = 64;
/// Captures with different seeds, for the gradient's bias and variance.
const CAPTURES: u64 = 16;
/// Of the held-out targets, one in so many is looked at for it.
const EVERY: usize = 4;
/// Whose gradient it is.
const GRADIENT_OF: &str = "4-layers";

/// The training rows of a setting as a student reads them, and the bytes they took. The first shard
/// stays in the folder, for `retort shard show`.
pub struct Decoded {
    pub targets: Vec<SparseTargets>,
    pub bytes: f64,
}

pub fn decoded(corpus: &Corpus, setting: &Setting, seed: u64) -> Result<Decoded, Failure> {
    in_shards(corpus, setting, seed, SHARD_ROWS)
}

fn in_shards(corpus: &Corpus, setting: &Setting, seed: u64, shard_rows: usize) -> Result<Decoded, Failure> {
    let rows: Vec<usize> = corpus.of(false).map(|(index, _)| index).collect();
    let mut decoded = Decoded { targets: Vec::new(), bytes: 0.0 };
    match &setting.how {
        How::Ours(soft_targets) => {
            for (shard, rows) in rows.chunks(shard_rows).enumerate() {
                let sequences = rows.iter().map(|&index| captured(corpus, index, soft_targets, seed));
                let sequences = sequences.collect::<Result<Vec<_>, _>>()?;
                let header = header(corpus, soft_targets, shard as u32, seed);
                let encoded = encode(&header, &sequences)?;
                if shard == 0 && seed == 0 && shard_rows == SHARD_ROWS {
                    std::fs::write(corpus.folder.join(format!("{}.parquet", setting.name)), &encoded.bytes)?;
                }
                decoded.bytes += encoded.bytes.len() as f64;
                let shard = decode(encoded.bytes, Limits::default())?;
                decoded.targets.extend(shard.sequences.into_iter().map(|sequence| sequence.targets));
            }
        }
        How::DistillKit(how) => {
            for &index in &rows {
                decoded.bytes += (how.bytes(corpus.vocab_size) * corpus.rows[index].targets()) as f64;
                decoded.targets.push(read_by(corpus, index, &setting.how, seed)?);
            }
        }
    }
    Ok(decoded)
}

pub fn header(corpus: &Corpus, soft_targets: &SoftTargets, shard: u32, seed: u64) -> Header {
    let sha256 = || "0".repeat(64);
    Header {
        schema_version: SCHEMA_VERSION,
        job: "0".repeat(32),
        shard,
        epoch: 1,
        work_sha256: sha256(),
        split: "train".to_owned(),
        engine: "native".to_owned(),
        engine_version: env!("CARGO_PKG_VERSION").to_owned(),
        dtype: "f32".to_owned(),
        teacher_sha256: sha256(),
        tokenizer_sha256: sha256(),
        chat_template_sha256: sha256(),
        vocab_size: corpus.vocab_size as u32,
        soft_targets: soft_targets.clone(),
        tail_logprobs: TailLogprobs::Mean(0.0),
        seed,
        prompt_set_sha256: sha256(),
        mode: "generate".to_owned(),
        sampling_json: r#"{"temperature":0.7,"top_p":0.95,"max_new_tokens":40}"#.to_owned(),
    }
}

/// A row as the teacher hands it over.
pub fn captured(corpus: &Corpus, index: usize, soft_targets: &SoftTargets, seed: u64) -> Result<Sequence, Failure> {
    let row = &corpus.rows[index];
    let capture = Capture { codec: soft_targets.codec, temperatures: vec![], seed };
    let targets: Vec<Target> = labels(row)
        .into_iter()
        .map(|(position, token)| Target { row: row.row, position: position as u64, token })
        .collect();
    Ok(Sequence {
        row_id: row.row_id.clone(),
        row: row.row,
        tags: vec![],
        token_ids: row.token_ids.clone(),
        target_mask: row.target_mask.clone(),
        finish_reason: "stop".to_owned(),
        positions: capture.positions(&corpus.tensor(index), &targets)?,
    })
}

/// Place and token of each target.
fn labels(row: &Answered) -> Vec<(usize, u32)> {
    let targets = row.target_mask.iter().zip(&row.token_ids).enumerate().filter(|(_, (target, _))| **target);
    targets.map(|(position, (_, &token))| (position, token)).collect()
}

/// One row as a reader gets it.
fn read_by(corpus: &Corpus, index: usize, how: &How, seed: u64) -> Result<SparseTargets, Failure> {
    match how {
        How::Ours(soft_targets) => {
            let sequence = captured(corpus, index, soft_targets, seed)?;
            let encoded = encode(&header(corpus, soft_targets, 0, seed), &[sequence])?;
            let mut shard = decode(encoded.bytes, Limits::default())?;
            Ok(shard.sequences.remove(0).targets)
        }
        How::DistillKit(how) => {
            let positions = corpus.logprobs(index);
            let labels: Vec<u32> = labels(&corpus.rows[index]).into_iter().map(|(_, token)| token).collect();
            Ok(how.decode(positions.chunks(corpus.vocab_size).map(<[f32]>::to_vec), &labels))
        }
    }
}

pub fn run(corpus: &Corpus, setting: &Setting) -> Result<Value, Failure> {
    let stored = decoded(corpus, setting, 0)?;
    let targets = corpus.targets(false) as f64;
    let entries: usize = stored.targets.iter().map(|targets| targets.ids.len()).sum();
    let mut sums = Sums::default();
    for (index, _) in corpus.of(true) {
        let read = read_by(corpus, index, &setting.how, 0)?;
        sums.add(&corpus.logprobs(index), corpus.vocab_size, &read);
    }
    sums.errors.sort_by(f64::total_cmp);
    let percentile = |share: f64| sums.errors.get(((sums.errors.len() as f64 - 1.0) * share) as usize).copied();
    let positions = sums.positions as f64;
    let (bias, variance) = gradient(corpus, setting)?;
    // Nobody may decode so many entries in one piece as whole distributions have there.
    let large = match &setting.how {
        How::Ours(SoftTargets { codec: Codec::Full, .. }) => None,
        _ => Some(in_shards(corpus, setting, 0, LARGE_SHARD_ROWS)?.bytes / targets),
    };
    Ok(json!({
        "name": setting.name,
        "bytes_per_token": stored.bytes / targets,
        "bytes_per_token_large": large,
        "entries": entries as f64 / targets,
        "mass_kept": sums.mass / positions,
        "reconstruction_kl": sums.kl / positions,
        "mean_error": sums.errors.iter().sum::<f64>() / sums.errors.len().max(1) as f64,
        "error_p50": percentile(0.5), "error_p99": percentile(0.99), "error_max": percentile(1.0),
        "argmax_agreement": sums.argmax as f64 / positions,
        "gradient_bias": bias,
        "gradient_variance": variance,
    }))
}

/// Sums over held-out positions.
#[derive(Default)]
struct Sums {
    positions: usize,
    mass: f64,
    kl: f64,
    argmax: usize,
    /// Of each log-probability that is kept exactly, nats.
    errors: Vec<f64>,
}

impl Sums {
    fn add(&mut self, logprobs: &[f32], vocab_size: usize, read: &SparseTargets) {
        for (p, truth) in logprobs.chunks(vocab_size).enumerate() {
            let mut kept = vec![false; vocab_size];
            let (mut mass, mut read_mass, mut kl) = (0.0, 0.0, 0.0);
            // A sample's mass is no estimate of its own probability.
            for e in read.range(p).filter(|&e| read.heads[e]) {
                let id = read.ids[e] as usize;
                let (logprob, found) = (f64::from(truth[id]), f64::from(read.logprobs[e]));
                kept[id] = true;
                mass += logprob.exp();
                read_mass += found.exp();
                kl += logprob.exp() * (logprob - found);
                self.errors.push((logprob - found).abs());
            }
            // What is not kept is taken to be spread evenly.
            let others = kept.iter().filter(|kept| !**kept).count().max(1) as f64;
            let even = ((1.0 - read_mass).max(1e-6) / others).ln();
            let rest = truth.iter().zip(&kept).filter(|(_, kept)| !**kept);
            kl += rest.map(|(&logprob, _)| f64::from(logprob).exp() * (f64::from(logprob) - even)).sum::<f64>();
            let top =
                (0..vocab_size as u32).max_by(|&a, &b| truth[a as usize].total_cmp(&truth[b as usize]).then(b.cmp(&a)));
            self.argmax += usize::from(top == Some(read.top_ids[p]));
            self.mass += mass;
            self.kl += kl;
            self.positions += 1;
        }
    }
}

/// Bias and variance of the loss's gradient with respect to the student's logits against that of the
/// whole distribution: the norm of the mean difference, and the mean square around it, both relative to
/// the true gradient's norm and its square. The student is the one that trainings start from.
fn gradient(corpus: &Corpus, setting: &Setting) -> Result<(f64, f64), Failure> {
    let student = Student::named(GRADIENT_OF)?.start()?;
    let sampled = match &setting.how {
        How::Ours(soft_targets) => soft_targets.codec.max_draws() > 0,
        How::DistillKit(_) => false,
    };
    let captures = if sampled { CAPTURES } else { 1 };
    let (mut bias, mut variance, mut norm) = (0.0, 0.0, 0.0);
    for (index, row) in corpus.of(true).step_by(EVERY) {
        let q_nv = tch::no_grad(|| training::logprobs(&student, row))?.exp();
        let p_nv = corpus.tensor(index).exp();
        let true_nv = &q_nv - &p_nv;
        let mut sum_nv = true_nv.zeros_like();
        let mut squares = 0.0;
        for seed in 0..captures {
            let read = read_by(corpus, index, &setting.how, seed)?;
            let difference_nv = training::logit_gradient(&q_nv, &read) - &true_nv;
            squares += difference_nv.square().sum(Kind::Double).double_value(&[]);
            sum_nv += difference_nv;
        }
        let n = captures as f64;
        let mean_square = (sum_nv / n).square().sum(Kind::Double).double_value(&[]);
        // The mean of n differences still has a share of the variance in its square.
        let around = if sampled { (squares / n - mean_square) * n / (n - 1.0) } else { 0.0 };
        bias += mean_square - around / n;
        variance += around;
        norm += true_nv.square().sum(Kind::Double).double_value(&[]);
    }
    Ok(((bias.max(0.0) / norm).sqrt(), variance / norm))
}
