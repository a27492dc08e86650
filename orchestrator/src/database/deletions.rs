//! Rows of `deletions`: store prefixes that must go.

use retort_core::Result;

use super::{Connection, DatabaseResult as _};

pub async fn insert(conn: &mut Connection, prefix: &str, due_ms: i64) -> Result<()> {
    sqlx::query("INSERT INTO deletions (prefix, due_ms) VALUES (?, ?) ON CONFLICT DO NOTHING")
        .bind(prefix)
        .bind(due_ms)
        .execute(conn)
        .await
        .db()?;
    Ok(())
}

pub async fn due(conn: &mut Connection, now_ms: i64) -> Result<Vec<(String, i64)>> {
    sqlx::query_as("SELECT prefix, due_ms FROM deletions WHERE due_ms <= ? ORDER BY due_ms LIMIT 100")
        .bind(now_ms)
        .fetch_all(conn)
        .await
        .db()
}

pub async fn remove(conn: &mut Connection, prefix: &str, due_ms: i64) -> Result<()> {
    sqlx::query("DELETE FROM deletions WHERE prefix = ? AND due_ms = ?")
        .bind(prefix)
        .bind(due_ms)
        .execute(conn)
        .await
        .db()?;
    Ok(())
}
