//! Checkpoints on their way to the store, while training goes on.

use std::{path::PathBuf, time::Instant};

use retort_artifact::checkpoint::{self, Manifest};
use retort_core::{Result, spec::Keep, task_group::TaskGroup};
use retort_proto::{CheckpointWritten, worker_event::What};
use retort_worker::TaskContext;
use tokio_util::sync::CancellationToken;

use crate::curve::point_to_proto;

/// Uploads one folder at a time; a second waits for the first.
pub struct Uploader {
    cx: TaskContext,
    job: String,
    keep: Keep,
    running: Option<TaskGroup>,
    /// Cancelled once what runs has ended.
    ended: CancellationToken,
}

impl Uploader {
    pub fn new(cx: TaskContext, job: String, keep: Keep) -> Self {
        Self { cx, job, keep, running: None, ended: CancellationToken::new() }
    }

    /// Starts uploading `folder` to `prefix` once `written` has filled it; it is removed afterwards. Answers once
    /// the upload before it is done, with that one's error if it had any.
    pub async fn start(
        &mut self,
        written: impl Future<Output = Result<()>> + Send + 'static,
        folder: PathBuf,
        prefix: String,
        manifest: Manifest,
    ) -> Result<()> {
        self.finish().await?;
        let mut group = TaskGroup::new(CancellationToken::new());
        let (began, ended) = (Instant::now(), CancellationToken::new());
        self.ended = ended.clone();
        let upload = upload(self.cx.clone(), self.job.clone(), self.keep, (folder, began), prefix, manifest);
        group.spawn("checkpoint", async {
            let _ended = ended.drop_guard();
            written.await?;
            upload.await
        });
        self.running = Some(group);
        Ok(())
    }

    /// Whether something is being written or stored now.
    pub fn is_busy(&self) -> bool {
        self.running.is_some() && !self.ended.is_cancelled()
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

async fn upload(
    cx: TaskContext,
    job: String,
    keep: Keep,
    (folder, began): (PathBuf, Instant),
    prefix: String,
    manifest: Manifest,
) -> Result<()> {
    let step = manifest.step;
    let held_out = manifest.held_out().as_ref().map(point_to_proto);
    checkpoint::hand_over(&cx.store, &prefix, &folder, manifest).await?;
    if step > 0 {
        cx.emit(What::CheckpointWritten(CheckpointWritten { step, key: prefix.clone(), held_out })).await?;
        checkpoint::prune(&cx.store, &job, keep).await?;
    }
    tracing::info!(step, seconds = began.elapsed().as_secs_f64(), key = prefix, "checkpoint written");
    Ok(())
}
