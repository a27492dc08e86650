//! One student: from the teacher's pruned layers, on one setting's targets, judged on the whole
//! vocabulary.

use std::{path::Path, time::Instant};

use retort_artifact::soft_targets::SparseTargets;
use retort_core::{
    random::{Counter, Purpose},
    spec::Train,
};
use retort_llama::Model;
use retort_student::{
    batch::Limits,
    example::Example,
    trainer::{Options, Trainer},
};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::{
    Failure,
    compare::decoded,
    corpus::{Answered, Corpus},
    settings,
    students::Student,
};

/// Name of the training on whole distributions, computed as a student beside its teacher would see them.
pub const ONLINE: &str = "online";

const PASSES: u32 = 1;
const BATCH_ROWS: usize = 4;

pub fn run(folder: &Path, student: &Student, setting: &str, seed: u64) -> Result<Value, Failure> {
    let corpus = Corpus::open(folder)?;
    let stored: Option<Vec<SparseTargets>> = match setting {
        ONLINE => None,
        name => {
            let setting = settings::all().into_iter().find(|setting| setting.name == name);
            Some(decoded(&corpus, &setting.ok_or("no such setting")?, seed)?.targets)
        }
    };
    let options = Train {
        learning_rate: student.learning_rate,
        freeze_embeddings: student.freeze_embeddings,
        ..Train::default()
    };
    let result = train(&corpus, student.start()?, stored, options, seed)?;
    eprintln!("{}, {setting}, seed {seed}: KL {} -> {} nats", student.name, result["kl_before"], result["kl"]);
    Ok(result)
}

/// One pass over the training rows' stored targets, or whole distributions.
pub fn train(
    corpus: &Corpus,
    start: Model,
    stored: Option<Vec<SparseTargets>>,
    train: Train,
    seed: u64,
) -> Result<Value, Failure> {
    // Indices among the corpus's rows.
    let rows: Vec<usize> = corpus.of(false).map(|(index, _)| index).collect();
    let steps = rows.len().div_ceil(BATCH_ROWS) as u32 * PASSES;
    let limits = Limits::of(&train, Device::Cpu);
    let mut trainer = Trainer::new(start, Options { train, steps, limits })?;
    let before = held_out_kl(corpus, trainer.model())?;
    let started = Instant::now();
    for pass in 0..PASSES {
        let mut order: Vec<u64> = (0..rows.len() as u64).collect();
        Counter::new(seed, Purpose::Shuffle, pass.into(), 0).shuffle(&mut order);
        for batch in order.chunks(BATCH_ROWS) {
            let example = |&at: &u64| {
                let row = &corpus.rows[rows[at as usize]];
                let targets = match &stored {
                    Some(stored) => stored[at as usize].clone(),
                    None => whole(corpus, rows[at as usize]),
                };
                example(row, targets)
            };
            let examples: Vec<Example> = batch.iter().map(example).collect();
            trainer.step(&examples, &|| Ok(()))?;
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    let progress = trainer.progress();
    let kl = held_out_kl(corpus, trainer.model())?;
    Ok(json!({
        "seed": seed, "kl_before": before, "kl": kl, "steps": progress.step, "processed_tokens": progress.processed_tokens,
        "target_tokens": progress.target_tokens, "seconds": seconds,
    }))
}

pub fn example(row: &Answered, support: SparseTargets) -> Example {
    let targets: Vec<u32> = (0u32..).zip(&row.target_mask).filter(|(_, target)| **target).map(|(at, _)| at).collect();
    let weights = vec![1.0; targets.len()];
    Example { token_ids: row.token_ids.clone(), targets, support, weights }
}

/// A row's whole distributions as a support of every token.
fn whole(corpus: &Corpus, index: usize) -> SparseTargets {
    let logprobs = corpus.logprobs(index);
    let positions = corpus.rows[index].targets();
    let vocab_size = corpus.vocab_size as u32;
    SparseTargets {
        offsets: (0..=positions as u32).map(|p| p * vocab_size).collect(),
        ids: (0..positions).flat_map(|_| 0..vocab_size).collect(),
        masses: logprobs.iter().map(|logprob| logprob.exp()).collect(),
        heads: vec![true; logprobs.len()],
        logprobs,
        residuals: vec![0.0; positions],
        top_ids: vec![0; positions],
        label_logprobs: vec![0.0; positions],
        log_sum_exps: vec![],
    }
}

/// The student's log-probabilities at a row's targets, `[n, v]`.
pub fn logprobs(model: &Model, row: &Answered) -> Result<Tensor, Failure> {
    let ids: Vec<i64> = row.token_ids.iter().map(|&id| id.into()).collect();
    let hidden_bth = model.hidden(&Tensor::from_slice(&ids).unsqueeze(0))?;
    let at: Vec<i64> = (0..).zip(&row.target_mask).filter(|(_, target)| **target).map(|(i, _)| i - 1).collect();
    let hidden_nh = hidden_bth.get(0).index_select(0, &Tensor::from_slice(&at));
    Ok(model.head(&hidden_nh)?.log_softmax(-1, Kind::Float))
}

/// Gradient of the forward KL to sparse targets with respect to the student's logits, `[n, v]`: the
/// obvious form of what the trainer's loss does in chunks.
pub fn logit_gradient(q_nv: &Tensor, targets: &SparseTargets) -> Tensor {
    let (n, v) = q_nv.size2().unwrap_or_default();
    let mut t_nv = vec![0f32; (n * v) as usize];
    let mut kept_nv = vec![0f32; (n * v) as usize];
    for p in 0..targets.len() {
        for e in targets.range(p) {
            t_nv[p * v as usize + targets.ids[e] as usize] = targets.masses[e];
            kept_nv[p * v as usize + targets.ids[e] as usize] = 1.0;
        }
    }
    let (t_nv, kept_nv) = (Tensor::from_slice(&t_nv).view([n, v]), Tensor::from_slice(&kept_nv).view([n, v]));
    let residual_n1 = Tensor::from_slice(&targets.residuals).view([n, 1]);
    // A bucket's mass follows the student's own distribution outside the support.
    let outside_nv: Tensor = q_nv * (1.0 - kept_nv);
    let whole_n1 = outside_nv.sum_dim_intlist([1i64].as_slice(), true, Kind::Float).clamp_min(1e-6);
    let t_nv = t_nv + outside_nv / whole_n1 * residual_n1;
    let weight_n1 = t_nv.sum_dim_intlist([1i64].as_slice(), true, Kind::Float);
    q_nv * weight_n1 - t_nv
}

/// Mean KL(teacher || student) over the whole vocabulary at the held-out targets, nats.
pub fn held_out_kl(corpus: &Corpus, model: &Model) -> Result<f64, Failure> {
    tch::no_grad(|| {
        let mut kl = 0.0;
        for (index, row) in corpus.of(true) {
            let (student_nv, teacher_nv) = (logprobs(model, row)?, corpus.tensor(index));
            kl += (teacher_nv.exp() * (&teacher_nv - student_nv)).sum(Kind::Double).double_value(&[]);
        }
        Ok(kl / corpus.targets(true) as f64)
    })
}
