//! What a stage computes with: the native engine's layers, or a stand-in in tests.

use std::{ops::Range, path::Path};

use retort_core::Result;
use retort_llama::{Part, TensorHash};
use retort_proto as proto;

use crate::stage::step::{Activations, Begin, Output, Step};

/// What is known of a model before its weights are read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Opened {
    pub config_sha256: String,
    /// Over every tensor's name, dtype and shape and a few of its bytes.
    pub weights_print: String,
    pub layers: u32,
    /// Bytes that the activations of one token take.
    pub row_bytes: u64,
    /// Measured on this stage's device; any unit, the same for all three.
    pub layer_cost: f64,
    pub embedding_cost: f64,
    pub head_cost: f64,
}

/// What was read to load them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Loaded {
    /// Bytes of the part's own tensors; no others are read.
    pub bytes_read: u64,
    pub tensors: Vec<TensorHash>,
}

/// Lives on the stage's model thread.
pub trait Computer {
    fn open(&mut self, model: &Path) -> Result<Opened>;

    /// Drops what was loaded before.
    fn load(&mut self, model: &Path, part: &Part) -> Result<Loaded>;

    fn begin(&mut self, begin: &Begin) -> Result<()>;

    fn run(&mut self, step: &Step, input: Option<Activations>) -> Result<Output>;
}

impl Opened {
    pub(super) fn to_proto(&self, given: Option<&Range<u32>>) -> proto::ModelOpened {
        proto::ModelOpened {
            config_sha256: self.config_sha256.clone(),
            weights_print: self.weights_print.clone(),
            layer_cost: self.layer_cost,
            embedding_cost: self.embedding_cost,
            head_cost: self.head_cost,
            given_layers: given.map(|range| proto::LayerRange { first_layer: range.start, end_layer: range.end }),
        }
    }
}

impl Loaded {
    pub(super) fn to_proto(&self, seconds: f64) -> proto::LayersLoaded {
        let tensor = |tensor: &TensorHash| proto::TensorHash {
            name: tensor.name.clone(),
            shape: tensor.shape.clone(),
            sha256: tensor.sha256.to_vec(),
        };
        proto::LayersLoaded { bytes_read: self.bytes_read, seconds, tensors: self.tensors.iter().map(tensor).collect() }
    }
}
