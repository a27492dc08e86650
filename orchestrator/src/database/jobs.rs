//! Rows of `jobs`.

use retort_core::{Code, Error, Result, id::JobId, spec::JobSpec, state::JobState};
use sqlx::{Row as _, sqlite::SqliteRow};

use super::{Connection, DatabaseResult as _, damaged, from_json, signed, to_json, unsigned, unsigned32};
use crate::{
    planner::Plan,
    report::{Evaluation, Report, TrainFinish},
};

/// A job as the database knows it; times are milliseconds since the Unix epoch.
#[derive(Clone, Debug)]
pub struct Job {
    pub id: JobId,
    pub spec: JobSpec,
    pub spec_sha256: String,
    pub plan: Plan,
    pub prompt_set_sha256: String,
    pub state: JobState,
    pub create_ms: i64,
    pub start_ms: Option<i64>,
    pub end_ms: Option<i64>,
    /// Code and message; the code is one of [`Code`] or a newer worker's.
    pub error: Option<(String, String)>,
    pub last_sequence: u64,
    pub shards_published: u32,
    pub target_tokens: u64,
    pub store_bytes: u64,
    pub training: Training,
    pub checkpoint_key: Option<String>,
    pub train_finish: Option<TrainFinish>,
    pub evaluation: Option<Evaluation>,
    pub report: Option<Report>,
}

/// Training as the newest step reported it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Training {
    pub step: u32,
    pub loss: Option<f64>,
    pub tokens_per_second: Option<f64>,
    pub processed_tokens: u64,
    pub held_out_kl: Option<f64>,
}

/// What `CreateJob` writes.
pub struct NewJob<'a> {
    pub id: &'a JobId,
    pub spec: &'a JobSpec,
    pub spec_sha256: &'a str,
    pub request_id: Option<&'a str>,
    pub plan: &'a Plan,
    pub prompt_set_sha256: &'a str,
    pub create_ms: i64,
}

pub async fn insert(conn: &mut Connection, job: &NewJob<'_>) -> Result<()> {
    sqlx::query(
        "INSERT INTO jobs (id, name, request_id, spec_json, spec_sha256, plan_json, prompt_set_sha256, state, create_ms)
         VALUES (?, ?, ?, ?, ?, ?, ?, 'queued', ?)",
    )
    .bind(job.id.as_str())
    .bind(&job.spec.name)
    .bind(job.request_id)
    .bind(to_json(job.spec)?)
    .bind(job.spec_sha256)
    .bind(to_json(job.plan)?)
    .bind(job.prompt_set_sha256)
    .bind(job.create_ms)
    .execute(conn)
    .await
    .db()?;
    Ok(())
}

pub async fn find(conn: &mut Connection, id: &JobId) -> Result<Option<Job>> {
    let row = sqlx::query("SELECT * FROM jobs WHERE id = ?").bind(id.as_str()).fetch_optional(conn).await.db()?;
    row.as_ref().map(read).transpose()
}

/// `job-not-found` when there is none.
pub async fn get(conn: &mut Connection, id: &JobId) -> Result<Job> {
    find(conn, id).await?.ok_or_else(|| {
        Error::new(
            Code::JobNotFound,
            format!("there is no {}; `retort job list` shows those there are", id.resource_name()),
        )
    })
}

pub async fn find_by_request(conn: &mut Connection, request_id: &str) -> Result<Option<Job>> {
    let row =
        sqlx::query("SELECT * FROM jobs WHERE request_id = ?").bind(request_id).fetch_optional(conn).await.db()?;
    row.as_ref().map(read).transpose()
}

/// Newest first, those with an id below `before`.
pub async fn list(
    conn: &mut Connection,
    state: Option<JobState>,
    before: Option<&JobId>,
    limit: u32,
) -> Result<Vec<Job>> {
    // Ids are of hexadecimal digits, so every one of them sorts before "g".
    let before = before.map_or("g", JobId::as_str);
    let rows = match state {
        Some(state) => {
            sqlx::query("SELECT * FROM jobs WHERE state = ? AND id < ? ORDER BY id DESC LIMIT ?")
                .bind(state.as_str())
                .bind(before)
                .bind(limit)
                .fetch_all(conn)
                .await
        }
        None => {
            sqlx::query("SELECT * FROM jobs WHERE id < ? ORDER BY id DESC LIMIT ?")
                .bind(before)
                .bind(limit)
                .fetch_all(conn)
                .await
        }
    };
    rows.db()?.iter().map(read).collect()
}

pub async fn set_state(
    conn: &mut Connection,
    id: &JobId,
    state: JobState,
    error: Option<(&str, &str)>,
    now_ms: i64,
) -> Result<()> {
    let (code, message) = error.unzip();
    sqlx::query(
        "UPDATE jobs SET state = ?, error_code = ?, error_message = ?,
             start_ms = CASE WHEN ? THEN coalesce(start_ms, ?) ELSE start_ms END,
             end_ms = CASE WHEN ? THEN ? ELSE end_ms END
         WHERE id = ?",
    )
    .bind(state.as_str())
    .bind(code)
    .bind(message)
    .bind(state == JobState::Running)
    .bind(now_ms)
    .bind(state.is_final())
    .bind(now_ms)
    .bind(id.as_str())
    .execute(conn)
    .await
    .db()?;
    Ok(())
}

/// One training step's report. Those of one attempt may come in any order: the highest step counts.
pub struct Step {
    pub step: u32,
    pub loss: f64,
    pub tokens_per_second: f64,
    pub processed_tokens: u64,
    pub held_out_kl: Option<f64>,
}

/// The attempt at training with this epoch reports. What it says stands for all that others said before: it may have
/// gone back to an older checkpoint.
pub async fn enter_training(conn: &mut Connection, id: &JobId, epoch: u64) -> Result<()> {
    sqlx::query(
        "UPDATE jobs SET step_epoch = ?1, step = 0, processed_tokens = 0, held_out_kl_step = NULL
         WHERE id = ?2 AND step_epoch < ?1",
    )
    .bind(signed(epoch))
    .bind(id.as_str())
    .execute(conn)
    .await
    .db()?;
    Ok(())
}

pub async fn record_step(conn: &mut Connection, id: &JobId, step: &Step) -> Result<()> {
    sqlx::query(
        "UPDATE jobs SET
             train_loss = CASE WHEN ?1 >= step THEN ?2 ELSE train_loss END,
             student_rate = CASE WHEN ?1 >= step THEN ?3 ELSE student_rate END,
             processed_tokens = max(processed_tokens, ?4),
             held_out_kl = CASE WHEN ?5 IS NOT NULL AND ?1 >= coalesce(held_out_kl_step, 0) THEN ?5 ELSE held_out_kl END,
             held_out_kl_step = CASE WHEN ?5 IS NOT NULL THEN max(coalesce(held_out_kl_step, 0), ?1) ELSE held_out_kl_step END,
             step = max(step, ?1)
         WHERE id = ?6",
    )
    .bind(step.step)
    .bind(finite(step.loss))
    .bind(finite(step.tokens_per_second))
    .bind(signed(step.processed_tokens))
    .bind(step.held_out_kl.and_then(finite))
    .bind(id.as_str())
    .execute(conn)
    .await
    .db()?;
    Ok(())
}

pub async fn record_checkpoint(conn: &mut Connection, id: &JobId, step: u32, key: &str) -> Result<()> {
    sqlx::query(
        "UPDATE jobs SET checkpoint_step = ?1, checkpoint_key = ?2 WHERE id = ?3 AND coalesce(checkpoint_step, -1) <= ?1",
    )
    .bind(step)
    .bind(key)
    .bind(id.as_str())
    .execute(conn)
    .await
    .db()?;
    Ok(())
}

pub async fn record_train_finish(conn: &mut Connection, id: &JobId, finish: &TrainFinish) -> Result<()> {
    sqlx::query("UPDATE jobs SET train_finish_json = ?, processed_tokens = max(processed_tokens, ?) WHERE id = ?")
        .bind(to_json(finish)?)
        .bind(signed(finish.processed_tokens))
        .bind(id.as_str())
        .execute(conn)
        .await
        .db()?;
    Ok(())
}

pub async fn record_evaluation(conn: &mut Connection, id: &JobId, evaluation: &Evaluation) -> Result<()> {
    sqlx::query("UPDATE jobs SET evaluation_json = ? WHERE id = ?")
        .bind(to_json(evaluation)?)
        .bind(id.as_str())
        .execute(conn)
        .await
        .db()?;
    Ok(())
}

pub async fn record_report(conn: &mut Connection, id: &JobId, report: &Report) -> Result<()> {
    sqlx::query("UPDATE jobs SET report_json = ? WHERE id = ?")
        .bind(to_json(report)?)
        .bind(id.as_str())
        .execute(conn)
        .await
        .db()?;
    Ok(())
}

/// Adds to (or, a shard being withdrawn, takes from) the sums over published shards.
pub async fn add_published(conn: &mut Connection, id: &JobId, shards: i64, tokens: i64, bytes: i64) -> Result<()> {
    sqlx::query(
        "UPDATE jobs SET shards_published = shards_published + ?, target_tokens = target_tokens + ?,
             store_bytes = store_bytes + ? WHERE id = ?",
    )
    .bind(shards)
    .bind(tokens)
    .bind(bytes)
    .bind(id.as_str())
    .execute(conn)
    .await
    .db()?;
    Ok(())
}

/// Running jobs whose evaluation is in and whose every task is done: ready to be judged.
pub async fn judgeable(conn: &mut Connection) -> Result<Vec<JobId>> {
    let ids: Vec<String> = sqlx::query_scalar(
        "SELECT id FROM jobs WHERE state = 'running' AND evaluation_json IS NOT NULL
             AND NOT EXISTS (SELECT 1 FROM tasks WHERE tasks.job_id = jobs.id AND tasks.state <> 'done' AND tasks.kind <> 'replica')
         ORDER BY id",
    )
    .fetch_all(conn)
    .await
    .db()?;
    ids.iter().map(|id| parse_id(id)).collect()
}

/// Jobs that ended before `ended_before_ms` and were not tidied yet.
pub async fn untidy(conn: &mut Connection, ended_before_ms: i64) -> Result<Vec<JobId>> {
    let ids: Vec<String> =
        sqlx::query_scalar("SELECT id FROM jobs WHERE end_ms < ? AND cleaned_ms IS NULL ORDER BY id LIMIT 100")
            .bind(ended_before_ms)
            .fetch_all(conn)
            .await
            .db()?;
    ids.iter().map(|id| parse_id(id)).collect()
}

pub async fn set_cleaned(conn: &mut Connection, id: &JobId, now_ms: i64) -> Result<()> {
    sqlx::query("UPDATE jobs SET cleaned_ms = ? WHERE id = ?")
        .bind(now_ms)
        .bind(id.as_str())
        .execute(conn)
        .await
        .db()?;
    Ok(())
}

/// Removes the job and everything that hangs on it, promoted models excepted.
pub async fn delete(conn: &mut Connection, id: &JobId) -> Result<()> {
    sqlx::query("DELETE FROM jobs WHERE id = ?").bind(id.as_str()).execute(conn).await.db()?;
    Ok(())
}

pub async fn uses_prompt_set(conn: &mut Connection, sha256: &str) -> Result<bool> {
    let one: Option<i64> = sqlx::query_scalar("SELECT 1 FROM jobs WHERE prompt_set_sha256 = ? LIMIT 1")
        .bind(sha256)
        .fetch_optional(conn)
        .await
        .db()?;
    Ok(one.is_some())
}

pub(super) fn parse_id(text: &str) -> Result<JobId> {
    text.parse().map_err(|_| damaged(format!("job id {text:?}")))
}

/// NaN and infinities are stored as NULL.
fn finite(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
}

fn read(row: &SqliteRow) -> Result<Job> {
    let text = |column: &str| row.try_get::<String, _>(column).db();
    let optional = |column: &str| row.try_get::<Option<String>, _>(column).db();
    let integer = |column: &str| row.try_get::<i64, _>(column).db();
    let optional_integer = |column: &str| row.try_get::<Option<i64>, _>(column).db();
    let real = |column: &str| row.try_get::<Option<f64>, _>(column).db();
    let state = text("state")?;
    Ok(Job {
        id: parse_id(&text("id")?)?,
        spec: from_json("spec_json", &text("spec_json")?)?,
        spec_sha256: text("spec_sha256")?,
        plan: from_json("plan_json", &text("plan_json")?)?,
        prompt_set_sha256: text("prompt_set_sha256")?,
        state: JobState::parse(&state).ok_or_else(|| damaged(format!("job state {state:?}")))?,
        create_ms: integer("create_ms")?,
        start_ms: optional_integer("start_ms")?,
        end_ms: optional_integer("end_ms")?,
        error: optional("error_code")?.zip(optional("error_message")?),
        last_sequence: unsigned("last_sequence", integer("last_sequence")?)?,
        shards_published: unsigned32("shards_published", integer("shards_published")?)?,
        target_tokens: unsigned("target_tokens", integer("target_tokens")?)?,
        store_bytes: unsigned("store_bytes", integer("store_bytes")?)?,
        training: Training {
            step: unsigned32("step", integer("step")?)?,
            loss: real("train_loss")?,
            tokens_per_second: real("student_rate")?,
            processed_tokens: unsigned("processed_tokens", integer("processed_tokens")?)?,
            held_out_kl: real("held_out_kl")?,
        },
        checkpoint_key: optional("checkpoint_key")?,
        train_finish: json(optional("train_finish_json")?, "train_finish_json")?,
        evaluation: json(optional("evaluation_json")?, "evaluation_json")?,
        report: json(optional("report_json")?, "report_json")?,
    })
}

fn json<T: serde::de::DeserializeOwned>(text: Option<String>, column: &str) -> Result<Option<T>> {
    text.map(|text| from_json(column, &text)).transpose()
}
