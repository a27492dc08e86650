//! Checkpoints on their way to the store, while training goes on.

use std::path::PathBuf;

use retort_artifact::checkpoint::{self, Manifest};
use retort_core::{Error, Result, task_group::TaskGroup};
use retort_proto::{CheckpointWritten, worker_event::What};
use retort_worker::TaskContext;
use tokio_util::sync::CancellationToken;

/// Checkpoints that stay in the store: the newest, and one to go back to should it be damaged.
const KEEP: usize = 2;

/// Uploads one folder at a time; a second waits for the first.
pub struct Uploader {
    cx: TaskContext,
    job: String,
    running: Option<TaskGroup>,
}

impl Uploader {
    pub fn new(cx: TaskContext, job: String) -> Self {
        Self { cx, job, running: None }
    }

    /// Starts uploading `folder` to `prefix`; it is removed afterwards. Answers once the upload
    /// before it is done, with that one's error if it had any.
    pub async fn start(&mut self, folder: PathBuf, prefix: String, manifest: Manifest) -> Result<()> {
        self.finish().await?;
        let mut group = TaskGroup::new(CancellationToken::new());
        group.spawn("checkpoint", upload(self.cx.clone(), self.job.clone(), folder, prefix, manifest));
        self.running = Some(group);
        Ok(())
    }

    /// Waits until everything that was started is in the store.
    pub async fn finish(&mut self) -> Result<()> {
        let Some(group) = self.running.take() else { return Ok(()) };
        let cancelled = self.cx.cancelled.clone();
        tokio::select! {
            joined = group.join() => joined,
            // What is half there has no manifest and is nobody's.
            () = cancelled.cancelled() => self.cx.check(),
        }
    }
}

async fn upload(cx: TaskContext, job: String, folder: PathBuf, prefix: String, manifest: Manifest) -> Result<()> {
    let step = manifest.step;
    checkpoint::publish(&cx.store, &prefix, &folder, manifest).await?;
    tokio::fs::remove_dir_all(&folder).await.map_err(|error| Error::io(&folder, error))?;
    if step > 0 {
        cx.emit(What::CheckpointWritten(CheckpointWritten { step, key: prefix.clone() })).await?;
        checkpoint::prune(&cx.store, &job, KEEP).await?;
    }
    tracing::info!(step, key = prefix, "checkpoint written");
    Ok(())
}
