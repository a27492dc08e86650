//! Promotion: the gates judge, then the candidate becomes a numbered version, or stays a candidate, whose folder is
//! made like a version's and says that it is none.
//!
//! Each step may be repeated after a crash. A version is reserved in the database (from then on the
//! job cannot be cancelled), the candidate's folder is copied to it and gets its model card, the pointer is written
//! with create-if-absent and last, and one transaction ends the job. A pointer of another job under the
//! reserved number (a database that was started anew over an old store) moves the reservation on.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use retort_artifact::paths;
use retort_core::{
    Code, Error, Kind, Result,
    id::JobId,
    state::{JobState, Split},
};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::{
    context::Context,
    database::{
        commit,
        jobs::{self, Job},
        journal,
        models::{self, Model},
        shards, tasks,
    },
    forecast, gates, model_card, progress,
    report::{Evaluation, Quality, Report, SoftTargets, TrainFinish},
    retry::Backoff,
};

/// Largest pointer read, bytes.
const MAX_POINTER_BYTES: u64 = 64 << 10;

/// `models/{name}/versions/{n}.json`: that it exists makes the version exist.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct Pointer {
    pub name: String,
    pub version: u32,
    /// Id of the job it came from.
    pub job: String,
    /// Prefix of the Hugging Face folder.
    pub folder: String,
    pub teacher: String,
    pub promote_ms: i64,
    pub quality: Quality,
}

/// Judges what is ready until `shutdown`.
pub async fn run(context: Context, shutdown: CancellationToken) -> Result<()> {
    let mut backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(30));
    loop {
        let judged = tokio::select! {
            biased;
            () = shutdown.cancelled() => return Ok(()),
            judged = judge_ready(&context) => judged,
        };
        let wait = match judged {
            Ok(()) => {
                backoff.reset();
                Duration::from_secs(2)
            }
            Err(error) => {
                tracing::warn!(code = %error.code, "a candidate could not be judged, trying again: {}", error.chain());
                backoff.wait()
            }
        };
        let woken = async {
            context.wakers.promotion.notified().await;
            // A failed promotion is not hurried by every event of other jobs.
            if wait > Duration::from_secs(2) {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            () = woken => {}
            () = tokio::time::sleep(wait) => {}
        }
    }
}

/// Judges every job that is ready; the first error that may pass is returned at the end.
pub async fn judge_ready(context: &Context) -> Result<()> {
    let ready = jobs::judgeable(&mut *context.database.read().await?).await?;
    let mut outcome = Ok(());
    for id in ready {
        match judge(context, &id).await {
            Ok(()) => {}
            // Its artefacts are gone or broken: trying again will not mend them.
            Err(error) if matches!(error.kind(), Kind::Corrupt | Kind::NotFound | Kind::Invalid) => {
                fail(context, &id, &error).await?;
            }
            Err(error) if outcome.is_ok() => outcome = Err(error),
            Err(_) => {}
        }
    }
    outcome
}

/// Judges one job and ends it.
pub async fn judge(context: &Context, id: &JobId) -> Result<()> {
    let job = jobs::get(&mut *context.database.read().await?, id).await?;
    let (Some(evaluation), Some(finish)) = (&job.evaluation, &job.train_finish) else {
        return Err(Error::internal(format!("{} has no evaluation to judge", id.resource_name())));
    };
    if job.state != JobState::Running {
        return Ok(());
    }
    let results = gates::judge(&job.spec.gates, &evaluation.before, &evaluation.after);
    let promoted = if gates::promotes(&results, &evaluation.after) {
        Some(promote(context, &job, finish, &evaluation.after).await?)
    } else {
        let folder = paths::candidate(id.as_str());
        fill(context, &job, finish, &folder, None).await?;
        None
    };
    let report = report(context, &job, evaluation, finish, results, promoted.as_ref()).await?;
    let bytes = serde_json::to_vec_pretty(&report)
        .map_err(|error| Error::internal(format!("the report cannot be written as JSON: {error}")))?;
    let key = paths::report(id.as_str());
    // A report of a try before a crash may know less (an attempt that was redone): it is replaced.
    match context.store.delete(&key).await {
        Err(error) if error.code == Code::ObjectNotFound => {}
        other => other?,
    }
    context.store.put_new(&key, Bytes::from(bytes)).await?;

    let now_ms = context.now_ms();
    let mut tx = context.database.begin().await?;
    if jobs::get(&mut tx, id).await?.state != JobState::Running {
        return Ok(());
    }
    jobs::record_report(&mut tx, id, &report).await?;
    let state = if promoted.is_some() {
        models::set_promoted(&mut tx, id, now_ms).await?;
        JobState::Succeeded
    } else {
        JobState::Rejected
    };
    journal::change_state(&mut tx, id, state, None, now_ms).await?;
    commit(tx).await?;
    context.wakers.job_changed(id);
    tracing::info!(job = %id, state = %state, promoted = report.promoted, "judged");
    Ok(())
}

/// Makes the candidate a version; the same one however often this is called.
async fn promote(context: &Context, job: &Job, finish: &TrainFinish, quality: &Quality) -> Result<Model> {
    loop {
        let model = reserve(context, job, quality).await?;
        let pointer_key = paths::model_version(&model.name, model.version);
        if let Some(pointer) = read_pointer(context, &pointer_key).await? {
            if pointer.job == job.id.as_str() {
                return Ok(model);
            }
            tracing::warn!(job = %job.id, "{pointer_key} is of job {}; taking the next number", pointer.job);
            move_on(context, &model).await?;
            continue;
        }
        fill(context, job, finish, &model.key, Some(model.version)).await?;
        let pointer = Pointer {
            name: model.name.clone(),
            version: model.version,
            job: job.id.as_str().to_owned(),
            folder: model.key.clone(),
            teacher: job.spec.teacher.model.clone(),
            promote_ms: context.now_ms(),
            quality: quality.clone(),
        };
        let bytes = serde_json::to_vec_pretty(&pointer)
            .map_err(|error| Error::internal(format!("the pointer cannot be written as JSON: {error}")))?;
        match context.store.put_new(&pointer_key, Bytes::from(bytes)).await {
            Ok(()) => return Ok(model),
            // Who was faster is found out above.
            Err(error) if error.code == Code::ObjectExists => {}
            Err(error) => return Err(error),
        }
    }
}

/// Copies the candidate into `folder`, with its adapters beside the weights and its card; without a `version` as one
/// that was not promoted.
async fn fill(context: &Context, job: &Job, finish: &TrainFinish, folder: &str, version: Option<u32>) -> Result<()> {
    let from = paths::model_prefix(&finish.checkpoint_key);
    // What an earlier, interrupted try copied is copied anew.
    context.store.delete_prefix(folder).await?;
    if context.store.copy_prefix(&from, folder).await? == 0 {
        return Err(Error::new(
            Code::ObjectNotFound,
            format!("the candidate's folder {from} is empty: there is nothing to promote or to keep"),
        ));
    }
    if job.spec.student.lora.is_some() {
        let adapters = paths::adapter_prefix(&finish.checkpoint_key);
        context.store.copy_prefix(&adapters, &paths::adapter_prefix(folder)).await?;
    }
    model_card::write(context, job, finish, folder, version).await
}

/// The job's version: reserved before, or the next free one in database and store.
async fn reserve(context: &Context, job: &Job, quality: &Quality) -> Result<Model> {
    if let Some(model) = models::find_by_job(&mut *context.database.read().await?, &job.id).await? {
        return Ok(model);
    }
    let stored = newest_stored(context, &job.spec.name).await?;
    let mut tx = context.database.begin().await?;
    if jobs::get(&mut tx, &job.id).await?.state != JobState::Running {
        return Err(Error::new(Code::JobCancelled, format!("{} has ended", job.id.resource_name())));
    }
    let version = models::newest_version(&mut tx, &job.spec.name).await?.max(stored).saturating_add(1);
    let model = Model {
        name: job.spec.name.clone(),
        version,
        job_id: job.id.clone(),
        key: paths::model_folder(&job.spec.name, version),
        quality: quality.clone(),
        promote_ms: None,
    };
    models::reserve(&mut tx, &model).await?;
    commit(tx).await?;
    Ok(model)
}

/// Reserves a number past everything in the store.
async fn move_on(context: &Context, taken: &Model) -> Result<()> {
    let stored = newest_stored(context, &taken.name).await?;
    let mut tx = context.database.begin().await?;
    let version = models::newest_version(&mut tx, &taken.name).await?.max(stored).saturating_add(1);
    let model = Model { version, key: paths::model_folder(&taken.name, version), ..taken.clone() };
    models::reserve(&mut tx, &model).await?;
    commit(tx).await
}

async fn newest_stored(context: &Context, name: &str) -> Result<u32> {
    let prefix = paths::model_versions_prefix(name);
    let entries = context.store.list(&prefix).await?;
    let number = |key: &str| key.strip_prefix(&prefix)?.strip_suffix(".json")?.parse::<u32>().ok();
    Ok(entries.iter().filter_map(|entry| number(&entry.key)).max().unwrap_or(0))
}

async fn read_pointer(context: &Context, key: &str) -> Result<Option<Pointer>> {
    match context.store.get(key, MAX_POINTER_BYTES).await {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|error| Error::new(Code::CheckpointCorrupt, format!("{key} is no version pointer: {error}"))),
        Err(error) if error.code == Code::ObjectNotFound => Ok(None),
        Err(error) => Err(error),
    }
}

async fn report(
    context: &Context,
    job: &Job,
    evaluation: &Evaluation,
    finish: &TrainFinish,
    results: Vec<crate::report::GateResult>,
    promoted: Option<&Model>,
) -> Result<Report> {
    let mut snapshot = context.database.read().await?;
    let recent = shards::recent(&mut snapshot, &job.id).await?;
    let redone = tasks::list_redone(&mut snapshot, &job.id).await?;
    let (train_tokens, train_bytes) = shards::totals(&mut snapshot, &job.id, Split::Train).await?;
    let soft_targets = SoftTargets {
        train: shards::mean_fidelity(&mut snapshot, &job.id, Split::Train).await?,
        held_out: shards::mean_fidelity(&mut snapshot, &job.id, Split::HeldOut).await?,
    };
    let reused = shards::reused_keys(&mut snapshot, &job.id).await?;
    let id = job.id.as_str();
    let (spec, curve) = (job.spec.clone(), finish.curve.clone());
    // A tenth of a second of arithmetic.
    let forecast = tokio::task::spawn_blocking(move || forecast::of(&spec, curve))
        .await
        .map_err(|error| Error::internal(format!("the forecast stopped: {error}")))?;
    let mut artifacts = BTreeMap::from([
        ("prompts".to_owned(), paths::prompt_set(&job.prompt_set_sha256)),
        ("shards".to_owned(), paths::shards_prefix(id)),
        ("checkpoint".to_owned(), finish.checkpoint_key.clone()),
        ("initial".to_owned(), finish.initial_key.clone()),
        ("report".to_owned(), paths::report(id)),
    ]);
    for (owner, ..) in reused.iter().filter_map(|key| paths::parse_shard(key)) {
        artifacts.insert(format!("shards of {owner}"), paths::shards_prefix(owner));
    }
    let model = promoted.map_or_else(|| paths::candidate(id), |model| model.key.clone());
    artifacts.insert("model".to_owned(), model);
    Ok(Report {
        before: evaluation.before.clone(),
        after: evaluation.after.clone(),
        before_by_tag: evaluation.before_by_tag.clone(),
        after_by_tag: evaluation.after_by_tag.clone(),
        gates: results,
        samples: evaluation.samples.clone(),
        target_tokens: job.target_tokens,
        store_bytes: job.store_bytes,
        bytes_per_token: if train_tokens == 0 { 0.0 } else { train_bytes as f64 / train_tokens as f64 },
        teacher_tokens_per_second: progress::median_rate(&recent),
        student_tokens_per_second: finish.tokens_per_second,
        processed_tokens: finish.processed_tokens,
        trained_target_tokens: finish.target_tokens,
        trained_parameters: finish.trained_parameters,
        lora_rank: job.spec.student.lora.as_ref().map_or(0, |lora| lora.rank),
        ema_decay: job.spec.train.ema_decay,
        workers: finish.workers,
        left_out_steps: finish.left_out_steps,
        redone,
        reused: u32::try_from(reused.len()).unwrap_or(u32::MAX),
        soft_targets,
        pruning: finish.pruning.clone(),
        forecast,
        promoted: promoted.map(Model::resource_name).unwrap_or_default(),
        artifacts,
    })
}

async fn fail(context: &Context, id: &JobId, error: &Error) -> Result<()> {
    let mut tx = context.database.begin().await?;
    if jobs::get(&mut tx, id).await?.state == JobState::Running {
        models::release(&mut tx, id).await?;
        let text = error.chain();
        journal::change_state(&mut tx, id, JobState::Failed, Some((error.code.as_str(), &text)), context.now_ms())
            .await?;
        commit(tx).await?;
        context.wakers.job_changed(id);
        tracing::error!(job = %id, code = %error.code, "the candidate cannot be judged: {text}");
    }
    Ok(())
}

#[cfg(test)]
mod tests;
