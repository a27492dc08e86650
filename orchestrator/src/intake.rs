//! What a caller may ask of jobs: create, cancel, delete. And what a student may: withdraw a shard.

use std::{collections::BTreeSet, slice};

use retort_artifact::{paths, sha256_hex};
use retort_core::{
    Code, Error, Result,
    id::{JobId, TaskId},
    spec::JobSpec,
    state::{JobState, TaskKind, TaskState},
};

use crate::{
    admission,
    bus::topic,
    context::Context,
    database::{
        Connection, commit, deletions,
        jobs::{self, Job, NewJob},
        journal, models, shards, signed, tasks, to_json,
    },
    leases,
    planner::Plan,
};

/// What `create` answers.
pub enum Created {
    /// `validate_only`: nothing was stored.
    Planned(Box<Plan>),
    Job(Box<Job>),
}

/// Admits, plans and stores a job; it may be worked on at once.
///
/// `request_id` makes a repeated call safe: the first call's job is answered, or `request-reused`
/// when the spec differs.
pub async fn create(
    context: &Context,
    spec: JobSpec,
    request_id: Option<&str>,
    validate_only: bool,
) -> Result<Created> {
    let spec_sha256 = sha256_hex(to_json(&spec)?.as_bytes());
    if !validate_only && let Some(job) = find_repeated(context, request_id, &spec_sha256).await? {
        return Ok(Created::Job(Box::new(job)));
    }
    let admitted = admission::admit(context, &spec).await?;
    if validate_only {
        return Ok(Created::Planned(Box::new(admitted.plan)));
    }
    // Until the job is written, the janitor must not take its prompt set for one that nobody uses.
    let _prompt_sets = context.prompt_sets.read().await;
    let key = paths::prompt_set(&admitted.prompt_set_sha256);
    match context.store.put_new(&key, admitted.prompt_set).await {
        // Named by its content: what is there is the same.
        Err(error) if error.code == Code::ObjectExists => {}
        other => other?,
    }

    let id = JobId::generate();
    let mut tx = context.database.begin().await?;
    let now_ms = context.now_ms();
    if let Some(request_id) = request_id
        && let Some(job) = jobs::find_by_request(&mut tx, request_id).await?
    {
        // Two calls at once; the other one was faster.
        return same_request(job, request_id, &spec_sha256).map(|job| Created::Job(Box::new(job)));
    }
    let row = NewJob {
        id: &id,
        spec: &spec,
        spec_sha256: &spec_sha256,
        request_id,
        plan: &admitted.plan,
        prompt_set_sha256: &admitted.prompt_set_sha256,
        create_ms: now_ms,
    };
    jobs::insert(&mut tx, &row).await?;
    tasks::insert_all(&mut tx, &id, &admitted.tasks, |kind| topic(&spec, kind)).await?;
    let job = jobs::get(&mut tx, &id).await?;
    commit(tx).await?;
    context.wakers.job_changed(&id);
    tracing::info!(job = %id, name = spec.name, shards = job.plan.shards(), steps = job.plan.optimizer_steps, "created");
    Ok(Created::Job(Box::new(job)))
}

async fn find_repeated(context: &Context, request_id: Option<&str>, spec_sha256: &str) -> Result<Option<Job>> {
    let Some(request_id) = request_id else { return Ok(None) };
    let found = jobs::find_by_request(&mut *context.database.read().await?, request_id).await?;
    found.map(|job| same_request(job, request_id, spec_sha256)).transpose()
}

fn same_request(job: Job, request_id: &str, spec_sha256: &str) -> Result<Job> {
    if job.spec_sha256 == spec_sha256 {
        Ok(job)
    } else {
        Err(Error::new(
            Code::RequestReused,
            format!(
                "request_id {request_id} was used for {} with another spec; make a new id for a new job",
                job.id.resource_name()
            ),
        ))
    }
}

/// Ends a job and everything it still had to do. A job that has ended, or whose candidate is being
/// promoted, is answered as it is.
pub async fn cancel(context: &Context, id: &JobId) -> Result<Job> {
    let mut tx = context.database.begin().await?;
    let job = jobs::get(&mut tx, id).await?;
    if job.state.is_final() || models::find_by_job(&mut tx, id).await?.is_some() {
        return Ok(job);
    }
    tasks::cancel_all(&mut tx, id).await?;
    journal::change_state(&mut tx, id, JobState::Cancelled, None, context.now_ms()).await?;
    let job = jobs::get(&mut tx, id).await?;
    commit(tx).await?;
    context.wakers.job_changed(id);
    tracing::info!(job = %id, "cancelled");
    Ok(job)
}

/// Removes an ended job, its rows at once, its objects by the janitor. Promoted models stay.
pub async fn delete(context: &Context, id: &JobId) -> Result<()> {
    let now_ms = context.now_ms();
    let mut tx = context.database.begin().await?;
    let job = jobs::get(&mut tx, id).await?;
    if !job.state.is_final() {
        return Err(Error::new(
            Code::JobNotFinal,
            format!("{} is {}; cancel it first, or wait until it has ended", id.resource_name(), job.state),
        ));
    }
    let reused = shards::reused_keys(&mut tx, id).await?;
    jobs::delete(&mut tx, id).await?;
    release(&mut tx, &reused, now_ms).await?;
    // An attempt that has not yet heard of the end may write until its lease is over.
    let later_ms = now_ms.saturating_add(context.settings.lease_ms().saturating_mul(4));
    for prefix in [paths::job_prefix(id.as_str()), paths::quarantine_prefix(id.as_str())] {
        deletions::insert(&mut tx, &prefix, now_ms).await?;
        deletions::insert(&mut tx, &prefix, later_ms).await?;
    }
    if !jobs::uses_prompt_set(&mut tx, &job.prompt_set_sha256).await? {
        deletions::insert(&mut tx, &paths::prompt_set(&job.prompt_set_sha256), now_ms).await?;
    }
    commit(tx).await?;
    context.wakers.job_changed(id);
    tracing::info!(job = %id, "deleted");
    Ok(())
}

/// Has what a deleted job left swept again, after these keys of its shards lost a job that reused them.
/// The objects of a job that is still there go with that job.
async fn release(conn: &mut Connection, keys: &[String], now_ms: i64) -> Result<()> {
    let owners: BTreeSet<&str> =
        keys.iter().filter_map(|key| paths::parse_shard(key)).map(|(owner, ..)| owner).collect();
    for owner in owners {
        if jobs::find(&mut *conn, &owner.parse()?).await?.is_none() {
            deletions::insert(&mut *conn, &paths::shards_prefix(owner), now_ms).await?;
        }
    }
    Ok(())
}

/// Takes a published shard back because its bytes are not what was written; it is computed again.
/// A shard that is not published with this epoch (any more) is left as it is. Other jobs that hold the
/// same object keep it, until their own students find it corrupt; no further job gets it.
pub async fn withdraw(context: &Context, id: &JobId, shard: u32, epoch: u64, worker: &str, reason: &str) -> Result<()> {
    let mut tx = context.database.begin().await?;
    let job = jobs::get(&mut tx, id).await?;
    let published = shards::find(&mut tx, id, shard).await?.filter(|published| published.epoch == epoch);
    let task = tasks::find(&mut tx, &TaskId::shard(id, shard)).await?;
    let (Some(published), Some(task)) = (published, task) else { return Ok(()) };
    if job.state.is_final() || task.kind != TaskKind::Shard || task.state != TaskState::Done {
        return Ok(());
    }
    shards::delete(&mut tx, id, shard).await?;
    shards::mark_withdrawn(&mut tx, &published.key).await?;
    if published.reused {
        release(&mut tx, slice::from_ref(&published.key), context.now_ms()).await?;
    }
    jobs::add_published(&mut tx, id, -1, -signed(published.target_tokens), -signed(published.bytes)).await?;
    tasks::void_attempts(&mut tx, &task.id).await?;
    let reason = format!("corrupt: {reason}");
    leases::lose(context, &mut tx, &task, &reason).await?;
    leases::advance(&mut tx, &job).await?;
    commit(tx).await?;
    context.wakers.job_changed(id);
    tracing::warn!(job = %id, task = task.id.short(), epoch, worker, "a published shard was withdrawn: {reason}");
    Ok(())
}

#[cfg(test)]
mod tests;
