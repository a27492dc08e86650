//! Rows of `job_events`: what `WatchJob` streams.

use prost::Message as _;
use retort_core::{
    Result,
    id::JobId,
    state::JobState,
    wire::{job_state_to_proto, timestamp_to_proto},
};
use retort_proto::{self as proto, job_event::What};

use super::{Connection, DatabaseResult as _, damaged, jobs, signed};
use crate::{
    progress,
    to_proto::{error_to_proto, progress_to_proto, redone_to_proto},
};

/// Adds an event with the job's state and progress as they stand in this transaction.
pub async fn append(conn: &mut Connection, id: &JobId, now_ms: i64, what: What) -> Result<()> {
    let job = jobs::get(&mut *conn, id).await?;
    let progress = progress::of(&mut *conn, &job).await?;
    let sequence = job.last_sequence + 1;
    let event = proto::JobEvent {
        sequence,
        time: Some(timestamp_to_proto(now_ms)),
        state: job_state_to_proto(job.state) as i32,
        progress: Some(progress_to_proto(&progress)),
        what: Some(what),
    };
    sqlx::query("INSERT INTO job_events (job_id, sequence, payload) VALUES (?, ?, ?)")
        .bind(id.as_str())
        .bind(signed(sequence))
        .bind(event.encode_to_vec())
        .execute(&mut *conn)
        .await
        .db()?;
    sqlx::query("UPDATE jobs SET last_sequence = ? WHERE id = ?")
        .bind(signed(sequence))
        .bind(id.as_str())
        .execute(conn)
        .await
        .db()?;
    Ok(())
}

/// Brings the job to another state and says so.
pub async fn change_state(
    conn: &mut Connection,
    id: &JobId,
    to: JobState,
    error: Option<(&str, &str)>,
    now_ms: i64,
) -> Result<()> {
    let from = jobs::get(&mut *conn, id).await?.state;
    jobs::set_state(&mut *conn, id, to, error, now_ms).await?;
    let what = What::StateChanged(proto::StateChanged {
        from: job_state_to_proto(from) as i32,
        to: job_state_to_proto(to) as i32,
        error: error.map(|(code, message)| error_to_proto(code, message)),
    });
    append(conn, id, now_ms, what).await
}

/// Notes an attempt as lost, once.
pub async fn attempt_lost(conn: &mut Connection, task: &super::tasks::Task, reason: &str, now_ms: i64) -> Result<()> {
    if !super::tasks::insert_redone(&mut *conn, task, reason, now_ms).await? {
        return Ok(());
    }
    let redone = crate::report::Redone {
        task: task.id.short().to_owned(),
        epoch: task.epoch,
        worker: task.worker().to_owned(),
        reason: reason.to_owned(),
    };
    let what = What::AttemptLost(proto::AttemptLost { redone: Some(redone_to_proto(&redone)) });
    append(conn, &task.job_id, now_ms, what).await
}

/// Events after a sequence, in order.
pub async fn list(conn: &mut Connection, id: &JobId, after: u64, limit: u32) -> Result<Vec<proto::JobEvent>> {
    let rows: Vec<Vec<u8>> = sqlx::query_scalar(
        "SELECT payload FROM job_events WHERE job_id = ? AND sequence > ? ORDER BY sequence LIMIT ?",
    )
    .bind(id.as_str())
    .bind(signed(after))
    .bind(limit)
    .fetch_all(conn)
    .await
    .db()?;
    rows.iter()
        .map(|payload| {
            proto::JobEvent::decode(payload.as_slice()).map_err(|error| damaged(format!("a job event: {error}")))
        })
        .collect()
}
