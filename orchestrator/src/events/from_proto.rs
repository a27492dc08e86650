//! `retort.v1.WorkerEvent` -> [`Event`], refusing what no worker of ours would write.

use std::collections::{BTreeMap, HashMap};

use retort_artifact::{checkpoint::HeldOut, paths};
use retort_core::{
    Code, Error, Result,
    id::{JobId, TaskId},
    wire::pruning_from_proto,
};
use retort_proto::{self as proto, worker_event};

use crate::{
    database::{
        jobs::Step,
        shards::{Fidelity, Measured, Published},
    },
    report::{Evaluation, Quality, Sample, TrainFinish},
};

/// Tags judged apart, and samples kept, at most.
const MAX_TAGS: usize = 1000;
const MAX_SAMPLES: usize = 100;
/// Points of a held-out curve that are kept, at most.
const MAX_CURVE: usize = 1000;
/// Characters kept of each text that ends in the report.
const MAX_TEXT: usize = 20_000;

pub struct Event {
    pub id: String,
    pub job: JobId,
    pub task: TaskId,
    pub epoch: u64,
    pub what: What,
}

pub enum What {
    ShardReady { published: Published, measured: Measured },
    ShardProgress { target_tokens: u64, seconds: f64 },
    TaskFailed { code: String, message: String, retryable: bool },
    TrainProgress(Step),
    CheckpointWritten { step: u32, key: String, held_out: Option<HeldOut> },
    TrainFinished(TrainFinish),
    EvaluationReady(Evaluation),
}

impl TryFrom<&proto::WorkerEvent> for Event {
    type Error = Error;

    fn try_from(event: &proto::WorkerEvent) -> Result<Self> {
        if event.event_id.is_empty() || event.event_id.len() > 128 {
            return Err(malformed("event_id must have 1 to 128 bytes"));
        }
        let job: JobId = event.job_id.parse()?;
        let task: TaskId = event.task_id.parse()?;
        if !task.as_str().starts_with(job.as_str()) {
            return Err(malformed("task_id names a task of another job"));
        }
        if event.epoch == 0 || i64::try_from(event.epoch).is_err() {
            return Err(malformed(&format!("epoch is {}; attempts count from 1", event.epoch)));
        }
        let time_ms = event
            .time
            .as_ref()
            .map_or(0, |time| time.seconds.saturating_mul(1000).saturating_add(i64::from(time.nanos) / 1_000_000));
        let what =
            event.what.as_ref().ok_or_else(|| malformed("what is missing: is the worker newer than this program?"))?;
        let what = what_from_proto(&job, &task, event.epoch, time_ms, what)?;
        Ok(Self { id: event.event_id.clone(), job, task, epoch: event.epoch, what })
    }
}

fn what_from_proto(job: &JobId, task: &TaskId, epoch: u64, time_ms: i64, what: &worker_event::What) -> Result<What> {
    Ok(match what {
        worker_event::What::ShardReady(ready) => {
            let shard = shard_index(task)?;
            let optional = |field, text: &str| if text.is_empty() { Ok(None) } else { sha256(field, text).map(Some) };
            let work_sha256 = optional("shard_ready.work_sha256", &ready.work_sha256)?;
            shard_key(job, shard, epoch, ready, work_sha256.is_some())?;
            What::ShardReady {
                published: Published {
                    shard,
                    epoch,
                    key: ready.key.clone(),
                    sha256: sha256("shard_ready.sha256", &ready.sha256)?,
                    bytes: bounded("shard_ready.bytes", ready.bytes)?,
                    rows: bounded("shard_ready.rows", ready.rows)?,
                    target_tokens: bounded("shard_ready.target_tokens", ready.target_tokens)?,
                    work_sha256,
                    reused: ready.reused,
                    teacher_sha256: optional("shard_ready.teacher_sha256", &ready.teacher_sha256)?,
                },
                measured: Measured {
                    seconds: not_negative(ready.seconds),
                    fidelity: ready.fidelity.as_ref().map(fidelity).unwrap_or_default(),
                    publish_ms: time_ms,
                },
            }
        }
        worker_event::What::ShardProgress(progress) => What::ShardProgress {
            target_tokens: bounded("shard_progress.target_tokens", progress.target_tokens)?,
            seconds: not_negative(progress.seconds),
        },
        worker_event::What::TaskFailed(failed) => {
            let error = failed.error.clone().unwrap_or_default();
            let code = if error.code.is_empty() { Code::Internal.as_str().to_owned() } else { cut(&error.code, 64) };
            let message = if error.message.is_empty() {
                "the worker gave no reason".to_owned()
            } else {
                cut(&error.message, 4000)
            };
            What::TaskFailed { code, message, retryable: failed.retryable }
        }
        worker_event::What::TrainProgress(progress) => What::TrainProgress(Step {
            step: progress.step,
            loss: progress.loss,
            tokens_per_second: progress.tokens_per_second,
            processed_tokens: bounded("train_progress.processed_tokens", progress.processed_tokens)?,
            held_out_kl: progress.held_out_kl,
        }),
        worker_event::What::CheckpointWritten(written) => What::CheckpointWritten {
            step: written.step,
            key: own_prefix(job, "checkpoint_written.key", &written.key)?,
            held_out: written.held_out.as_ref().and_then(held_out),
        },
        worker_event::What::TrainFinished(finished) => What::TrainFinished(TrainFinish {
            steps: finished.steps,
            checkpoint_key: own_prefix(job, "train_finished.checkpoint_key", &finished.checkpoint_key)?,
            initial_key: own_prefix(job, "train_finished.initial_key", &finished.initial_key)?,
            processed_tokens: bounded("train_finished.processed_tokens", finished.processed_tokens)?,
            target_tokens: bounded("train_finished.target_tokens", finished.target_tokens)?,
            trained_parameters: bounded("train_finished.trained_parameters", finished.trained_parameters)?,
            workers: finished.workers,
            left_out_steps: finished.left_out_steps,
            seconds: not_negative(finished.seconds),
            tokens_per_second: finished.tokens_per_second,
            final_loss: finished.final_loss,
            pruning: finished.pruning.as_ref().map(pruning_from_proto).transpose()?,
            curve: finished.curve.iter().filter_map(held_out).take(MAX_CURVE).collect(),
        }),
        worker_event::What::EvaluationReady(ready) => What::EvaluationReady(Evaluation {
            before: quality("evaluation_ready.before", ready.before.as_ref())?,
            after: quality("evaluation_ready.after", ready.after.as_ref())?,
            before_by_tag: by_tag("evaluation_ready.before_by_tag", &ready.before_by_tag)?,
            after_by_tag: by_tag("evaluation_ready.after_by_tag", &ready.after_by_tag)?,
            samples: ready.samples.iter().take(MAX_SAMPLES).map(sample).collect(),
        }),
    })
}

fn quality(field: &str, quality: Option<&proto::Quality>) -> Result<Quality> {
    let quality = quality.ok_or_else(|| malformed(&format!("{field} is missing")))?;
    Ok(Quality {
        kl: quality.kl,
        top1_agreement: quality.top1_agreement,
        student_perplexity: quality.student_perplexity,
        teacher_perplexity: quality.teacher_perplexity,
        tokens: bounded(field, quality.tokens)?,
        calibration_error: quality.calibration_error.filter(|error| error.is_finite()),
        teacher_calibration_error: quality.teacher_calibration_error.filter(|error| error.is_finite()),
    })
}

fn by_tag(field: &str, tags: &HashMap<String, proto::Quality>) -> Result<BTreeMap<String, Quality>> {
    if tags.len() > MAX_TAGS {
        return Err(malformed(&format!("{field} has {} tags; at most {MAX_TAGS} are judged apart", tags.len())));
    }
    tags.iter().map(|(tag, value)| Ok((cut(tag, 200), quality(field, Some(value))?))).collect()
}

/// None where it says nothing.
fn held_out(point: &proto::CurvePoint) -> Option<HeldOut> {
    let &proto::CurvePoint { step, target_tokens, kl, top1_agreement, calibration_error, tokens } = point;
    Some(HeldOut { step, target_tokens, kl, top1_agreement, calibration_error, tokens }).filter(HeldOut::is_sound)
}

fn sample(sample: &proto::Sample) -> Sample {
    Sample {
        row_id: cut(&sample.row_id, 200),
        prompt: cut(&sample.prompt, MAX_TEXT),
        teacher: cut(&sample.teacher, MAX_TEXT),
        student_before: cut(&sample.student_before, MAX_TEXT),
        student_after: cut(&sample.student_after, MAX_TEXT),
    }
}

/// An attempt writes under its own key. A reused shard lies at the key of some job's shard; whether it
/// is published there, the database knows.
fn shard_key(job: &JobId, shard: u32, epoch: u64, ready: &proto::ShardReady, has_work: bool) -> Result<()> {
    let shown = cut(&ready.key, 200);
    if !ready.reused {
        let expected = paths::shard(job.as_str(), shard, epoch);
        return if ready.key == expected {
            Ok(())
        } else {
            Err(malformed(&format!("shard_ready.key is {shown:?}, not {expected:?}")))
        };
    }
    if !has_work {
        return Err(malformed("shard_ready is reused and does not say of which work_sha256"));
    }
    match paths::parse_shard(&ready.key) {
        Some((owner, ..)) if owner.parse::<JobId>().is_ok() => Ok(()),
        _ => Err(malformed(&format!("shard_ready.key is {shown:?}, which is no shard's"))),
    }
}

fn fidelity(fidelity: &proto::Fidelity) -> Fidelity {
    Fidelity {
        head_mass: Some(fidelity.head_mass),
        mean_abs_error: Some(fidelity.mean_abs_error),
        argmax_agreement: Some(fidelity.argmax_agreement),
        kl: Some(fidelity.kl),
    }
}

fn sha256(field: &str, text: &str) -> Result<String> {
    if is_sha256(text) {
        Ok(text.to_ascii_lowercase())
    } else {
        Err(malformed(&format!("{field} is {:?}, not 64 hexadecimal digits", cut(text, 80))))
    }
}

/// Whether this is a SHA-256 in hexadecimal.
pub(crate) fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn shard_index(task: &TaskId) -> Result<u32> {
    task.short()
        .strip_prefix("shard-")
        .and_then(|index| index.parse().ok())
        .ok_or_else(|| malformed("shard_ready names a task that is no shard"))
}

/// A prefix inside the job's own, as workers write them: the promotion copies from there.
fn own_prefix(job: &JobId, field: &str, key: &str) -> Result<String> {
    let inside = key.strip_prefix(&paths::job_prefix(job.as_str())).is_some_and(|rest| {
        rest.ends_with('/') && rest.len() > 1 && key.len() <= 512 && !rest.split('/').any(|part| part == "..")
    });
    if inside {
        Ok(key.to_owned())
    } else {
        Err(malformed(&format!("{field} is {:?}, no prefix of this job's own", cut(key, 200))))
    }
}

/// The database's integers are signed.
fn bounded(field: &str, value: u64) -> Result<u64> {
    if i64::try_from(value).is_ok() { Ok(value) } else { Err(malformed(&format!("{field} is {value}"))) }
}

fn not_negative(seconds: f64) -> f64 {
    if seconds.is_finite() { seconds.max(0.0) } else { 0.0 }
}

fn cut(text: &str, chars: usize) -> String {
    text.chars().take(chars).collect()
}

fn malformed(what: &str) -> Error {
    Error::new(Code::BusMalformed, format!("worker event: {what}"))
}
