//! Rows of `outbox`, and the window of tasks that lie on the bus.

use retort_core::{
    Result,
    id::{JobId, TaskId},
    state::TaskKind,
};

use super::{
    Connection, DatabaseResult as _, damaged,
    jobs::parse_id,
    tasks::{self, Task, parse_task_id},
    unsigned32,
};

/// A record to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pending {
    pub id: i64,
    pub topic: String,
    pub task_id: TaskId,
    pub job_id: JobId,
    pub kind: TaskKind,
}

/// Topics that have tasks ready at `now_ms`.
pub async fn ready_topics(conn: &mut Connection, now_ms: i64) -> Result<Vec<String>> {
    sqlx::query_scalar("SELECT DISTINCT topic FROM tasks WHERE state = 'ready' AND not_before_ms <= ? ORDER BY topic")
        .bind(now_ms)
        .fetch_all(conn)
        .await
        .db()
}

/// Tasks of a topic that are published and not yet finished.
pub async fn outstanding(conn: &mut Connection, topic: &str) -> Result<u32> {
    let count: i64 = sqlx::query_scalar("SELECT count(*) FROM tasks WHERE state IN ('queued', 'leased') AND topic = ?")
        .bind(topic)
        .fetch_one(conn)
        .await
        .db()?;
    unsigned32("count", count)
}

/// The next ready tasks of a topic: by priority, then oldest job, then shard.
pub async fn next_ready(conn: &mut Connection, topic: &str, now_ms: i64, limit: u32) -> Result<Vec<String>> {
    sqlx::query_scalar(
        "SELECT id FROM tasks WHERE state = 'ready' AND topic = ? AND not_before_ms <= ?
         ORDER BY priority, job_id, shard LIMIT ?",
    )
    .bind(topic)
    .bind(now_ms)
    .bind(limit)
    .fetch_all(conn)
    .await
    .db()
}

/// Queued tasks that nobody has claimed: their record may be lost. The wait doubles with each record
/// sent, from `after_ms` to sixteen times that.
pub async fn unclaimed(conn: &mut Connection, now_ms: i64, after_ms: i64) -> Result<Vec<Task>> {
    let rows = sqlx::query(
        "SELECT * FROM tasks WHERE state = 'queued' AND publishes > 0
             AND queued_ms <= ?1 - ?2 * (1 << min(publishes - 1, 4))
             AND id NOT IN (SELECT task_id FROM outbox)
         ORDER BY priority, job_id, shard LIMIT 1000",
    )
    .bind(now_ms)
    .bind(after_ms)
    .fetch_all(conn)
    .await
    .db()?;
    rows.iter().map(tasks::read).collect()
}

/// The task becomes `Queued` and its record due, both or neither.
pub async fn enqueue(conn: &mut Connection, task_id: &str, now_ms: i64) -> Result<()> {
    sqlx::query("UPDATE tasks SET state = 'queued', queued_ms = ?, publishes = publishes + 1 WHERE id = ?")
        .bind(now_ms)
        .bind(task_id)
        .execute(&mut *conn)
        .await
        .db()?;
    sqlx::query("INSERT INTO outbox (topic, task_id) SELECT topic, id FROM tasks WHERE id = ?")
        .bind(task_id)
        .execute(conn)
        .await
        .db()?;
    Ok(())
}

pub async fn pending(conn: &mut Connection, limit: u32) -> Result<Vec<Pending>> {
    let rows: Vec<(i64, String, String, String, String)> = sqlx::query_as(
        "SELECT outbox.id, outbox.topic, tasks.id, tasks.job_id, tasks.kind
         FROM outbox JOIN tasks ON tasks.id = outbox.task_id ORDER BY outbox.id LIMIT ?",
    )
    .bind(limit)
    .fetch_all(conn)
    .await
    .db()?;
    rows.into_iter()
        .map(|(id, topic, task, job, kind)| {
            Ok(Pending {
                id,
                topic,
                task_id: parse_task_id(&task)?,
                job_id: parse_id(&job)?,
                kind: TaskKind::parse(&kind).ok_or_else(|| damaged(format!("task kind {kind:?}")))?,
            })
        })
        .collect()
}

/// The broker has the record.
pub async fn sent(conn: &mut Connection, id: i64) -> Result<()> {
    sqlx::query("DELETE FROM outbox WHERE id = ?").bind(id).execute(conn).await.db()?;
    Ok(())
}
