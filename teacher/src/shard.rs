//! One shard, from rows to the bytes that are published.

use std::{ops::Range, path::PathBuf, sync::Arc, time::Instant};

use rayon::prelude::*;
use retort_artifact::{
    prompts::Row,
    soft_targets::{self, Encoded, Header, SCHEMA_VERSION, Sequence, TailLogprobs},
};
use retort_core::{
    Code, Error, Result,
    spec::{HELD_OUT_CODEC, JobSpec, SoftTargets, TeacherMode},
    state::Split,
    wire::split_from_proto,
};
use retort_proto::ShardTask;
use retort_worker::Attempt;

use crate::{
    capture::Capture,
    engine::{Capabilities, Engine, Generation, Text, Watch},
    sampling::Sampler,
    text,
    work::work_sha256,
};

/// Everything a shard's content depends on, besides the teacher.
#[derive(Clone, Debug)]
pub struct Order {
    pub job: String,
    pub epoch: u64,
    pub shard: u32,
    pub split: Split,
    pub spec: JobSpec,
    pub prompt_set_sha256: String,
    pub rows: Arc<Vec<Row>>,
    /// Lines of `rows` that make the shard.
    pub lines: Range<usize>,
}

impl Order {
    /// Refuses a range outside the prompt set, and a held-out row in a training shard.
    pub fn new(attempt: &Attempt, shard: &ShardTask, rows: Arc<Vec<Row>>) -> Result<Self> {
        let split = split_from_proto(shard.split)
            .ok_or_else(|| Error::new(Code::RequestInvalid, format!("shard {} has no split", shard.shard)))?;
        let lines = usize::try_from(shard.first_row)
            .ok()
            .and_then(|first| Some(first..first.checked_add(shard.rows as usize)?))
            .filter(|lines| !lines.is_empty() && lines.end <= rows.len())
            .ok_or_else(|| {
                Error::new(
                    Code::RequestInvalid,
                    format!(
                        "shard {} asks for {} rows from {} on, and the prompt set has {}",
                        shard.shard,
                        shard.rows,
                        shard.first_row,
                        rows.len()
                    ),
                )
            })?;
        if let Some(row) = rows[lines.clone()].iter().find(|row| row.split.is_some_and(|of| of != split)) {
            return Err(Error::new(
                Code::RequestInvalid,
                format!("shard {} is of the {split} rows, and row {:?} is not one of them", shard.shard, row.id),
            ));
        }
        Ok(Self {
            job: attempt.job.to_string(),
            epoch: attempt.epoch,
            shard: shard.shard,
            split,
            spec: attempt.spec.clone(),
            prompt_set_sha256: attempt.claimed.prompt_set_sha256.clone(),
            rows,
            lines,
        })
    }

    /// The teacher's folder: `spec.teacher.model` without its `file://`.
    pub fn teacher_dir(&self) -> Result<PathBuf> {
        let model = &self.spec.teacher.model;
        match model.strip_prefix("file://") {
            Some(path) if path.starts_with('/') => Ok(PathBuf::from(path)),
            None if !model.contains("://") => Ok(PathBuf::from(model)),
            _ => Err(Error::new(
                Code::SpecInvalid,
                format!("teacher.model is {model:?}; this worker reads an absolute path or file:///path"),
            )),
        }
    }

    /// What is kept of each distribution.
    pub fn soft_targets(&self) -> SoftTargets {
        match self.split {
            Split::Train => self.spec.teacher.soft_targets.clone(),
            Split::HeldOut => SoftTargets::of(HELD_OUT_CODEC),
        }
    }

    /// Sequences that each row becomes.
    pub fn completions(&self) -> u32 {
        match self.split {
            Split::Train => self.spec.teacher.completions(),
            Split::HeldOut => 1,
        }
    }

    fn capture(&self) -> Capture {
        let SoftTargets { codec, temperatures, .. } = self.soft_targets();
        Capture { codec, temperatures, seed: self.spec.seed }
    }

    /// Held-out shards judge single positions, and another temperature weighs each sample by its
    /// probability; a training loss at temperature 1 needs neither.
    fn tail_logprobs(&self, soft_targets: &SoftTargets) -> TailLogprobs {
        if self.split == Split::HeldOut || !soft_targets.temperatures.is_empty() {
            TailLogprobs::Stored
        } else {
            TailLogprobs::Mean(0.0)
        }
    }

    /// What the shard says of itself.
    pub fn header(&self, engine: &Capabilities) -> Result<Header> {
        let sampling = &self.spec.teacher.sampling;
        let soft_targets = self.soft_targets();
        Ok(Header {
            schema_version: SCHEMA_VERSION,
            job: self.job.clone(),
            shard: self.shard,
            epoch: self.epoch,
            work_sha256: work_sha256(self, engine)?,
            split: self.split.as_str().to_owned(),
            engine: engine.engine.to_owned(),
            engine_version: engine.engine_version.to_owned(),
            dtype: engine.dtype.to_owned(),
            teacher_sha256: engine.teacher_sha256.clone(),
            tokenizer_sha256: engine.tokenizer_sha256.clone(),
            chat_template_sha256: engine.chat_template_sha256.clone(),
            vocab_size: engine.vocab_size,
            tail_logprobs: self.tail_logprobs(&soft_targets),
            soft_targets,
            seed: self.spec.seed,
            prompt_set_sha256: self.prompt_set_sha256.clone(),
            mode: match self.spec.teacher.mode {
                TeacherMode::Generate => "generate",
                TeacherMode::Score => "score",
            }
            .to_owned(),
            sampling_json: serde_json::to_string(sampling)
                .map_err(|error| Error::internal(format!("sampling parameters to JSON: {error}")))?,
        })
    }
}

/// What a teacher said of a shard's rows, not yet encoded.
pub struct Captured {
    header: Header,
    sequences: Vec<Sequence>,
}

impl Captured {
    /// Of the weights that said it.
    pub fn teacher_sha256(&self) -> &str {
        &self.header.teacher_sha256
    }

    /// The same order and teacher give the same bytes.
    pub fn encode(&self) -> Result<Encoded> {
        soft_targets::encode(&self.header, &self.sequences)
    }
}

/// Computes a shard.
///
/// Every row is rendered and measured before the first is computed, so a row that does not fit is
/// refused (prompt-too-long) before it costs anything. Whether the stored numbers are what the teacher
/// said, [`faithful`] tells.
pub fn capture(engine: &mut dyn Engine, order: &Order, watch: Watch) -> Result<Captured> {
    let able = engine.capabilities().clone();
    let capture = order.capture();
    let sampling = &order.spec.teacher.sampling;
    let generate = order.spec.teacher.mode == TeacherMode::Generate;
    able.check(generate, &capture)?;

    let started = Instant::now();
    let (tokenizer, end_tokens) = (engine.tokenizer(), engine.end_tokens());
    let texts: Vec<Result<Text>> = order
        .lines
        .clone()
        .into_par_iter()
        .map(|line| {
            let row = &order.rows[line];
            if generate {
                text::prompt(tokenizer, able.context, sampling.max_new_tokens, line as u64, row)
            } else {
                text::completed(tokenizer, end_tokens, able.context, line as u64, row)
            }
        })
        .collect();
    // Of several that do not fit, the first is named.
    let texts = texts.into_iter().collect::<Result<Vec<_>>>()?;
    tracing::debug!(rows = texts.len(), seconds = started.elapsed().as_secs_f64(), "rows tokenised");
    let sequences = if generate {
        let how = Generation {
            sampler: Sampler {
                temperature: sampling.temperature,
                top_p: sampling.top_p,
                top_k: sampling.top_k,
                min_p: sampling.min_p,
                repetition_penalty: sampling.repetition_penalty,
                seed: order.spec.seed,
            },
            max_new_tokens: sampling.max_new_tokens,
            completions: order.completions(),
            stop: sampling.stop.clone(),
        };
        engine.generate(&texts, &how, &capture, watch)?
    } else {
        engine.score(&texts, &capture, watch)?
    };
    Ok(Captured { header: order.header(&able)?, sequences })
}

/// Mean error of a stored log-probability above which a shard is not what the teacher said, nats.
const MAX_MEAN_ERROR: f64 = soft_targets::QUANTISER_MAX_ERROR as f64;
/// Mean KL that rounding may cost, nats a position.
const MAX_KL: f64 = 0.01;

/// Refuses (shard-unfaithful) a shard whose stored numbers are not the teacher's.
pub fn faithful(order: &Order, encoded: &Encoded) -> Result<()> {
    let fidelity = &encoded.fidelity;
    // The first place is marked, so no rounding changes it.
    let sound = fidelity.mean_abs_error <= MAX_MEAN_ERROR && fidelity.kl <= MAX_KL && fidelity.argmax_agreement == 1.0;
    if sound || encoded.target_tokens == 0 {
        return Ok(());
    }
    Err(Error::new(
        Code::ShardUnfaithful,
        format!(
            "shard {} reads back with a mean error of {:.4} nats (at most {MAX_MEAN_ERROR:.4}), a KL of {:.5} (at most {MAX_KL}) and {:.4} of the first places kept (all must be); it is not published",
            order.shard, fidelity.mean_abs_error, fidelity.kl, fidelity.argmax_agreement
        ),
    ))
}
