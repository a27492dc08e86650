//! Who is trained: what is left of the teacher, and how fast it learns.

use retort_llama::Model;
use retort_student::kept_layers;
use retort_tests::teacher::smollm2;
use tch::{Device, Kind};

use crate::{Failure, settings, training::ONLINE};

/// A student is the teacher with some of its layers, so that it starts at a known place.
pub struct Student {
    pub name: &'static str,
    /// Layers it keeps of the teacher's.
    pub layers: usize,
    /// Peak. Of the rates tried on whole distributions, the one that ended best.
    pub learning_rate: f64,
    /// Whether it keeps the teacher's embeddings, which are its head too, as they are.
    pub freeze_embeddings: bool,
    /// Settings it is trained on; none stands for all.
    only: &'static [&'static str],
}

/// Keeps most of the teacher, as pruning before distillation usually does, and its embeddings: it starts
/// 2.2 nats from it.
const LIGHTLY_PRUNED: Student = Student {
    name: "24-layers-frozen",
    layers: 24,
    learning_rate: 4e-4,
    freeze_embeddings: true,
    only: &["threshold-0.025", "threshold-0.005", "top-k-50", "distillkit-budget"],
};

/// The same, all of it trained.
const LIGHTLY_PRUNED_FREE: Student =
    Student { name: "24-layers", freeze_embeddings: false, only: &["threshold-0.025"], ..LIGHTLY_PRUNED };

/// Knows nothing any more (27 nats) and has to learn the vocabulary from the targets alone.
const HEAVILY_PRUNED: Student =
    Student { name: "4-layers", layers: 4, learning_rate: 1e-3, freeze_embeddings: false, only: &[] };

pub fn all() -> [Student; 3] {
    [LIGHTLY_PRUNED, LIGHTLY_PRUNED_FREE, HEAVILY_PRUNED]
}

impl Student {
    pub fn named(name: &str) -> Result<Self, Failure> {
        all().into_iter().find(|student| student.name == name).ok_or_else(|| format!("no student {name}").into())
    }

    /// Names of what it is trained on, whole distributions first.
    pub fn trainings(&self) -> Vec<String> {
        let wanted = |name: &String| match self.only {
            [] => name != settings::FULL,
            only => only.contains(&name.as_str()),
        };
        let settings = settings::all().into_iter().map(|setting| setting.name).filter(wanted);
        std::iter::once(ONLINE.to_owned()).chain(settings).collect()
    }

    /// As it is before training.
    pub fn start(&self) -> Result<Model, Failure> {
        let teacher = Model::load(&smollm2(), Device::Cpu, Kind::Float)?;
        let kept = kept_layers(teacher.config().num_hidden_layers as usize, self.layers);
        Ok(teacher.prune_layers(&kept)?)
    }
}
