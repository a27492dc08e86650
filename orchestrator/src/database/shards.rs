//! Rows of `shards`: what is published, one row a shard.

use retort_core::{Result, id::JobId, state::Split};

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
}

/// What only publishing knows, beside [`Published`].
pub struct Measured {
    /// Of work, seconds.
    pub seconds: f64,
    /// Mean mass of the exact head, mean |error| of a log-probability in nats, share of positions
    /// whose most likely token survived.
    pub fidelity: Option<(f64, f64, f64)>,
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
    let fidelity = measured.fidelity;
    let done = sqlx::query(
        "INSERT INTO shards (job_id, shard, split, epoch, object_key, sha256, bytes, row_count, target_tokens, seconds,
             head_mass, mean_abs_error, argmax_agreement, publish_ms)
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (job_id, shard) DO NOTHING",
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
    .bind(fidelity.and_then(|f| finite(f.0)))
    .bind(fidelity.and_then(|f| finite(f.1)))
    .bind(fidelity.and_then(|f| finite(f.2)))
    .bind(measured.publish_ms)
    .execute(conn)
    .await
    .db()?;
    Ok(done.rows_affected() == 1)
}

pub async fn find(conn: &mut Connection, job: &JobId, shard: u32) -> Result<Option<Published>> {
    let row: Option<Columns> = sqlx::query_as(
        "SELECT shard, epoch, object_key, sha256, bytes, row_count, target_tokens FROM shards WHERE job_id = ? AND shard = ?",
    )
    .bind(job.as_str())
    .bind(shard)
    .fetch_optional(conn)
    .await
    .db()?;
    row.map(read).transpose()
}

/// From shard `from` on, in order of index, up to the first gap, at most `limit`.
pub async fn list_contiguous(conn: &mut Connection, job: &JobId, from: u32, limit: u32) -> Result<Vec<Published>> {
    let rows: Vec<Columns> = sqlx::query_as(
        "SELECT shard, epoch, object_key, sha256, bytes, row_count, target_tokens FROM shards
         WHERE job_id = ? AND shard >= ? ORDER BY shard LIMIT ?",
    )
    .bind(job.as_str())
    .bind(from)
    .bind(limit)
    .fetch_all(conn)
    .await
    .db()?;
    let mut shards = Vec::with_capacity(rows.len());
    for (expected, row) in (from..).zip(rows) {
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

/// Target tokens and seconds of the newest published shards, at most 101.
pub async fn recent(conn: &mut Connection, job: &JobId) -> Result<Vec<(u64, f64)>> {
    let rows: Vec<(i64, f64)> = sqlx::query_as(
        "SELECT target_tokens, seconds FROM shards WHERE job_id = ? ORDER BY publish_ms DESC, shard LIMIT 101",
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

/// Keys of every published shard.
pub async fn keys(conn: &mut Connection, job: &JobId) -> Result<Vec<String>> {
    sqlx::query_scalar("SELECT object_key FROM shards WHERE job_id = ?").bind(job.as_str()).fetch_all(conn).await.db()
}

type Columns = (i64, i64, String, String, i64, i64, i64);

fn read((shard, epoch, key, sha256, bytes, rows, target_tokens): Columns) -> Result<Published> {
    Ok(Published {
        shard: unsigned32("shard", shard)?,
        epoch: unsigned("epoch", epoch)?,
        key,
        sha256,
        bytes: unsigned("bytes", bytes)?,
        rows: unsigned("row_count", rows)?,
        target_tokens: unsigned("target_tokens", target_tokens)?,
    })
}
