//! Leases: who computes a task, and until when.
//!
//! A claim raises the task's epoch, and with it voids every attempt before. A lease without a
//! heartbeat runs out: the task goes back to `Ready` and the attempt is noted as lost. It is *not*
//! void yet. If its heartbeat or its result arrives before another worker claims, it is taken: the
//! work is good, only the news was late (a busy machine, a broker that restarted).

use std::time::Duration;

use retort_core::{
    Code, Error, Result,
    id::{JobId, TaskId},
    state::{JobState, TaskKind, TaskState},
};
use retort_proto::not_claimable::Reason;
use tokio_util::sync::CancellationToken;

use crate::{
    context::Context,
    database::{
        Connection, commit,
        jobs::{self, Job},
        journal,
        tasks::{self, Task},
    },
};

/// Shortest wait told to a worker whose task is held by another.
const MIN_RETRY: Duration = Duration::from_millis(200);

/// What a claim is answered.
#[derive(Debug)]
pub enum Claim {
    Claimed(Box<Lease>),
    NotClaimable(Reason),
    /// Another attempt holds the task: ask again after this long.
    RetryAfter(Duration),
}

#[derive(Debug)]
pub struct Lease {
    /// With the epoch of the new attempt.
    pub task: Task,
    pub job: Job,
}

/// What a heartbeat is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beat {
    Extended,
    /// The job has ended: stop, clean up, commit.
    Cancelled,
    /// As [`Beat::Cancelled`], of a replica whose training is done.
    TrainingEnded,
}

/// Gives the worker the first published task of the topic of `id`, or says why there is none.
///
/// A record is worth one claim, whichever task it names: partitions are read one after another, so
/// the order of records is not the order of priority. What the worker holds already is not taken back:
/// most likely it is done, and the news still on the bus. If the answer to its claim was lost instead,
/// the lease runs out and the task is published again.
pub async fn claim(context: &Context, id: &TaskId, worker_id: &str) -> Result<Claim> {
    let now_ms = context.now_ms();
    let mut tx = context.database.begin().await?;
    let Some(named) = tasks::find(&mut tx, id).await? else {
        return Ok(Claim::NotClaimable(Reason::UnknownTask));
    };
    context.activity.heard(&named.topic, now_ms);
    let job = jobs::get(&mut tx, &named.job_id).await?;
    let open = can_lease(context, &mut tx, &job, id, worker_id).await?;
    let before = if open.is_ok() { Some(&named) } else { None };
    let chosen = match (tasks::first_queued(&mut tx, &named.topic, before).await?, open) {
        (Some(first), _) => first,
        (None, Ok(())) => id.clone(),
        (None, Err(refused)) => {
            commit(tx).await?;
            return Ok(refused);
        }
    };
    tasks::lease(&mut tx, &chosen, worker_id, now_ms.saturating_add(context.settings.lease_ms())).await?;
    let leased = tasks::find(&mut tx, &chosen).await?.ok_or_else(|| Error::internal("a leased task is gone"))?;
    if jobs::get(&mut tx, &leased.job_id).await?.state == JobState::Queued {
        journal::change_state(&mut tx, &leased.job_id, JobState::Running, None, now_ms).await?;
    }
    let job = jobs::get(&mut tx, &leased.job_id).await?;
    commit(tx).await?;
    context.wakers.job_changed(&job.id);
    tracing::info!(job = %job.id, task = leased.id.short(), epoch = leased.epoch, worker = worker_id, "claimed");
    Ok(Claim::Claimed(Box::new(Lease { task: leased, job })))
}

/// Whether a task can be leased now; else what its claimant is told. Takes back a lease that ran out.
async fn can_lease(
    context: &Context,
    conn: &mut Connection,
    job: &Job,
    id: &TaskId,
    worker_id: &str,
) -> Result<std::result::Result<(), Claim>> {
    let refuse = |reason| Ok(Err(Claim::NotClaimable(reason)));
    match job.state {
        JobState::Cancelled => return refuse(Reason::Cancelled),
        JobState::Failed => return refuse(Reason::Failed),
        JobState::Succeeded | JobState::Rejected => return refuse(Reason::Done),
        JobState::Queued | JobState::Running => {}
    }
    let now_ms = context.now_ms();
    let Some(task) = tasks::find(&mut *conn, id).await? else { return refuse(Reason::UnknownTask) };
    match task.state {
        TaskState::Cancelled => refuse(Reason::Cancelled),
        TaskState::Failed => refuse(Reason::Failed),
        // Waiting, or backing off: another record will come when the time is right, so this one's
        // purpose is fulfilled.
        TaskState::Done | TaskState::Waiting => refuse(Reason::Done),
        TaskState::Ready if task.not_before_ms > now_ms => refuse(Reason::Done),
        TaskState::Ready | TaskState::Queued => Ok(Ok(())),
        TaskState::Leased => {
            let left_ms = task.lease_until_ms.unwrap_or(now_ms) - now_ms;
            if left_ms > 0 && task.worker() == worker_id {
                return refuse(Reason::Done);
            }
            if left_ms > 0 {
                let wait = Duration::from_millis(left_ms.unsigned_abs()).max(MIN_RETRY);
                return Ok(Err(Claim::RetryAfter(wait)));
            }
            if lose(context, conn, &task, &expired(context)).await? == Fate::JobFailed {
                context.wakers.job_changed(&task.job_id);
                return refuse(Reason::Failed);
            }
            Ok(Ok(()))
        }
    }
}

/// Extends the lease. `attempt-fenced` when another attempt has taken over.
pub async fn heartbeat(context: &Context, id: &TaskId, epoch: u64, worker_id: &str) -> Result<Beat> {
    let now_ms = context.now_ms();
    let mut tx = context.database.begin().await?;
    let Some(task) = tasks::find(&mut tx, id).await? else {
        // The job was deleted.
        return Ok(Beat::Cancelled);
    };
    context.activity.heard(&task.topic, now_ms);
    let job = jobs::get(&mut tx, &task.job_id).await?;
    let over = match job.state {
        JobState::Cancelled | JobState::Failed => Beat::Cancelled,
        _ if task.kind == TaskKind::Replica && job.train_finish.is_some() => Beat::TrainingEnded,
        _ => Beat::Cancelled,
    };
    if job.state.is_final() && task.state != TaskState::Done {
        return Ok(over);
    }
    if epoch != task.epoch || task.worker() != worker_id {
        return Err(fenced(&task, epoch));
    }
    match task.state {
        // The result arrived before the last heartbeat.
        TaskState::Done => return Ok(Beat::Extended),
        TaskState::Cancelled | TaskState::Failed => return Ok(over),
        TaskState::Ready | TaskState::Queued | TaskState::Leased if task.is_current(epoch) => {}
        _ => return Err(fenced(&task, epoch)),
    }
    if task.state != TaskState::Leased {
        tasks::delete_redone(&mut tx, id, epoch).await?;
    }
    tasks::extend(&mut tx, id, now_ms.saturating_add(context.settings.lease_ms())).await?;
    commit(tx).await?;
    Ok(Beat::Extended)
}

/// Whether another task of this one's topic waits for a worker. Replicas of its own job do not count: they
/// would have nothing to do without it, or as little as it has.
pub async fn others_wait(context: &Context, id: &TaskId) -> Result<bool> {
    let mut snapshot = context.database.read().await?;
    let Some(task) = tasks::find(&mut snapshot, id).await? else { return Ok(false) };
    tasks::others_queued(&mut snapshot, &task).await
}

/// Takes back what no heartbeat kept, each moment until `shutdown`.
pub async fn run(context: Context, shutdown: CancellationToken) -> Result<()> {
    let tick = (context.settings.lease / 5).clamp(Duration::from_millis(50), Duration::from_secs(1));
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            () = tokio::time::sleep(tick) => {}
        }
        if let Err(error) = reap(&context).await {
            tracing::warn!(code = %error.code, "lost leases could not be taken back, trying again: {}", error.chain());
        }
    }
}

/// Takes every lost lease back; returns how many.
pub async fn reap(context: &Context) -> Result<usize> {
    let now_ms = context.now_ms();
    if tasks::expired(&mut *context.database.read().await?, now_ms).await?.is_empty() {
        return Ok(0);
    }
    let mut tx = context.database.begin().await?;
    let expired_tasks = tasks::expired(&mut tx, now_ms).await?;
    for task in &expired_tasks {
        lose(context, &mut tx, task, &expired(context)).await?;
    }
    commit(tx).await?;
    for task in &expired_tasks {
        tracing::warn!(
            job = %task.job_id, task = task.id.short(), epoch = task.epoch, worker = task.worker(),
            "the lease ran out"
        );
        context.wakers.job_changed(&task.job_id);
    }
    Ok(expired_tasks.len())
}

/// Every worker gets a whole lease from now: while the orchestrator was away nobody could beat.
pub async fn grant_grace(context: &Context) -> Result<u64> {
    let mut tx = context.database.begin().await?;
    let kept = tasks::extend_all(&mut tx, context.now_ms().saturating_add(context.settings.lease_ms())).await?;
    commit(tx).await?;
    Ok(kept)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The task is `Ready` again.
    Redone,
    /// Nobody does the task any more; its job can do without.
    GivenUp,
    JobFailed,
}

/// Notes the newest attempt as lost; the task is done again, unless that was its last attempt.
pub async fn lose(context: &Context, conn: &mut Connection, task: &Task, reason: &str) -> Result<Fate> {
    redo(context, conn, task, reason, context.now_ms()).await
}

/// As [`lose`], the next attempt not before `not_before_ms`.
pub async fn redo(
    context: &Context,
    conn: &mut Connection,
    task: &Task,
    reason: &str,
    not_before_ms: i64,
) -> Result<Fate> {
    let now_ms = context.now_ms();
    // Before the event, so that its progress counts no running attempt any more.
    tasks::make_ready(&mut *conn, &task.id, not_before_ms).await?;
    journal::attempt_lost(&mut *conn, task, reason, now_ms).await?;
    let attempts = tasks::find(&mut *conn, &task.id).await?.map_or(0, |task| task.attempts);
    if attempts < context.settings.max_attempts {
        return Ok(Fate::Redone);
    }
    let message = format!(
        "{} was attempted {attempts} times and never ended in its result; the last time: {reason}",
        task.id.short()
    );
    tasks::set_state(&mut *conn, &task.id, TaskState::Failed).await?;
    if task.kind == TaskKind::Replica {
        tracing::warn!(job = %task.job_id, task = task.id.short(), "the training goes on without this replica: {message}");
        return Ok(Fate::GivenUp);
    }
    fail_job(conn, task, (Code::AttemptsExhausted.as_str(), &message), now_ms).await?;
    Ok(Fate::JobFailed)
}

/// The job fails with this code and message, and with it everything it still had to do.
pub async fn fail_job(conn: &mut Connection, task: &Task, error: (&str, &str), now_ms: i64) -> Result<()> {
    tasks::cancel_all(&mut *conn, &task.job_id).await?;
    journal::change_state(conn, &task.job_id, JobState::Failed, Some(error), now_ms).await
}

/// Lets training go on after it made room for others, since shards have come; lets the evaluation
/// start when its inputs are there, and wait again when one was withdrawn.
pub async fn advance(conn: &mut Connection, job: &Job) -> Result<()> {
    use retort_core::state::Split;
    let train = TaskId::train(&job.id);
    if tasks::find(&mut *conn, &train).await?.is_some_and(|task| task.state == TaskState::Waiting) {
        tasks::make_ready(&mut *conn, &train, 0).await?;
    }
    let id = TaskId::evaluate(&job.id);
    let Some(task) = tasks::find(&mut *conn, &id).await? else { return Ok(()) };
    let held_out = tasks::count_unfinished(&mut *conn, &job.id, TaskKind::Shard, Some(Split::HeldOut)).await?;
    let training = tasks::count_unfinished(&mut *conn, &job.id, TaskKind::Train, None).await?;
    match (task.state, held_out + training) {
        (TaskState::Waiting, 0) => tasks::make_ready(conn, &id, 0).await,
        (TaskState::Ready | TaskState::Queued, 1..) => tasks::set_state(conn, &id, TaskState::Waiting).await,
        _ => Ok(()),
    }
}

/// `attempt-fenced` unless this is the job's shard task and its current attempt; `request-invalid` for a
/// task of another kind or job.
pub async fn check(conn: &mut Connection, job: &JobId, id: &TaskId, epoch: u64) -> Result<()> {
    match tasks::find(conn, id).await? {
        Some(task) if task.job_id != *job || task.kind != TaskKind::Shard => {
            Err(Error::new(Code::RequestInvalid, format!("{id} is no shard of {}", job.resource_name())))
        }
        Some(task) if !task.is_current(epoch) => Err(fenced(&task, epoch)),
        Some(_) => Ok(()),
        None => {
            Err(Error::new(Code::AttemptFenced, format!("there is no task {id} any more; stop and write nothing more")))
        }
    }
}

fn expired(context: &Context) -> String {
    format!("lease expired: no heartbeat for {} s", context.settings.lease.as_secs_f64())
}

fn fenced(task: &Task, epoch: u64) -> Error {
    Error::new(
        Code::AttemptFenced,
        format!(
            "{}: epoch {epoch} is not the current attempt (epoch {}{}); stop and write nothing more",
            task.id.short(),
            task.epoch,
            if task.is_current(task.epoch) { "" } else { ", void" },
        ),
    )
}

#[cfg(test)]
mod tests;
