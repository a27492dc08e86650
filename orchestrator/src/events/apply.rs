//! The effects of an event, inside the caller's transaction.

use retort_core::{
    Code, Error, Kind, Result,
    id::JobId,
    state::{Split, TaskKind, TaskState},
};
use retort_proto::{self as proto, job_event};

use super::{Event, Outcome, What};
use crate::{
    context::Context,
    database::{
        Connection,
        jobs::{self, Job},
        journal, offsets,
        shards::{self, Published},
        signed,
        tasks::{self, Task},
    },
    leases,
    to_proto::{held_out_to_proto, quality_to_proto},
};

/// A failed attempt is done again after this long, doubling with each attempt.
const FIRST_BACKOFF_MS: i64 = 1000;
const LONGEST_BACKOFF_MS: i64 = 300_000;
/// A replica that made room for others asks for work again after this long.
const REPLICA_PAUSE_MS: i64 = 5_000;
/// A task outlives this many failures of its surroundings, about a day of a full disk or a store that is away; more
/// count as failures of its own.
pub(super) const MAX_OUTAGES: u32 = 300;

/// `Err` of kind `Invalid` only before anything was written.
pub(super) async fn apply(context: &Context, conn: &mut Connection, event: &Event) -> Result<Outcome> {
    let Some(job) = jobs::find(&mut *conn, &event.job).await? else { return Ok(Outcome::Stale) };
    let Some(task) = tasks::find(&mut *conn, &event.task).await? else {
        return Err(Error::new(Code::BusMalformed, format!("there is no task {}", event.task)));
    };
    fits(&task, &event.what)?;
    if event.epoch > task.epoch {
        return Err(Error::new(
            Code::BusMalformed,
            format!("epoch {} of {} was never claimed; the newest is {}", event.epoch, task.id, task.epoch),
        ));
    }
    if !offsets::mark_applied(&mut *conn, &event.id, &job.id).await? {
        return Ok(Outcome::Repeated);
    }
    if job.state.is_final() || !task.is_current(event.epoch) {
        tracing::info!(job = %job.id, task = task.id.short(), epoch = event.epoch, "an event of an attempt that is over");
        return Ok(Outcome::Stale);
    }
    match &event.what {
        What::TrainProgress(step) => {
            // Counts even after the result: it may have been overtaken.
            jobs::enter_training(&mut *conn, &job.id, event.epoch).await?;
            jobs::record_step(&mut *conn, &job.id, step).await?;
            let what = proto::TrainStepped { step: step.step, loss: step.loss };
            return append(context, conn, &job, job_event::What::TrainStepped(what)).await;
        }
        What::CheckpointWritten { step, key, held_out } => {
            jobs::record_checkpoint(&mut *conn, &job.id, *step, key).await?;
            let held_out = held_out.as_ref().map(held_out_to_proto);
            let what = proto::CheckpointSaved { step: *step, key: key.clone(), held_out };
            return append(context, conn, &job, job_event::What::CheckpointSaved(what)).await;
        }
        _ => {}
    }
    match task.state {
        TaskState::Ready | TaskState::Queued | TaskState::Leased => {}
        TaskState::Done => return Ok(Outcome::Repeated),
        TaskState::Waiting | TaskState::Failed | TaskState::Cancelled => return Ok(Outcome::Stale),
    }
    match &event.what {
        What::ShardProgress { target_tokens, seconds } => {
            tasks::record_progress(conn, &task.id, *target_tokens, *seconds).await?;
            Ok(Outcome::Applied)
        }
        What::TaskFailed { code, message, retryable } => {
            failed(context, conn, &task, code, message, *retryable).await?;
            Ok(Outcome::Applied)
        }
        What::ShardReady { published, .. }
            if published.reused && !shards::is_reusable(&mut *conn, published).await? =>
        {
            not_reusable(context, conn, &task, &published.key).await?;
            Ok(Outcome::Applied)
        }
        What::ShardReady { published, measured } => {
            if let Some(why) = another_teacher(&mut *conn, &job.id, published).await? {
                failed(context, conn, &task, Code::TeacherMismatch.as_str(), &why, true).await?;
                return Ok(Outcome::Applied);
            }
            let split =
                task.slice.map(|slice| slice.split).ok_or_else(|| Error::internal("a shard task without rows"))?;
            done(conn, &task).await?;
            if !shards::insert(&mut *conn, &job.id, split, published, measured).await? {
                return Ok(Outcome::Repeated);
            }
            let (tokens, bytes) = (signed(published.target_tokens), signed(published.bytes));
            jobs::add_published(&mut *conn, &job.id, 1, tokens, bytes).await?;
            leases::advance(&mut *conn, &job).await?;
            let what = proto::ShardPublished {
                shard: published.shard,
                epoch: published.epoch,
                target_tokens: published.target_tokens,
                bytes: published.bytes,
                reused: published.reused,
            };
            tracing::info!(
                job = %job.id, task = task.id.short(), epoch = event.epoch, tokens = published.target_tokens,
                bytes = published.bytes, reused = published.reused, "published"
            );
            append(context, conn, &job, job_event::What::ShardPublished(what)).await
        }
        What::TrainFinished(finish) => {
            done(conn, &task).await?;
            tasks::cancel_replicas(&mut *conn, &job.id).await?;
            jobs::enter_training(&mut *conn, &job.id, event.epoch).await?;
            jobs::record_train_finish(&mut *conn, &job.id, finish).await?;
            jobs::record_checkpoint(&mut *conn, &job.id, finish.judged_step(&job.id), &finish.checkpoint_key).await?;
            leases::advance(&mut *conn, &job).await?;
            Ok(Outcome::Applied)
        }
        What::EvaluationReady(evaluation) => {
            done(conn, &task).await?;
            jobs::record_evaluation(&mut *conn, &job.id, evaluation).await?;
            let steps = job.train_finish.as_ref().map_or(job.training.step, |finish| finish.judged_step(&job.id));
            for (quality, step) in [(&evaluation.before, 0), (&evaluation.after, steps)] {
                let what = proto::Evaluated { quality: Some(quality_to_proto(quality)), step };
                append(context, &mut *conn, &job, job_event::What::Evaluated(what)).await?;
            }
            Ok(Outcome::Applied)
        }
        What::TrainProgress(_) | What::CheckpointWritten { .. } => Ok(Outcome::Applied),
    }
}

/// The task is done; if its attempt was given up as lost in the meantime, it was not.
async fn done(conn: &mut Connection, task: &Task) -> Result<()> {
    tasks::set_state(&mut *conn, &task.id, TaskState::Done).await?;
    tasks::delete_redone(conn, &task.id, task.epoch).await
}

/// Why a shard is no part of the job, if its teacher had other weights than that of the others: models are named by
/// path, and what lies there may differ between machines.
async fn another_teacher(conn: &mut Connection, job: &JobId, published: &Published) -> Result<Option<String>> {
    let Some(theirs) = &published.teacher_sha256 else { return Ok(None) };
    let of_job = shards::teacher(conn, job).await?.filter(|(sha256, _)| sha256 != theirs);
    Ok(of_job.map(|(sha256, shard)| {
        format!(
            "shard {} was computed with the teacher weights {theirs}, and shard {shard} of the same job with {sha256}; \
             give every teacher of the pool the same model",
            published.shard
        )
    }))
}

/// The job that had published the shard was deleted, or the shard withdrawn, after the teacher had asked
/// for it. The attempt is over, and the next one finds another or computes it; it was no failure of the
/// task's.
async fn not_reusable(context: &Context, conn: &mut Connection, task: &Task, key: &str) -> Result<()> {
    let reason = format!("it reused {key}, and no job has published that as this work");
    tracing::warn!(job = %task.job_id, task = task.id.short(), epoch = task.epoch, "an attempt failed: {reason}");
    tasks::void_attempts(&mut *conn, &task.id).await?;
    if tasks::count_redone_of(&mut *conn, &task.id).await? < MAX_OUTAGES {
        tasks::forgive_attempt(&mut *conn, &task.id).await?;
    }
    leases::lose(context, conn, task, &reason).await?;
    Ok(())
}

async fn failed(
    context: &Context,
    conn: &mut Connection,
    task: &Task,
    code: &str,
    message: &str,
    retryable: bool,
) -> Result<()> {
    let now_ms = context.now_ms();
    // What this attempt still says is void, also while nobody has claimed the task anew.
    tasks::void_attempts(&mut *conn, &task.id).await?;
    if code == Code::WorkerStopped.as_str() {
        tracing::info!(job = %task.job_id, task = task.id.short(), epoch = task.epoch, "an attempt was left: {message}");
    } else {
        tracing::warn!(
            job = %task.job_id, task = task.id.short(), epoch = task.epoch, worker = task.worker(), code, retryable,
            "an attempt failed: {message}"
        );
    }
    let chance = may_be_chance(conn, task, code).await?;
    if !retryable && !chance {
        let text = format!("{}: {message}", task.id.short());
        tasks::set_state(&mut *conn, &task.id, TaskState::Failed).await?;
        // The training goes on without a replica.
        return match task.kind {
            TaskKind::Replica => Ok(()),
            _ => leases::fail_job(conn, task, (code, &text), now_ms).await,
        };
    }
    if code == Code::AttemptYielded.as_str() {
        return yielded(conn, task, now_ms).await;
    }
    let mut not_before_ms = now_ms;
    if code == Code::WorkerStopped.as_str() {
        // Somebody stopped the worker, which says nothing about the task.
        tasks::forgive_attempt(&mut *conn, &task.id).await?;
    } else {
        let lost = tasks::count_redone_of(&mut *conn, &task.id).await?;
        not_before_ms = now_ms.saturating_add((FIRST_BACKOFF_MS << lost.min(10)).min(LONGEST_BACKOFF_MS));
        // Chance has its second attempt even where that was the last one.
        if chance || (lost < MAX_OUTAGES && is_outage(code)) {
            tasks::forgive_attempt(&mut *conn, &task.id).await?;
        }
    }
    leases::redo(context, conn, task, &format!("{code}: {message}"), not_before_ms).await?;
    Ok(())
}

/// What a shard's numbers come to, they come to again; but a fault of memory may have hit them once.
async fn may_be_chance(conn: &mut Connection, task: &Task, code: &str) -> Result<bool> {
    Ok(code == Code::ShardUnfaithful.as_str() && !tasks::was_redone_for(conn, &task.id, code).await?)
}

/// The student waited for shards and made room for another task. It goes on when the next shard is
/// published; if all are by now, at once. A replica waits for its train task, and goes on in a while.
async fn yielded(conn: &mut Connection, task: &Task, now_ms: i64) -> Result<()> {
    tasks::forgive_attempt(&mut *conn, &task.id).await?;
    if task.kind == TaskKind::Replica {
        return tasks::make_ready(conn, &task.id, now_ms.saturating_add(REPLICA_PAUSE_MS)).await;
    }
    match tasks::count_unfinished(&mut *conn, &task.job_id, TaskKind::Shard, Some(Split::Train)).await? {
        0 => tasks::make_ready(conn, &task.id, 0).await,
        _ => tasks::set_state(conn, &task.id, TaskState::Waiting).await,
    }
}

/// A full disk, a store that does not answer: somebody will mend it, and the work was not at fault.
fn is_outage(code: &str) -> bool {
    Code::parse(code).is_some_and(|code| matches!(code.kind(), Kind::Exhausted | Kind::Unavailable))
}

async fn append(context: &Context, conn: &mut Connection, job: &Job, what: job_event::What) -> Result<Outcome> {
    journal::append(conn, &job.id, context.now_ms(), what).await?;
    Ok(Outcome::Applied)
}

/// Whether this kind of task can report this.
fn fits(task: &Task, what: &What) -> Result<()> {
    let fits = match what {
        What::TaskFailed { .. } => true,
        What::ShardReady { .. } | What::ShardProgress { .. } => task.kind == TaskKind::Shard,
        What::TrainProgress(_) | What::CheckpointWritten { .. } | What::TrainFinished(_) => {
            task.kind == TaskKind::Train
        }
        What::EvaluationReady(_) => task.kind == TaskKind::Evaluate,
    };
    if fits {
        Ok(())
    } else {
        Err(Error::new(Code::BusMalformed, format!("{} is a {} task and cannot report this", task.id, task.kind)))
    }
}
