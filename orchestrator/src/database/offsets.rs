//! How far the event topic was read, what was applied and what was skipped.

use retort_core::{Result, id::JobId};

use super::{Connection, DatabaseResult as _};

/// `(partition, next offset)` of every partition read so far.
pub async fn list(conn: &mut Connection) -> Result<Vec<(i32, i64)>> {
    sqlx::query_as("SELECT partition, next_offset FROM event_offsets ORDER BY partition").fetch_all(conn).await.db()
}

/// Moves backwards too: a broker that lost its log counts from the start again.
pub async fn store(conn: &mut Connection, partition: i32, next_offset: i64) -> Result<()> {
    sqlx::query(
        "INSERT INTO event_offsets (partition, next_offset) VALUES (?, ?)
         ON CONFLICT (partition) DO UPDATE SET next_offset = excluded.next_offset",
    )
    .bind(partition)
    .bind(next_offset)
    .execute(conn)
    .await
    .db()?;
    Ok(())
}

/// False when the event was applied before.
pub async fn mark_applied(conn: &mut Connection, event_id: &str, job: &JobId) -> Result<bool> {
    let done = sqlx::query("INSERT INTO applied_events (event_id, job_id) VALUES (?, ?) ON CONFLICT DO NOTHING")
        .bind(event_id)
        .bind(job.as_str())
        .execute(conn)
        .await
        .db()?;
    Ok(done.rows_affected() == 1)
}

pub async fn skip(conn: &mut Connection, partition: i32, offset: i64, reason: &str, now_ms: i64) -> Result<()> {
    sqlx::query(
        "INSERT INTO skipped_records (partition, record_offset, time_ms, reason) VALUES (?, ?, ?, ?)
         ON CONFLICT DO UPDATE SET time_ms = excluded.time_ms, reason = excluded.reason",
    )
    .bind(partition)
    .bind(offset)
    .bind(now_ms)
    .bind(reason)
    .execute(conn)
    .await
    .db()?;
    Ok(())
}

pub async fn count_skipped(conn: &mut Connection) -> Result<i64> {
    sqlx::query_scalar("SELECT count(*) FROM skipped_records").fetch_one(conn).await.db()
}
