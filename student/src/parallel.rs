//! Several workers train one model: the worker of the train task leads, those of its replica tasks follow.

pub(crate) mod sync;

use retort_core::{Error, Result, spec::Sharing};
use retort_proto::ReplicaTask;
use retort_worker::{Attempt, TaskContext};

use crate::settings::Settings;

/// The attempt at `{job}/replica-N`: computes for the lead until that is done and the task cancelled.
pub async fn replica(attempt: &Attempt, task: &ReplicaTask, cx: &TaskContext, settings: &Settings) -> Result<()> {
    let mode = attempt.spec.train.parallel.map(|parallel| parallel.mode).unwrap_or_default();
    match mode {
        Sharing::Synchronous => sync::follow(attempt, task, cx, settings).await,
        Sharing::Diloco => Err(Error::internal(format!("{} has no way to follow its lead", attempt.task))),
    }
}
