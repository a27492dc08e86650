//! Several workers train one model: the worker of the train task leads, those of its replica tasks follow.

pub(crate) mod sync;

use std::path::Path;

use retort_core::{
    Error, Result,
    spec::{JobSpec, Sharing, Train},
};
use retort_llama::Model;
use retort_proto::ReplicaTask;
use retort_worker::{Attempt, TaskContext};
use tch::{Device, Kind, TchError, Tensor, no_grad};

use crate::{failure::llama, settings::Settings, trainer::Options};

pub(crate) mod diloco;

/// What of a job's spec decides a replica's work. Its lead alone averages weights.
fn replica_options(spec: &JobSpec, steps: u32, settings: &Settings) -> Options {
    Options::of(&Train { ema_decay: 0.0, ..spec.train.clone() }, steps, settings)
}

/// What was said of a lead already: a replica looks for it all the time, and nobody wants to read the same again.
#[derive(Debug, Default)]
struct Said(Option<(u64, String)>);

impl Said {
    /// Whether something else was said last, or of another lead.
    fn is_new(&mut self, lead_epoch: u64, what: String) -> bool {
        let now = Some((lead_epoch, what));
        let is_new = self.0 != now;
        self.0 = now;
        is_new
    }
}

/// A replica's part may be so many times what such a part is: those of one round have a few hundredfold between them
/// where their rows have little in common; what comes of a fault of memory or of arithmetic has far more.
const MOST_TIMES: f64 = 1e4;
/// Where nothing is known of such a part: the square of what is larger is hardly an f32.
const MOST: f64 = 1e18;

/// Why a replica's part cannot be one, by a norm or a loss of it and of what such a part is here; `None` if it can.
fn implausible(what: &str, theirs: f64, here: f64) -> Option<String> {
    let most = if here > 0.0 { MOST_TIMES * here } else { MOST };
    (theirs.is_nan() || theirs.abs() > most)
        .then(|| format!("its {what} is {theirs:.3e}, where {most:.3e} would be too much already"))
}

/// Euclidean norm of all numbers of these together, in f64: squares of large numbers leave f32.
fn norm<'a>(mut tensors: impl Iterator<Item = &'a Tensor>) -> Result<f64, TchError> {
    let square = |tensor: &Tensor| -> Result<f64, TchError> {
        Ok(tensor.f_norm_scalaropt_dtype(2, Kind::Double)?.f_double_value(&[])?.powi(2))
    };
    no_grad(|| tensors.try_fold(0.0, |sum, tensor| Ok(sum + square(tensor)?))).map(f64::sqrt)
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_is_said_once_of_each_lead() {
        let mut said = Said::default();
        let news = [(1, "a"), (1, "a"), (1, "b"), (1, "b"), (2, "b"), (2, "b"), (2, "a")];
        let told = news.map(|(epoch, what)| said.is_new(epoch, what.to_owned()));
        assert_eq!(told, [true, false, true, false, true, false, true]);
    }

    #[test]
    fn a_part_that_cannot_be_one_is_told_from_one_of_hard_rows() {
        for (theirs, own) in [(1.0, 2.0), (900.0, 1.0), (5.0, 0.0), (1e30, 1e28), (-1.0, 1.0), (0.0, 1.0)] {
            assert_eq!(implausible("norm", theirs, own), None, "{theirs} beside {own}");
        }
        for (theirs, own) in [(f64::NAN, 1.0), (f64::INFINITY, 1.0), (1e6, 1.0), (-1e300, 1.0), (1e19, 0.0)] {
            assert!(implausible("norm", theirs, own).is_some(), "{theirs} beside {own}");
        }
        let why = implausible("norm", 3e38, 2.0).unwrap();
        assert_eq!(why, "its norm is 3.000e38, where 2.000e4 would be too much already");
    }
}
