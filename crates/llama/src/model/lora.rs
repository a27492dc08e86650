//! A model that trains adapters alone: how it is made, and PEFT's folder of them.

use std::{fs, path::Path};

use retort_core::spec::{Lora, LoraBase, LoraTarget};
use serde_json::{Number, json};
use tch::{Device, Kind, Tensor, no_grad};

use super::{Model, PROJECTION, adapter::Adapter, block::Linear};
use crate::{
    Error, Keep, Result,
    weights::{MappedFile, safetensors},
};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

impl Model {
    /// The same model with adapters that do nothing yet. They alone require gradients; every weight it had
    /// stays as it is, those of projections in bytes where `lora` says so. `seed` names the adapters' random
    /// numbers, those of their dropout included: no draw of libtorch's own is taken.
    ///
    /// [`Error::Folder`] with `spec-invalid` for adapters that this model cannot have.
    pub fn adapt(mut self, lora: &Lora, seed: u64) -> Result<Self> {
        lora.check()?;
        lora.check_width(self.config.hidden_size.unsigned_abs())?;
        if self.lora.is_some() {
            return Err(Error::Invalid("the model has adapters already".into()));
        }
        self.set_trainable(false);
        let keep = keep(lora.base);
        if keep != Keep::Stored {
            // The blocks hold the last reference to each weight, which goes when its bytes are made.
            self.named.retain(|(name, _)| !name.ends_with(PROJECTION));
        }
        let kind = self.kind;
        no_grad(|| -> Result<()> {
            for (layer, block) in self.blocks.iter_mut().enumerate() {
                for target in LoraTarget::ALL {
                    let linear = block.projection_mut(target);
                    linear.weight = linear.weight.shallow_clone().keep(keep)?;
                    if lora.targets.contains(&target) {
                        let adapter = Adapter::new(lora, (layer, target), linear.weight.stored(), kind, seed)?;
                        linear.adapter = Some(adapter);
                    }
                }
            }
            Ok(())
        })?;
        self.lora = Some(lora.clone());
        for (_, tensor) in self.adapters() {
            let _ = tensor.set_requires_grad(true);
        }
        Ok(self)
    }

    /// [`Model::load`] and then [`Model::adapt`], but that a base in bytes is never held wide.
    pub fn load_adapted(dir: &Path, (device, kind): (Device, Kind), lora: &Lora, seed: u64) -> Result<Self> {
        Self::load_keeping(dir, device, kind, keep(lora.base))?.adapt(lora, seed)
    }

    /// What [`Model::adapt`] was given.
    pub fn lora(&self) -> Option<&Lora> {
        self.lora.as_ref()
    }

    /// Whether the weights of its projections are widened for each product: a graph over many of them would
    /// hold them wide.
    pub fn is_narrow(&self) -> bool {
        self.lora.as_ref().is_some_and(|lora| lora.base == LoraBase::Int8)
    }

    /// Every adapter's `A` `[r, i]` and `B` `[o, r]` by PEFT's name, in a fixed order, sharing the model's storage.
    pub fn adapters(&self) -> Vec<(String, Tensor)> {
        let mut all = Vec::new();
        for (layer, block) in self.blocks.iter().enumerate() {
            for target in LoraTarget::ALL {
                let Some(adapter) = &block.projection(target).adapter else { continue };
                for (part, tensor) in adapter.tensors() {
                    let place = path(target);
                    let name = format!("base_model.model.model.layers.{layer}.{place}.{part}.weight");
                    all.push((name, tensor.shallow_clone()));
                }
            }
        }
        all
    }

    /// Writes the adapters in the model's kind as a folder that PEFT's `PeftModel.from_pretrained` reads.
    pub fn save_adapters(&self, dir: &Path) -> Result<()> {
        let Some(lora) = &self.lora else { return Err(Error::Invalid("the model has no adapters".into())) };
        fs::create_dir_all(dir).map_err(|error| Error::io(dir, error))?;
        safetensors::write(&dir.join(WEIGHTS), &self.adapters(), self.kind)?;
        // PEFT calls it a whole number.
        let alpha = if lora.alpha.fract() == 0.0 { Number::from(lora.alpha as u64).into() } else { json!(lora.alpha) };
        let config = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": null,
            "r": lora.rank,
            "lora_alpha": alpha,
            "lora_dropout": lora.dropout,
            "target_modules": lora.targets.iter().map(|target| target.as_str()).collect::<Vec<_>>(),
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "use_rslora": false,
            "use_dora": false,
        });
        let path = dir.join(CONFIG);
        fs::write(&path, format!("{config:#}\n")).map_err(|error| Error::io(&path, error))
    }

    /// Takes the adapters' numbers from a folder that [`Model::save_adapters`] wrote.
    pub fn load_adapters(&self, dir: &Path) -> Result<()> {
        let file = MappedFile::open(&dir.join(WEIGHTS))?;
        let own = self.adapters();
        let (place, held) = (file.header().place(), file.header().tensors().count());
        if held != own.len() {
            let own = own.len();
            return Err(Error::malformed(place, format!("holds {held} tensors; the adapters have {own}")));
        }
        for (name, mut tensor) in own {
            let Some((stored, bytes)) = file.get(&name) else {
                return Err(Error::malformed(place, format!("lacks tensor {name:?}")));
            };
            if stored.shape != tensor.size() || stored.dtype.is_scaled() {
                let (shape, dtype, wanted) = (&stored.shape, stored.dtype.name(), tensor.size());
                return Err(Error::malformed(
                    place,
                    format!("tensor {name:?} is {dtype} of shape {shape:?}; the adapter's is {wanted:?}"),
                ));
            }
            let stored = Tensor::f_from_data_size(bytes, &stored.shape, safetensors::kind_of(stored.dtype))?;
            no_grad(|| tensor.f_copy_(&stored))?;
        }
        Ok(())
    }

    /// The weight of this name as [`Model::save`] writes it: a projection's with its adapter's product added, in
    /// f32; any other as it is.
    pub(super) fn merged(&self, name: &str) -> Result<Tensor> {
        if let Some(linear) = self.projection(name)
            && (linear.adapter.is_some() || self.is_narrow())
        {
            return no_grad(|| linear.merged());
        }
        let found = self.named.iter().find(|(known, _)| known == name);
        found.map(|(_, tensor)| tensor.shallow_clone()).ok_or_else(|| Error::Invalid(format!("no tensor {name:?}")))
    }

    /// The projection that a weight of this name is of.
    fn projection(&self, name: &str) -> Option<&Linear> {
        let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let place = rest.strip_suffix(".weight")?;
        let target = LoraTarget::ALL.into_iter().find(|&target| path(target) == place)?;
        Some(self.blocks.get(layer.parse::<usize>().ok()?)?.projection(target))
    }
}

fn keep(base: LoraBase) -> Keep {
    match base {
        LoraBase::Model => Keep::Stored,
        LoraBase::Int8 => Keep::Int8,
    }
}

/// Where a projection stands in its layer.
fn path(target: LoraTarget) -> String {
    let part = match target {
        LoraTarget::QProj | LoraTarget::KProj | LoraTarget::VProj | LoraTarget::OProj => "self_attn",
        LoraTarget::GateProj | LoraTarget::UpProj | LoraTarget::DownProj => "mlp",
    };
    format!("{part}.{}", target.as_str())
}

impl Linear {
    /// f32 `[o, i]`.
    fn merged(&self) -> Result<Tensor> {
        let wide_oi = self.weight.widened(Kind::Float)?;
        match &self.adapter {
            Some(adapter) => Ok(wide_oi.f_add(&adapter.product()?)?),
            None => Ok(wide_oi),
        }
    }
}

#[cfg(test)]
mod tests;
