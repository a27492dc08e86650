//! Rows of `models`: versions reserved for a candidate, and promoted ones.

use retort_core::{Result, id::JobId};

use super::{Connection, DatabaseResult as _, from_json, jobs::parse_id, to_json, unsigned32};
use crate::report::Quality;

#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    pub name: String,
    pub version: u32,
    pub job_id: JobId,
    /// Prefix of the Hugging Face folder in the store.
    pub key: String,
    pub quality: Quality,
    /// Absent while the version is only reserved.
    pub promote_ms: Option<i64>,
}

impl Model {
    pub fn resource_name(&self) -> String {
        format!("models/{}/versions/{}", self.name, self.version)
    }
}

/// The version reserved for a job, promoted or not.
pub async fn find_by_job(conn: &mut Connection, job: &JobId) -> Result<Option<Model>> {
    let row: Option<Columns> = sqlx::query_as(
        "SELECT name, version, job_id, object_key, quality_json, promote_ms FROM models WHERE job_id = ?",
    )
    .bind(job.as_str())
    .fetch_optional(conn)
    .await
    .db()?;
    row.map(read).transpose()
}

/// The highest version of a name, reserved ones included; 0 when there is none.
pub async fn newest_version(conn: &mut Connection, name: &str) -> Result<u32> {
    let version: i64 = sqlx::query_scalar("SELECT coalesce(max(version), 0) FROM models WHERE name = ?")
        .bind(name)
        .fetch_one(conn)
        .await
        .db()?;
    unsigned32("version", version)
}

/// Reserves a version, in place of the one the job had reserved before.
pub async fn reserve(conn: &mut Connection, model: &Model) -> Result<()> {
    sqlx::query(
        "INSERT INTO models (name, version, job_id, object_key, quality_json) VALUES (?, ?, ?, ?, ?)
         ON CONFLICT (job_id) DO UPDATE SET version = excluded.version, object_key = excluded.object_key",
    )
    .bind(&model.name)
    .bind(model.version)
    .bind(model.job_id.as_str())
    .bind(&model.key)
    .bind(to_json(&model.quality)?)
    .execute(conn)
    .await
    .db()?;
    Ok(())
}

pub async fn set_promoted(conn: &mut Connection, job: &JobId, now_ms: i64) -> Result<()> {
    sqlx::query("UPDATE models SET promote_ms = ? WHERE job_id = ?")
        .bind(now_ms)
        .bind(job.as_str())
        .execute(conn)
        .await
        .db()?;
    Ok(())
}

/// Gives a reserved version up.
pub async fn release(conn: &mut Connection, job: &JobId) -> Result<()> {
    sqlx::query("DELETE FROM models WHERE job_id = ? AND promote_ms IS NULL")
        .bind(job.as_str())
        .execute(conn)
        .await
        .db()?;
    Ok(())
}

/// Promoted versions by name, newest first within one, those after `(name, version)`.
pub async fn list(conn: &mut Connection, after: Option<(&str, u32)>, limit: u32) -> Result<Vec<Model>> {
    let (name, version) = after.unwrap_or(("", 0));
    let rows: Vec<Columns> = sqlx::query_as(
        "SELECT name, version, job_id, object_key, quality_json, promote_ms FROM models
         WHERE promote_ms IS NOT NULL AND (name > ?1 OR (name = ?1 AND version < ?2))
         ORDER BY name, version DESC LIMIT ?3",
    )
    .bind(name)
    .bind(version)
    .bind(limit)
    .fetch_all(conn)
    .await
    .db()?;
    rows.into_iter().map(read).collect()
}

/// A promoted version, the newest when none is named.
pub async fn find(conn: &mut Connection, name: &str, version: Option<u32>) -> Result<Option<Model>> {
    let row: Option<Columns> = sqlx::query_as(
        "SELECT name, version, job_id, object_key, quality_json, promote_ms FROM models
         WHERE promote_ms IS NOT NULL AND name = ?1 AND (?2 IS NULL OR version = ?2) ORDER BY version DESC LIMIT 1",
    )
    .bind(name)
    .bind(version)
    .fetch_optional(conn)
    .await
    .db()?;
    row.map(read).transpose()
}

type Columns = (String, i64, String, String, String, Option<i64>);

fn read((name, version, job_id, key, quality, promote_ms): Columns) -> Result<Model> {
    Ok(Model {
        name,
        version: unsigned32("version", version)?,
        job_id: parse_id(&job_id)?,
        key,
        quality: from_json("quality_json", &quality)?,
        promote_ms,
    })
}
