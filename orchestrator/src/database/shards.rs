//! Rows of `shards`: what is published, one row a shard.

use retort_core::{Result, id::JobId, state::Split};
use serde::{Deserialize, Serialize};
use sqlx::{Row as _, sqlite::SqliteRow};

use super::{Connection, DatabaseResult as _, signed, unsigned, unsigned32};

#[derive(Clone, Debug, PartialEq)]
pub struct Published {
    pub shard: u32,
    pub epoch: u64,
    pub key: String,
    pub sha256: String,
    pub bytes: u64,
    pub rows: u64,
    pub target_tokens: u64,
    /// SHA-256, in hexadecimal, of all that decides the content.
    pub work_sha256: Option<String>,
    /// `key` was computed for another job.
    pub reused: bool,
    /// SHA-256, in hexadecimal, of the weights of the teacher.
    pub teacher_sha256: Option<String>,
}

/// What storing a shard cost, as `retort.v1.Fidelity` has it; what was not finite is absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Fidelity {
    pub head_mass: Option<f64>,
    pub mean_abs_error: Option<f64>,
    pub argmax_agreement: Option<f64>,
    pub kl: Option<f64>,
}

/// What only publishing knows, beside [`Published`].
pub struct Measured {
    /// Of work, seconds.
    pub seconds: f64,
    pub fidelity: Fidelity,
    pub publish_ms: i64,
}

/// False when the shard was published before.
pub async fn insert(
    conn: &mut Connection,
    job: &JobId,
    split: Split,
    shard: &Published,
    measured: &Measured,
) -> Result<bool> {
    let finite = |value: f64| value.is_finite().then_some(value);
    let Fidelity { head_mass, mean_abs_error, argmax_agreement, kl } = measured.fidelity;
    let done = sqlx::query(
        "INSERT INTO shards (job_id, shard, split, epoch, object_key, sha256, bytes, row_count, target_tokens, seconds,
             head_mass, mean_abs_error, argmax_agreement, publish_ms, work_sha256, reused, kl, teacher_sha256)
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (job_id, shard) DO NOTHING",
    )
    .bind(job.as_str())
    .bind(shard.shard)
    .bind(split.as_str())
    .bind(signed(shard.epoch))
    .bind(&shard.key)
    .bind(&shard.sha256)
    .bind(signed(shard.bytes))
    .bind(signed(shard.rows))
    .bind(signed(shard.target_tokens))
    .bind(finite(measured.seconds).unwrap_or(0.0))
    .bind(head_mass.and_then(finite))
    .bind(mean_abs_error.and_then(finite))
    .bind(argmax_agreement.and_then(finite))
    .bind(measured.publish_ms)
    .bind(&shard.work_sha256)
    .bind(shard.reused)
    .bind(kl.and_then(finite))
    .bind(&shard.teacher_sha256)
    .execute(conn)
    .await
    .db()?;
    Ok(done.rows_affected() == 1)
}

pub async fn find(conn: &mut Connection, job: &JobId, shard: u32) -> Result<Option<Published>> {
    let row = sqlx::query("SELECT * FROM shards WHERE job_id = ? AND shard = ?").bind(job.as_str()).bind(shard);
    row.fetch_optional(conn).await.db()?.as_ref().map(read).transpose()
}

/// SHA-256 of the weights that the job's published shards were computed with, and one of these shards.
pub async fn teacher(conn: &mut Connection, job: &JobId) -> Result<Option<(String, u32)>> {
    let row: Option<(String, i64)> = sqlx::query_as(
        "SELECT teacher_sha256, shard FROM shards WHERE job_id = ? AND teacher_sha256 IS NOT NULL LIMIT 1",
    )
    .bind(job.as_str())
    .fetch_optional(conn)
    .await
    .db()?;
    row.map(|(sha256, shard)| Ok((sha256, unsigned32("shard", shard)?))).transpose()
}

/// The newest shard of this work that nobody found corrupt, whichever job published it.
pub async fn find_work(conn: &mut Connection, work_sha256: &str) -> Result<Option<(Published, Fidelity)>> {
    let row = sqlx::query(
        "SELECT * FROM shards WHERE work_sha256 = ? AND withdrawn = 0 ORDER BY publish_ms DESC, job_id DESC LIMIT 1",
    )
    .bind(work_sha256)
    .fetch_optional(conn)
    .await
    .db()?;
    row.as_ref().map(|row| Ok((read(row)?, read_fidelity(row)?))).transpose()
}

/// Whether another job may publish `shard` as its own: some job has, with the same bytes and work, and
/// nobody found it corrupt.
pub async fn is_reusable(conn: &mut Connection, shard: &Published) -> Result<bool> {
    let one: Option<i64> = sqlx::query_scalar(
        "SELECT 1 FROM shards WHERE object_key = ? AND work_sha256 = ? AND sha256 = ? AND bytes = ? AND row_count = ?
             AND target_tokens = ? AND withdrawn = 0 LIMIT 1",
    )
    .bind(&shard.key)
    .bind(&shard.work_sha256)
    .bind(&shard.sha256)
    .bind(signed(shard.bytes))
    .bind(signed(shard.rows))
    .bind(signed(shard.target_tokens))
    .fetch_optional(conn)
    .await
    .db()?;
    Ok(one.is_some())
}

/// From shard `from` on, in order of index, up to the first gap, at most `limit`.
pub async fn list_contiguous(conn: &mut Connection, job: &JobId, from: u32, limit: u32) -> Result<Vec<Published>> {
    let rows = sqlx::query("SELECT * FROM shards WHERE job_id = ? AND shard >= ? ORDER BY shard LIMIT ?")
        .bind(job.as_str())
        .bind(from)
        .bind(limit)
        .fetch_all(conn)
        .await
        .db()?;
    let mut shards = Vec::with_capacity(rows.len());
    for (expected, row) in (from..).zip(&rows) {
        let shard = read(row)?;
        if shard.shard != expected {
            break;
        }
        shards.push(shard);
    }
    Ok(shards)
}

pub async fn delete(conn: &mut Connection, job: &JobId, shard: u32) -> Result<()> {
    sqlx::query("DELETE FROM shards WHERE job_id = ? AND shard = ?")
        .bind(job.as_str())
        .bind(shard)
        .execute(conn)
        .await
        .db()?;
    Ok(())
}

/// No further job gets this object; those that hold it keep it.
pub async fn mark_withdrawn(conn: &mut Connection, key: &str) -> Result<()> {
    sqlx::query("UPDATE shards SET withdrawn = 1 WHERE object_key = ?").bind(key).execute(conn).await.db()?;
    Ok(())
}

/// Target tokens and seconds of the newest shards that this job computed, at most 101.
pub async fn recent(conn: &mut Connection, job: &JobId) -> Result<Vec<(u64, f64)>> {
    let rows: Vec<(i64, f64)> = sqlx::query_as(
        "SELECT target_tokens, seconds FROM shards WHERE job_id = ? AND reused = 0
         ORDER BY publish_ms DESC, shard LIMIT 101",
    )
    .bind(job.as_str())
    .fetch_all(conn)
    .await
    .db()?;
    rows.into_iter().map(|(tokens, seconds)| Ok((unsigned("target_tokens", tokens)?, seconds))).collect()
}

/// Target tokens and bytes of a split's published shards.
pub async fn totals(conn: &mut Connection, job: &JobId, split: Split) -> Result<(u64, u64)> {
    let (tokens, bytes): (i64, i64) = sqlx::query_as(
        "SELECT coalesce(sum(target_tokens), 0), coalesce(sum(bytes), 0) FROM shards WHERE job_id = ? AND split = ?",
    )
    .bind(job.as_str())
    .bind(split.as_str())
    .fetch_one(conn)
    .await
    .db()?;
    Ok((unsigned("target_tokens", tokens)?, unsigned("bytes", bytes)?))
}

/// Means over the target tokens of a split's published shards, as far as they were measured.
pub async fn mean_fidelity(conn: &mut Connection, job: &JobId, split: Split) -> Result<Fidelity> {
    let row = sqlx::query(
        "SELECT sum(head_mass * target_tokens) / sum(iif(head_mass IS NULL, 0, target_tokens)) AS head_mass,
             sum(mean_abs_error * target_tokens) / sum(iif(mean_abs_error IS NULL, 0, target_tokens)) AS mean_abs_error,
             sum(argmax_agreement * target_tokens) / sum(iif(argmax_agreement IS NULL, 0, target_tokens))
                 AS argmax_agreement,
             sum(kl * target_tokens) / sum(iif(kl IS NULL, 0, target_tokens)) AS kl
         FROM shards WHERE job_id = ? AND split = ?",
    )
    .bind(job.as_str())
    .bind(split.as_str())
    .fetch_one(conn)
    .await
    .db()?;
    read_fidelity(&row)
}

/// Keys of the published shards that another job had computed.
pub async fn reused_keys(conn: &mut Connection, job: &JobId) -> Result<Vec<String>> {
    sqlx::query_scalar("SELECT object_key FROM shards WHERE job_id = ? AND reused = 1")
        .bind(job.as_str())
        .fetch_all(conn)
        .await
        .db()
}

/// Keys below `prefix` that a published shard of any job lies at.
pub async fn keys_in_use(conn: &mut Connection, prefix: &str) -> Result<Vec<String>> {
    // Keys are ASCII, so every one of them sorts before the end.
    sqlx::query_scalar("SELECT DISTINCT object_key FROM shards WHERE object_key >= ? AND object_key < ?")
        .bind(prefix)
        .bind(format!("{prefix}\u{7f}"))
        .fetch_all(conn)
        .await
        .db()
}

fn read(row: &SqliteRow) -> Result<Published> {
    let text = |column: &str| row.try_get::<String, _>(column).db();
    let integer = |column: &str| row.try_get::<i64, _>(column).db();
    Ok(Published {
        shard: unsigned32("shard", integer("shard")?)?,
        epoch: unsigned("epoch", integer("epoch")?)?,
        key: text("object_key")?,
        sha256: text("sha256")?,
        bytes: unsigned("bytes", integer("bytes")?)?,
        rows: unsigned("row_count", integer("row_count")?)?,
        target_tokens: unsigned("target_tokens", integer("target_tokens")?)?,
        work_sha256: row.try_get("work_sha256").db()?,
        reused: row.try_get("reused").db()?,
        teacher_sha256: row.try_get("teacher_sha256").db()?,
    })
}

fn read_fidelity(row: &SqliteRow) -> Result<Fidelity> {
    let real = |column: &str| row.try_get::<Option<f64>, _>(column).db();
    Ok(Fidelity {
        head_mass: real("head_mass")?,
        mean_abs_error: real("mean_abs_error")?,
        argmax_agreement: real("argmax_agreement")?,
        kl: real("kl")?,
    })
}
