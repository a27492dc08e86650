//! What a folder's safetensors files hold, told from their headers: one file, or several and their index.
//!
//! Import, export, admission and the workers read headers here: a folder that is admitted is one that workers load.
//! (Import and export want plain numbers besides, none in bytes with scales.) No tensor's bytes are read.

mod safetensors;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    path::{Component, Path},
};

use retort_core::{Code, Error, Result};
use serde_json::Value;

pub use self::safetensors::{Dtype, StoredTensor, WeightFile};
use crate::{
    Config,
    file::{malformed, read_json, unsupported},
};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const MAX_INDEX_BYTES: u64 = 1 << 26;
const MAX_FILES: usize = 4096;

/// The weights of a folder: its files' headers, each checked against its file's size.
#[derive(Debug)]
pub struct WeightFolder {
    /// Sorted by name.
    files: Vec<WeightFile>,
    /// Tensor name to its file.
    places: BTreeMap<String, usize>,
}

impl WeightFolder {
    /// Opens `model.safetensors`, or else the files that `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// `file-not-found` without weights, `weights-truncated`, `model-malformed`, and `model-unsupported` for numbers
    /// of a kind that is not read.
    pub fn open(dir: &Path) -> Result<Self> {
        let single = dir.join(SINGLE);
        if single.exists() {
            let file = WeightFile::open(&single)?;
            let places = file.tensors().map(|(name, _)| (name.to_owned(), 0)).collect();
            return Ok(Self { files: vec![file], places });
        }
        let index = dir.join(INDEX);
        if index.exists() {
            return Self::open_sharded(dir, &index);
        }
        Err(absent(dir))
    }

    fn open_sharded(dir: &Path, index: &Path) -> Result<Self> {
        let wrong = |reason: String| malformed(index.display(), reason);
        let value = read_json(index, MAX_INDEX_BYTES)?;
        let map = value
            .get("weight_map")
            .and_then(Value::as_object)
            .ok_or_else(|| wrong("lacks an object \"weight_map\"".into()))?;

        let mut names = BTreeSet::new();
        for (tensor, file) in map {
            let file =
                file.as_str().ok_or_else(|| wrong(format!("the file of tensor {} is not a name", shown(tensor))))?;
            let mut parts = Path::new(file).components();
            if !matches!((parts.next(), parts.next()), (Some(Component::Normal(name)), None) if name == file) {
                return Err(wrong(format!("tensor {} lies in {}, outside the folder", shown(tensor), shown(file))));
            }
            names.insert(file);
        }
        if names.is_empty() || names.len() > MAX_FILES {
            return Err(wrong(format!("names {} files; it must be 1 to {MAX_FILES}", names.len())));
        }
        let files: Vec<_> = names.iter().map(|name| WeightFile::open(&dir.join(name))).collect::<Result<_>>()?;
        let order: BTreeMap<&str, usize> = names.iter().enumerate().map(|(at, name)| (*name, at)).collect();
        let mut places = BTreeMap::new();
        for (tensor, file) in map {
            let at = order[file.as_str().unwrap_or_default()];
            if files[at].get(tensor).is_none() {
                return Err(wrong(format!("tensor {} is not in {}", shown(tensor), files[at].place())));
            }
            places.insert(tensor.clone(), at);
        }
        Ok(Self { files, places })
    }

    pub fn files(&self) -> &[WeightFile] {
        &self.files
    }

    /// Tensor names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// A tensor and the index of its file.
    pub fn get(&self, name: &str) -> Option<(&StoredTensor, usize)> {
        let at = *self.places.get(name)?;
        Some((self.files[at].get(name)?, at))
    }

    /// Where the weights lie, for errors.
    pub fn place(&self) -> &str {
        self.files.first().map_or("", WeightFile::place)
    }

    /// The file that a tensor is in, for errors.
    pub fn place_of(&self, name: &str) -> &str {
        self.places.get(name).map_or(self.place(), |&at| self.files[at].place())
    }

    /// That the tensors of this table, by name and shape, are there, each stored in bytes with its scale.
    ///
    /// # Errors
    /// `model-malformed` naming the tensor.
    pub fn require(&self, table: &[(String, Vec<i64>)]) -> Result<()> {
        for (name, shape) in table {
            let Some((stored, at)) = self.get(name) else {
                return Err(malformed(self.place(), format!("lacks tensor {name:?} of shape {shape:?}")));
            };
            if stored.shape != *shape {
                return Err(malformed(
                    self.files[at].place(),
                    format!("tensor {name:?} has shape {:?}; config.json asks for {shape:?}", stored.shape),
                ));
            }
            if stored.dtype.is_scaled() {
                self.require_scale(name, shape.first().copied().unwrap_or(0))?;
            }
        }
        Ok(())
    }

    /// That a weight stored in bytes has its scales, one a row or one for all: the tensor `..weight_scale` beside
    /// `..weight`, as in Meta's Llama-3.1-405B-FP8. Answers their name and number.
    ///
    /// # Errors
    /// `model-malformed`
    pub fn require_scale(&self, name: &str, rows: i64) -> Result<(String, usize)> {
        let of = format!("{name}_scale");
        let (scale, at) = self.get(&of).ok_or_else(|| {
            let (place, name, of) = (self.place_of(name), shown(name), shown(&of));
            malformed(place, format!("tensor {name} is stored in bytes, and its scale {of} is missing"))
        })?;
        let count = scale.bytes / scale.dtype.bytes();
        let is_number = matches!(scale.dtype, Dtype::F32 | Dtype::F16 | Dtype::Bf16);
        if !is_number || (count != rows.unsigned_abs() && count != 1) {
            return Err(malformed(
                self.files[at].place(),
                format!(
                    "tensor {} is {} of shape {:?}; it must be one number, or {rows}, of F32, F16 or BF16",
                    shown(&of),
                    scale.dtype.name(),
                    scale.shape
                ),
            ));
        }
        Ok((of, count as usize))
    }

    /// That these are all of a model's weights, and nothing that changes what it computes is left over: what a config
    /// does not ask for would be left out.
    ///
    /// # Errors
    /// `model-malformed` as [`WeightFolder::require`] has it; `model-unsupported` for a tensor too many, and for one in
    /// F64.
    pub fn require_model(&self, config: &Config) -> Result<()> {
        let table = config.tensors();
        self.require(&table)?;
        for (name, _) in &table {
            if self.get(name).is_some_and(|(stored, _)| stored.dtype == Dtype::F64) {
                let reason = format!("tensor {name:?} is F64; store it as F32 or BF16");
                return Err(unsupported(self.place_of(name), reason));
            }
        }
        let known: HashSet<&str> = table.iter().map(|(name, _)| name.as_str()).collect();
        match self.names().find(|name| !known.contains(name) && !self.may_be_left_out(name, config)) {
            Some(name) => Err(unsupported(
                self.place_of(name),
                format!(
                    "config.json, of {} layers of a {}, has no place for tensor {}; leaving it out would change the model",
                    config.num_hidden_layers,
                    config.architecture.class_name(),
                    shown(name)
                ),
            )),
            None => Ok(()),
        }
    }

    /// What follows from the rest, is a scale that is read with its weight, or serves arithmetic or training that is not
    /// done here.
    fn may_be_left_out(&self, name: &str, config: &Config) -> bool {
        let of_bytes = |name: &str| self.get(name).is_some_and(|(stored, _)| stored.dtype.is_scaled());
        (config.tie_word_embeddings && name == "lm_head.weight")
            || name.ends_with(".rotary_emb.inv_freq")
            || name.strip_suffix("_scale").is_some_and(of_bytes)
            // Of activations and of a cache in bytes.
            || [".input_scale", ".input_scale_ub", ".k_scale", ".v_scale"].iter().any(|end| name.ends_with(end))
            // Of reinforcement learning.
            || name.starts_with("v_head.")
    }
}

/// A text out of a file, at a length that a message can hold.
fn cut(text: &str) -> String {
    text.chars().take(200).collect()
}

fn shown(name: &str) -> String {
    format!("{:?}", cut(name))
}

fn absent(dir: &Path) -> Error {
    let pickled = dir.join("pytorch_model.bin").is_file() || dir.join("pytorch_model.bin.index.json").is_file();
    let way_out = if pickled { "; the weights are pickled, save them with safe_serialization first" } else { "" };
    let message = if dir.is_dir() {
        format!("{}: neither {SINGLE} nor {INDEX} is there{way_out}", dir.display())
    } else {
        format!("{}: no such folder", dir.display())
    };
    Error::new(Code::FileNotFound, message)
}
