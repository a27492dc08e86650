//! The transactional outbox. A task becomes `Queued` and its record due in one transaction; a
//! publisher sends what is due and strikes it off. A crash between sending and striking sends the
//! record twice, which a claim makes harmless.
//!
//! At most a window of each topic's tasks is published and unfinished, so that pausing and
//! cancelling act at once and no topic holds a million tasks.

use std::{collections::HashSet, time::Duration};

use retort_core::{Result, state::TaskKind, wire::task_kind_to_proto};
use retort_proto::{self as proto, TaskMessage, job_event};
use tokio_util::sync::CancellationToken;

use crate::{
    bus::Bus,
    context::{Context, ms},
    database::{Connection, commit, jobs, journal, outbox, tasks::Task},
    retry::Backoff,
};

/// Also without being woken: tasks whose back-off has passed.
const TICK: Duration = Duration::from_millis(500);
/// Records sent between two looks at the window.
const BATCH: u32 = 64;

/// Publishes until `shutdown`.
pub async fn run(context: Context, bus: std::sync::Arc<dyn Bus>, shutdown: CancellationToken) -> Result<()> {
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
    loop {
        let wait = match publish(&context, bus.as_ref(), &shutdown).await {
            Ok(()) => {
                backoff.reset();
                TICK
            }
            Err(error) => {
                tracing::warn!(code = %error.code, "tasks could not be published, trying again: {}", error.chain());
                backoff.wait()
            }
        };
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            () = context.wakers.outbox.notified() => {}
            () = tokio::time::sleep(wait) => {}
        }
    }
}

async fn publish(context: &Context, bus: &dyn Bus, shutdown: &CancellationToken) -> Result<()> {
    fill(context).await?;
    loop {
        let sent = tokio::select! {
            biased;
            () = shutdown.cancelled() => return Ok(()),
            sent = send(context, bus) => sent?,
        };
        if sent == 0 {
            return Ok(());
        }
    }
}

/// Queues ready tasks up to the window and those whose record seems lost; returns how many.
pub async fn fill(context: &Context) -> Result<usize> {
    let now_ms = context.now_ms();
    // Most looks find nothing: those take no write lock.
    let mut snapshot = context.database.read().await?;
    let mut due = lost_records(context, &mut snapshot).await?.len();
    for topic in outbox::ready_topics(&mut snapshot, now_ms).await? {
        due += usize::from(outbox::outstanding(&mut snapshot, &topic).await? < context.settings.window);
    }
    drop(snapshot);
    if due == 0 {
        return Ok(0);
    }

    let mut tx = context.database.begin().await?;
    let mut queued = 0;
    let mut told = HashSet::new();
    for task in lost_records(context, &mut tx).await? {
        tracing::info!(task = task.id.short(), "nobody has claimed this task; publishing it again");
        if task.publishes == 1 && told.insert((task.job_id.clone(), task.kind)) {
            tell_unserved(context, &mut tx, &task).await?;
        }
        outbox::enqueue(&mut tx, task.id.as_str(), now_ms).await?;
        queued += 1;
    }
    for topic in outbox::ready_topics(&mut tx, now_ms).await? {
        let room = context.settings.window.saturating_sub(outbox::outstanding(&mut tx, &topic).await?);
        for task in outbox::next_ready(&mut tx, &topic, now_ms, room).await? {
            outbox::enqueue(&mut tx, &task, now_ms).await?;
            queued += 1;
        }
    }
    commit(tx).await?;
    Ok(queued)
}

/// Tasks whose record seems to have reached nobody. While workers of a topic are heard of, its records
/// just wait their turn: each gives the first task, so none is missed before the queue runs dry.
async fn lost_records(context: &Context, conn: &mut Connection) -> Result<Vec<Task>> {
    let (now_ms, after_ms) = (context.now_ms(), ms(context.settings.republish_after));
    let mut unclaimed = outbox::unclaimed(conn, now_ms, after_ms).await?;
    unclaimed.retain(|task| !context.activity.since(&task.topic, now_ms.saturating_sub(after_ms)));
    Ok(unclaimed)
}

/// A job that waits for workers that are not there says so.
async fn tell_unserved(context: &Context, conn: &mut Connection, task: &Task) -> Result<()> {
    let job = jobs::get(&mut *conn, &task.job_id).await?;
    let (role, pool) = match task.kind {
        TaskKind::Shard => ("teacher", job.spec.teacher.pool),
        TaskKind::Train | TaskKind::Replica | TaskKind::Evaluate => ("student", job.spec.student.pool),
    };
    tracing::warn!(job = %job.id, task = task.id.short(), pool, "no {role} of this pool takes the task");
    let what = proto::TaskUnclaimed { task: task.id.short().to_owned(), pool, role: role.to_owned() };
    journal::append(conn, &job.id, context.now_ms(), job_event::What::TaskUnclaimed(what)).await?;
    context.wakers.job_changed(&job.id);
    Ok(())
}

/// Sends what is due, oldest first, and strikes off what was acknowledged; returns how many.
pub async fn send(context: &Context, bus: &dyn Bus) -> Result<usize> {
    let due = outbox::pending(&mut *context.database.read().await?, BATCH).await?;
    for record in &due {
        let message = TaskMessage {
            task_id: record.task_id.as_str().to_owned(),
            job_id: record.job_id.as_str().to_owned(),
            kind: task_kind_to_proto(record.kind) as i32,
        };
        bus.send_task(&record.topic, &message).await?;
        let mut tx = context.database.begin().await?;
        outbox::sent(&mut tx, record.id).await?;
        commit(tx).await?;
        tracing::debug!(job = %record.job_id, task = record.task_id.short(), topic = record.topic, "published");
    }
    Ok(due.len())
}

#[cfg(test)]
mod tests;
