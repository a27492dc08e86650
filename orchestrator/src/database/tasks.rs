//! Rows of `tasks`, and `redone`, the attempts they lost.

use retort_core::{
    Result,
    id::{JobId, TaskId},
    state::{Split, TaskKind, TaskState},
};
use sqlx::{QueryBuilder, Row as _, Sqlite, sqlite::SqliteRow};

use super::{Connection, DatabaseResult as _, damaged, jobs::parse_id, signed, unsigned, unsigned32};
use crate::{
    planner::{PlannedTask, Slice},
    report::Redone,
};

#[derive(Clone, Debug)]
pub struct Task {
    pub id: TaskId,
    pub job_id: JobId,
    pub kind: TaskKind,
    pub topic: String,
    pub slice: Option<Slice>,
    pub state: TaskState,
    /// Fencing number of the newest attempt; 0 before the first.
    pub epoch: u64,
    /// Attempts up to this one are void.
    pub void_epoch: u64,
    pub attempts: u32,
    pub worker_id: Option<String>,
    pub lease_until_ms: Option<i64>,
    pub not_before_ms: i64,
    /// Records sent since the last claim.
    pub publishes: u32,
}

impl Task {
    /// Whether an attempt of this epoch may still change the task.
    pub fn is_current(&self, epoch: u64) -> bool {
        epoch == self.epoch && epoch > self.void_epoch
    }

    pub fn worker(&self) -> &str {
        self.worker_id.as_deref().unwrap_or("")
    }
}

/// Writes a job's tasks, a thousand a statement: a large job must not hold the write lock for long.
pub async fn insert_all(
    conn: &mut Connection,
    job: &JobId,
    tasks: &[PlannedTask],
    topic: impl Fn(TaskKind) -> String,
) -> Result<()> {
    for chunk in tasks.chunks(1000) {
        let mut query = QueryBuilder::<Sqlite>::new(
            "INSERT INTO tasks (id, job_id, kind, topic, shard, split, first_row, row_count, state, priority) ",
        );
        query.push_values(chunk, |mut row, task| {
            row.push_bind(task.id(job).as_str().to_owned())
                .push_bind(job.as_str())
                .push_bind(task.kind.as_str())
                .push_bind(topic(task.kind))
                .push_bind(task.slice.map(|slice| slice.shard))
                .push_bind(task.slice.map(|slice| slice.split.as_str()))
                .push_bind(task.slice.map(|slice| signed(slice.first_row)))
                .push_bind(task.slice.map(|slice| slice.rows))
                .push_bind(task.state.as_str())
                .push_bind(task.priority);
        });
        query.build().persistent(false).execute(&mut *conn).await.db()?;
    }
    Ok(())
}

pub async fn find(conn: &mut Connection, id: &TaskId) -> Result<Option<Task>> {
    let row = sqlx::query("SELECT * FROM tasks WHERE id = ?").bind(id.as_str()).fetch_optional(conn).await.db()?;
    row.as_ref().map(read).transpose()
}

/// Leased tasks whose lease ended at or before `now_ms`.
pub async fn expired(conn: &mut Connection, now_ms: i64) -> Result<Vec<Task>> {
    let rows = sqlx::query("SELECT * FROM tasks WHERE state = 'leased' AND lease_until_ms <= ? ORDER BY id LIMIT 1000")
        .bind(now_ms)
        .fetch_all(conn)
        .await
        .db()?;
    rows.iter().map(read).collect()
}

/// The first published task of a topic that nobody has claimed: by priority, then oldest job, then
/// shard. With `before`, only one that comes before that task.
pub async fn first_queued(conn: &mut Connection, topic: &str, before: Option<&Task>) -> Result<Option<TaskId>> {
    let first: Option<String> = sqlx::query_scalar(
        "SELECT id FROM tasks WHERE state = 'queued' AND topic = ?1 AND (?2 IS NULL
             OR (priority, job_id, coalesce(shard, -1)) < (SELECT priority, job_id, coalesce(shard, -1) FROM tasks WHERE id = ?2))
         ORDER BY priority, job_id, shard LIMIT 1",
    )
    .bind(topic)
    .bind(before.map(|task| task.id.as_str()))
    .fetch_optional(conn)
    .await
    .db()?;
    first.as_deref().map(parse_task_id).transpose()
}

/// Whether a task of this one's topic is published and unclaimed, replicas of its own job not counted; for a
/// replica no replicas at all, so that they do not make room for each other.
pub async fn others_queued(conn: &mut Connection, task: &Task) -> Result<bool> {
    let others: bool = sqlx::query_scalar(
        "SELECT EXISTS (SELECT 1 FROM tasks
             WHERE state = 'queued' AND topic = ? AND NOT (kind = 'replica' AND (job_id = ? OR ?)))",
    )
    .bind(&task.topic)
    .bind(task.job_id.as_str())
    .bind(task.kind == TaskKind::Replica)
    .fetch_one(conn)
    .await
    .db()?;
    Ok(others)
}

/// Tasks of a job of one kind and split (`None`: any) that are not done.
pub async fn count_unfinished(conn: &mut Connection, job: &JobId, kind: TaskKind, split: Option<Split>) -> Result<u64> {
    let count: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM tasks WHERE job_id = ? AND kind = ? AND (?3 IS NULL OR split = ?3) AND state <> 'done'",
    )
    .bind(job.as_str())
    .bind(kind.as_str())
    .bind(split.map(Split::as_str))
    .fetch_one(conn)
    .await
    .db()?;
    unsigned("count", count)
}

/// A new attempt: the epoch rises by one and everything before it is void.
pub async fn lease(conn: &mut Connection, id: &TaskId, worker_id: &str, until_ms: i64) -> Result<()> {
    sqlx::query(
        "UPDATE tasks SET state = 'leased', void_epoch = epoch, epoch = epoch + 1, attempts = attempts + 1,
             worker_id = ?, lease_until_ms = ?, publishes = 0, progress_tokens = 0, progress_seconds = 0
         WHERE id = ?",
    )
    .bind(worker_id)
    .bind(until_ms)
    .bind(id.as_str())
    .execute(conn)
    .await
    .db()?;
    Ok(())
}

/// The running attempt stays, or is taken back, until then.
pub async fn extend(conn: &mut Connection, id: &TaskId, until_ms: i64) -> Result<()> {
    sqlx::query("UPDATE tasks SET state = 'leased', lease_until_ms = ? WHERE id = ?")
        .bind(until_ms)
        .bind(id.as_str())
        .execute(conn)
        .await
        .db()?;
    Ok(())
}

/// Every lease lasts at least until then; how many were lengthened.
pub async fn extend_all(conn: &mut Connection, until_ms: i64) -> Result<u64> {
    let done = sqlx::query("UPDATE tasks SET lease_until_ms = ?1 WHERE state = 'leased' AND lease_until_ms < ?1")
        .bind(until_ms)
        .execute(conn)
        .await
        .db()?;
    Ok(done.rows_affected())
}

pub async fn set_state(conn: &mut Connection, id: &TaskId, state: TaskState) -> Result<()> {
    sqlx::query("UPDATE tasks SET state = ?, lease_until_ms = NULL WHERE id = ?")
        .bind(state.as_str())
        .bind(id.as_str())
        .execute(conn)
        .await
        .db()?;
    Ok(())
}

/// Back to `Ready`, not to be published before `not_before_ms`.
pub async fn make_ready(conn: &mut Connection, id: &TaskId, not_before_ms: i64) -> Result<()> {
    sqlx::query(
        "UPDATE tasks SET state = 'ready', lease_until_ms = NULL, not_before_ms = ?, publishes = 0,
             progress_tokens = 0, progress_seconds = 0 WHERE id = ?",
    )
    .bind(not_before_ms)
    .bind(id.as_str())
    .execute(conn)
    .await
    .db()?;
    Ok(())
}

/// No attempt up to and including the newest may change the task any more.
pub async fn void_attempts(conn: &mut Connection, id: &TaskId) -> Result<()> {
    sqlx::query("UPDATE tasks SET void_epoch = epoch WHERE id = ?").bind(id.as_str()).execute(conn).await.db()?;
    Ok(())
}

/// The attempt ended for no fault of the task: it does not count against the limit.
pub async fn forgive_attempt(conn: &mut Connection, id: &TaskId) -> Result<()> {
    sqlx::query("UPDATE tasks SET attempts = max(attempts - 1, 0) WHERE id = ?")
        .bind(id.as_str())
        .execute(conn)
        .await
        .db()?;
    Ok(())
}

pub async fn record_progress(conn: &mut Connection, id: &TaskId, tokens: u64, seconds: f64) -> Result<()> {
    sqlx::query("UPDATE tasks SET progress_tokens = ?1, progress_seconds = ?2 WHERE id = ?3 AND progress_tokens <= ?1")
        .bind(signed(tokens))
        .bind(seconds)
        .bind(id.as_str())
        .execute(conn)
        .await
        .db()?;
    Ok(())
}

/// Everything of a job that is not final is cancelled.
pub async fn cancel_all(conn: &mut Connection, job: &JobId) -> Result<()> {
    sqlx::query(
        "UPDATE tasks SET state = 'cancelled', lease_until_ms = NULL
         WHERE job_id = ? AND state IN ('waiting', 'ready', 'queued', 'leased')",
    )
    .bind(job.as_str())
    .execute(&mut *conn)
    .await
    .db()?;
    sqlx::query("DELETE FROM outbox WHERE task_id IN (SELECT id FROM tasks WHERE job_id = ?)")
        .bind(job.as_str())
        .execute(conn)
        .await
        .db()?;
    Ok(())
}

/// A job's replicas have nothing to do any more.
pub async fn cancel_replicas(conn: &mut Connection, job: &JobId) -> Result<()> {
    sqlx::query(
        "UPDATE tasks SET state = 'cancelled', lease_until_ms = NULL
         WHERE job_id = ? AND kind = 'replica' AND state IN ('waiting', 'ready', 'queued', 'leased')",
    )
    .bind(job.as_str())
    .execute(conn)
    .await
    .db()?;
    Ok(())
}

/// Target tokens and seconds of the shards being computed now.
pub async fn running_progress(conn: &mut Connection, job: &JobId) -> Result<Vec<(u64, f64)>> {
    let rows: Vec<(i64, f64)> = sqlx::query_as(
        "SELECT progress_tokens, progress_seconds FROM tasks WHERE job_id = ? AND kind = 'shard' AND state = 'leased' LIMIT 1000",
    )
    .bind(job.as_str())
    .fetch_all(conn)
    .await
    .db()?;
    rows.into_iter().map(|(tokens, seconds)| Ok((unsigned("progress_tokens", tokens)?, seconds))).collect()
}

/// Notes an attempt as lost; false when it was noted before, as one whose lease had expired and that
/// then told its failure. The newest reason stays.
pub async fn insert_redone(conn: &mut Connection, task: &Task, reason: &str, now_ms: i64) -> Result<bool> {
    let done = sqlx::query(
        "INSERT INTO redone (task_id, epoch, job_id, worker, reason, time_ms) VALUES (?, ?, ?, ?, ?, ?)
         ON CONFLICT (task_id, epoch) DO NOTHING",
    )
    .bind(task.id.as_str())
    .bind(signed(task.epoch))
    .bind(task.job_id.as_str())
    .bind(task.worker())
    .bind(reason)
    .bind(now_ms)
    .execute(&mut *conn)
    .await
    .db()?;
    if done.rows_affected() == 1 {
        return Ok(true);
    }
    sqlx::query("UPDATE redone SET reason = ? WHERE task_id = ? AND epoch = ?")
        .bind(reason)
        .bind(task.id.as_str())
        .bind(signed(task.epoch))
        .execute(conn)
        .await
        .db()?;
    Ok(false)
}

/// The attempt came to its result after all.
pub async fn delete_redone(conn: &mut Connection, id: &TaskId, epoch: u64) -> Result<()> {
    sqlx::query("DELETE FROM redone WHERE task_id = ? AND epoch = ?")
        .bind(id.as_str())
        .bind(signed(epoch))
        .execute(conn)
        .await
        .db()?;
    Ok(())
}

pub async fn count_redone(conn: &mut Connection, job: &JobId) -> Result<u32> {
    let count: i64 = sqlx::query_scalar("SELECT count(*) FROM redone WHERE job_id = ?")
        .bind(job.as_str())
        .fetch_one(conn)
        .await
        .db()?;
    unsigned32("count", count)
}

pub async fn count_redone_of(conn: &mut Connection, id: &TaskId) -> Result<u32> {
    let count: i64 = sqlx::query_scalar("SELECT count(*) FROM redone WHERE task_id = ?")
        .bind(id.as_str())
        .fetch_one(conn)
        .await
        .db()?;
    unsigned32("count", count)
}

/// Whether an attempt failed with this code before.
pub async fn was_redone_for(conn: &mut Connection, id: &TaskId, code: &str) -> Result<bool> {
    let start = format!("{code}: ");
    let one: Option<i64> =
        sqlx::query_scalar("SELECT 1 FROM redone WHERE task_id = ? AND substr(reason, 1, length(?)) = ? LIMIT 1")
            .bind(id.as_str())
            .bind(&start)
            .bind(&start)
            .fetch_optional(conn)
            .await
            .db()?;
    Ok(one.is_some())
}

/// In the order they were lost, the first 1,000.
pub async fn list_redone(conn: &mut Connection, job: &JobId) -> Result<Vec<Redone>> {
    let rows: Vec<(String, i64, String, String)> = sqlx::query_as(
        "SELECT task_id, epoch, worker, reason FROM redone WHERE job_id = ? ORDER BY time_ms, task_id, epoch LIMIT 1000",
    )
    .bind(job.as_str())
    .fetch_all(conn)
    .await
    .db()?;
    rows.into_iter()
        .map(|(task, epoch, worker, reason)| {
            let task = task.split_once('/').map_or(task.as_str(), |(_, short)| short).to_owned();
            Ok(Redone { task, epoch: unsigned("epoch", epoch)?, worker, reason })
        })
        .collect()
}

pub(super) fn parse_task_id(text: &str) -> Result<TaskId> {
    text.parse().map_err(|_| damaged(format!("task id {text:?}")))
}

pub(super) fn read(row: &SqliteRow) -> Result<Task> {
    let text = |column: &str| row.try_get::<String, _>(column).db();
    let integer = |column: &str| row.try_get::<i64, _>(column).db();
    let optional = |column: &str| row.try_get::<Option<i64>, _>(column).db();
    let kind = text("kind")?;
    let state = text("state")?;
    let slice = match (
        optional("shard")?,
        row.try_get::<Option<String>, _>("split").db()?,
        optional("first_row")?,
        optional("row_count")?,
    ) {
        (Some(shard), Some(split), Some(first_row), Some(rows)) => Some(Slice {
            shard: unsigned32("shard", shard)?,
            split: Split::parse(&split).ok_or_else(|| damaged(format!("split {split:?}")))?,
            first_row: unsigned("first_row", first_row)?,
            rows: unsigned32("row_count", rows)?,
        }),
        _ => None,
    };
    Ok(Task {
        id: parse_task_id(&text("id")?)?,
        job_id: parse_id(&text("job_id")?)?,
        kind: TaskKind::parse(&kind).ok_or_else(|| damaged(format!("task kind {kind:?}")))?,
        topic: text("topic")?,
        slice,
        state: TaskState::parse(&state).ok_or_else(|| damaged(format!("task state {state:?}")))?,
        epoch: unsigned("epoch", integer("epoch")?)?,
        void_epoch: unsigned("void_epoch", integer("void_epoch")?)?,
        attempts: unsigned32("attempts", integer("attempts")?)?,
        worker_id: row.try_get("worker_id").db()?,
        lease_until_ms: optional("lease_until_ms")?,
        not_before_ms: integer("not_before_ms")?,
        publishes: unsigned32("publishes", integer("publishes")?)?,
    })
}
