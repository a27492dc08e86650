//! The janitor: removes what was staged and never published, and what deleted jobs left.

use std::{collections::HashSet, time::Duration};

use retort_artifact::{checkpoint, paths};
use retort_core::{Code, Result, id::JobId, spec::Keep};
use tokio_util::sync::CancellationToken;

use crate::{
    context::Context,
    database::{commit, deletions, jobs, shards},
};

const TICK: Duration = Duration::from_secs(5);
/// An upload that grows no more for this long was left by a killed process.
const IDLE_UPLOAD: Duration = Duration::from_secs(15 * 60);

/// Tidies until `shutdown`.
pub async fn run(context: Context, shutdown: CancellationToken) -> Result<()> {
    loop {
        let tidied = tokio::select! {
            biased;
            () = shutdown.cancelled() => return Ok(()),
            tidied = tidy(&context) => tidied,
        };
        if let Err(error) = tidied {
            tracing::warn!(code = %error.code, "tidying the store failed, trying again: {}", error.chain());
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                () = tokio::time::sleep(TICK) => {}
            }
        }
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            () = context.wakers.janitor.notified() => {}
            () = tokio::time::sleep(TICK) => {}
        }
    }
}

/// One round; returns how many objects went.
pub async fn tidy(context: &Context) -> Result<u64> {
    let uploads = context.store.sweep_staging(IDLE_UPLOAD).await?;
    if uploads > 0 {
        tracing::info!(uploads, "removed uploads that killed processes left");
    }
    Ok(uploads + sweep_ended(context).await? + sweep_deleted(context).await?)
}

/// Staged shards of attempts that were never published, once no attempt of the job can be running.
async fn sweep_ended(context: &Context) -> Result<u64> {
    let ended_before_ms = context.now_ms().saturating_sub(context.settings.lease_ms().saturating_mul(2));
    let ended = jobs::untidy(&mut *context.database.read().await?, ended_before_ms).await?;
    let mut removed = 0;
    for id in ended {
        removed += sweep_staged(context, &id).await?;
        // One to go back to is of use only to a training that goes on.
        let best = jobs::get(&mut *context.database.read().await?, &id).await?.spec.train.keep.best;
        removed += checkpoint::prune(&context.store, id.as_str(), Keep { last: 1, best }).await?.len() as u64;
        // What workers of a training that did not end left to each other.
        for prefix in [paths::exchanges_prefix(id.as_str()), paths::train_prefix(id.as_str())] {
            removed += context.store.delete_prefix(&prefix).await?;
        }
        let mut tx = context.database.begin().await?;
        jobs::set_cleaned(&mut tx, &id, context.now_ms()).await?;
        commit(tx).await?;
    }
    Ok(removed)
}

async fn sweep_staged(context: &Context, id: &JobId) -> Result<u64> {
    let removed = sweep(context, &paths::shards_prefix(id.as_str())).await?;
    if removed > 0 {
        tracing::info!(job = %id, removed, "removed shards that were staged and never published");
    }
    Ok(removed)
}

/// Removes what lies below `prefix`, but for the shards that a job holds. Only what some job holds can
/// come to be held by another, so nothing that is removed here is asked for later.
async fn sweep(context: &Context, prefix: &str) -> Result<u64> {
    let held: HashSet<String> =
        shards::keys_in_use(&mut *context.database.read().await?, prefix).await?.into_iter().collect();
    if held.is_empty() {
        return context.store.delete_prefix(prefix).await;
    }
    let mut removed = 0;
    for entry in context.store.list(prefix).await? {
        if !held.contains(&entry.key) {
            removed += context.store.delete(&entry.key).await.map(|()| 1).or_else(gone)?;
        }
    }
    Ok(removed)
}

/// What deleted jobs left. A prompt set goes only if no job uses it again by now, and a shard only if no
/// other job holds it.
async fn sweep_deleted(context: &Context) -> Result<u64> {
    let due = deletions::due(&mut *context.database.read().await?, context.now_ms()).await?;
    let mut removed = 0;
    for (prefix, due_ms) in due {
        let prompt_set = prefix.strip_prefix("prompts/").and_then(|name| name.strip_suffix(".jsonl"));
        removed += match prompt_set {
            Some(sha256) => {
                let _alone = context.prompt_sets.write().await;
                let used = jobs::uses_prompt_set(&mut *context.database.read().await?, sha256).await?;
                if used { 0 } else { context.store.delete(&prefix).await.map(|()| 1).or_else(gone)? }
            }
            None => sweep(context, &prefix).await?,
        };
        let mut tx = context.database.begin().await?;
        deletions::remove(&mut tx, &prefix, due_ms).await?;
        commit(tx).await?;
        tracing::debug!(prefix, "swept");
    }
    Ok(removed)
}

fn gone(error: retort_core::Error) -> Result<u64> {
    if error.code == Code::ObjectNotFound { Ok(0) } else { Err(error) }
}

#[cfg(test)]
mod tests;
