//! The native engine's layers, as a stage of a group computes with them.

use std::{collections::HashSet, path::Path};

use retort_core::{Error, Result};
use retort_llama::{Config, Part, TensorHash, folder_print, tensor_hashes};
use retort_model::token_flops;

use super::{
    computer::{Computer, Loaded, Opened},
    measure::{Costs, costs},
};
use crate::{
    engine::native::config_sha256,
    reading,
    stage::{
        Arithmetic, Stage,
        step::{Activations, Begin, Output, Step},
    },
    torch::model as llama,
};

/// Positions that one attends to on average, when nothing better is known.
const MEAN_CONTEXT: f64 = 512.0;

/// Layers of a model, loaded or not.
pub struct Layers {
    arithmetic: Arithmetic,
    stage: Option<Stage>,
    /// Of the config that was opened last, by its hash.
    measured: Option<(String, Costs)>,
}

impl Layers {
    pub fn new(arithmetic: Arithmetic) -> Self {
        Self { arithmetic, stage: None, measured: None }
    }

    /// Measured once a config; by arithmetic, and said so, where nothing can be measured.
    fn costs(&mut self, model: &Path, config: &Config, config_sha256: &str) -> Costs {
        if let Some((known, costs)) = &self.measured
            && known == config_sha256
        {
            return *costs;
        }
        // What is timed needs the room that loaded layers take.
        self.stage = None;
        match costs(model, &self.arithmetic) {
            Ok(costs) => {
                tracing::info!(costs.layer, costs.embedding, costs.head, "layers measured, seconds");
                self.measured = Some((config_sha256.to_owned(), costs));
                costs
            }
            Err(error) => {
                tracing::warn!(code = %error.code, "layers are split by arithmetic, not measured: {}", error.chain());
                let flops = token_flops(config, MEAN_CONTEXT);
                Costs { layer: flops.layer(), embedding: 0.0, head: flops.head }
            }
        }
    }

    fn stage(&mut self) -> Result<&mut Stage> {
        self.stage.as_mut().ok_or_else(|| Error::internal("a stage is asked to compute before it has layers"))
    }
}

impl Computer for Layers {
    fn open(&mut self, model: &Path) -> Result<Opened> {
        let config = Config::from_dir(model).map_err(llama)?;
        let config_sha256 = config_sha256(model)?;
        let costs = self.costs(model, &config, &config_sha256);
        Ok(Opened {
            config_sha256,
            weights_print: folder_print(model).map_err(llama)?,
            layers: u32::try_from(config.num_hidden_layers).unwrap_or(0),
            row_bytes: config.hidden_size.unsigned_abs() * self.arithmetic.number_bytes() as u64,
            layer_cost: costs.layer,
            embedding_cost: costs.embedding,
            head_cost: costs.head,
        })
    }

    fn load(&mut self, model: &Path, part: &Part) -> Result<Loaded> {
        // The old layers go first: two models' may not fit.
        self.stage = None;
        let stage = Stage::load(model, part.clone(), &self.arithmetic)?;
        let own: HashSet<String> = part.tensors(stage.config()).into_iter().map(|(name, _)| name).collect();
        let used: HashSet<String> = stage.config().tensors().into_iter().map(|(name, _)| name).collect();
        // Tensors that no layer uses are part of the weights' name all the same; stage 0 reads them.
        let wanted = |name: &str| own.contains(name) || (part.embeds && !used.contains(name));
        let tensors: Vec<TensorHash> = tensor_hashes(model, wanted, reading::progress(model)).map_err(llama)?;
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
