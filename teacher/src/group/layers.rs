//! The native engine's layers, as a stage of a group computes with them.

use std::{collections::HashSet, path::Path};

use retort_core::{Error, Result};
use retort_llama::{Config, Part, TensorHash, folder_print, tensor_hashes};
use retort_model::token_flops;

use super::computer::{Computer, Loaded, Opened};
use crate::{
    engine::native::config_sha256,
    stage::{
        Computing, Stage,
        step::{Activations, Begin, Output, Step},
    },
    torch::model as llama,
};

/// Positions that one attends to on average, when nothing better is known.
const MEAN_CONTEXT: f64 = 512.0;

/// Layers of a model, loaded or not.
pub struct Layers {
    computing: Computing,
    stage: Option<Stage>,
}

impl Layers {
    pub fn new(computing: Computing) -> Self {
        Self { computing, stage: None }
    }

    fn stage(&mut self) -> Result<&mut Stage> {
        self.stage.as_mut().ok_or_else(|| Error::internal("a stage is asked to compute before it has layers"))
    }
}

impl Computer for Layers {
    fn open(&mut self, model: &Path) -> Result<Opened> {
        let config = Config::from_dir(model).map_err(llama)?;
        let flops = token_flops(&config, MEAN_CONTEXT);
        Ok(Opened {
            config_sha256: config_sha256(model)?,
            weights_print: folder_print(model).map_err(llama)?,
            layers: u32::try_from(config.num_hidden_layers).unwrap_or(0),
            row_bytes: config.hidden_size.unsigned_abs() * self.computing.kind.elt_size_in_bytes() as u64,
            layer_cost: flops.layer(),
            embedding_cost: 0.0,
            head_cost: flops.head,
        })
    }

    fn load(&mut self, model: &Path, part: &Part) -> Result<Loaded> {
        // The old layers go first: two models' may not fit.
        self.stage = None;
        let stage = Stage::load(model, part.clone(), &self.computing)?;
        let own: HashSet<String> = part.tensors(stage.config()).into_iter().map(|(name, _)| name).collect();
        let used: HashSet<String> = stage.config().tensors().into_iter().map(|(name, _)| name).collect();
        // Tensors that no layer uses are part of the weights' name all the same; stage 0 reads them.
        let wanted = |name: &str| own.contains(name) || (part.embeds && !used.contains(name));
        let tensors: Vec<TensorHash> = tensor_hashes(model, wanted).map_err(llama)?;
        let bytes_read = stage.held().bytes_read;
        self.stage = Some(stage);
        Ok(Loaded { bytes_read, tensors })
    }

    fn begin(&mut self, begin: &Begin) -> Result<()> {
        self.stage()?.begin(begin)
    }

    fn run(&mut self, step: &Step, input: Option<Activations>) -> Result<Output> {
        self.stage()?.run(step, input)
    }
}
