//! Several workers train one model: the worker of the train task leads, those of its replica tasks follow.

pub(crate) mod sync;

use std::path::Path;

use retort_core::{
    Error, Result,
    spec::{JobSpec, Sharing},
};
use retort_llama::Model;
use retort_proto::ReplicaTask;
use retort_worker::{Attempt, TaskContext};
use tch::{Device, Kind};

use crate::{failure::llama, settings::Settings};

pub(crate) mod diloco;

/// The student before training, from its folder: what of it is trained, a replica's lead sets anew.
pub(crate) fn initial_model(folder: &Path, spec: &JobSpec, device: Device, kind: Kind) -> Result<Model> {
    let loaded = match &spec.student.lora {
        Some(lora) => Model::load_adapted(folder, (device, kind), lora, spec.seed),
        None => Model::load(folder, device, kind),
    };
    loaded.map_err(llama)
}

/// The attempt at `{job}/replica-N`: computes for the lead until that is done and the task cancelled.
pub async fn replica(attempt: &Attempt, task: &ReplicaTask, cx: &TaskContext, settings: &Settings) -> Result<()> {
    match attempt.spec.train.parallel.map(|parallel| parallel.mode).unwrap_or_default() {
        Sharing::Synchronous => sync::follow(attempt, task, cx, settings).await,
        Sharing::Diloco => {
            let incomplete = || Error::internal(format!("{} lacks what a replica needs", attempt.task));
            let train = task.train.as_ref().ok_or_else(incomplete)?;
            diloco::replica(attempt, task.number, train, cx, settings).await
        }
    }
}
