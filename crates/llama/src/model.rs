//! The decoder: embedding, blocks of attention and SwiGLU, final norm, head.

use std::{collections::HashMap, path::Path};

use retort_core::spec::Lora;
use serde_json::json;
use tch::{Device, Kind, Tensor};

use crate::{
    Config, Error, Keep, KvCache, Result,
    random::normal,
    rope::Rope,
    weights::{Folder, safetensors},
};

mod adapter;
pub(crate) mod block;
mod importance;
mod lora;
mod packed;
mod prune;
mod tape;

pub use adapter::Masks;
use block::{Block, Weight, norm};
pub use importance::{Importance, LayerImportance, Observer};
pub use prune::{Cut, LayerCut};
pub use tape::Tape;

/// How the name of a projection's weight ends.
const PROJECTION: &str = "_proj.weight";

/// A model whose tensors all lie on one device in one kind.
#[derive(Debug)]
pub struct Model {
    config: Config,
    /// In the order of [`Config::tensors`], but for what blocks keep in bytes; the fields below share their storage.
    named: Vec<(String, Tensor)>,
    embedding_vh: Tensor,
    blocks: Vec<Block>,
    norm_h: Tensor,
    /// The embedding itself where the two are tied.
    head_vh: Tensor,
    rope: Rope,
    kind: Kind,
    device: Device,
    /// Of the blocks' adapters, where there are any.
    lora: Option<Lora>,
}

/// A model's weights without the model: what can be written while it goes on training.
#[derive(Debug)]
pub struct Weights {
    config: Config,
    named: Vec<(String, Tensor)>,
    kind: Kind,
}

impl Weights {
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// As [`Model::save`], in the kind that they are in.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let mut named = self.named.iter();
        save(&self.config, dir, self.kind, |name| {
            let next = named.next().filter(|(known, _)| known == name);
            next.map(|(_, tensor)| tensor.shallow_clone()).ok_or_else(|| Error::Invalid(format!("no tensor {name:?}")))
        })
    }
}

/// Writes a Hugging Face folder's config and weights, each made when its turn comes.
fn save(config: &Config, dir: &Path, kind: Kind, make: impl FnMut(&str) -> Result<Tensor>) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(|error| Error::io(dir, error))?;
    safetensors::write_each(&dir.join("model.safetensors"), &config.tensors(), kind, make)?;
    let mut config = config.to_json();
    config["dtype"] = json!(match kind {
        Kind::BFloat16 => "bfloat16",
        Kind::Half => "float16",
        Kind::Double => "float64",
        _ => "float32",
    });
    let path = dir.join("config.json");
    let partial = dir.join("config.json.partial");
    std::fs::write(&partial, format!("{config:#}\n")).map_err(|error| Error::io(&partial, error))?;
    std::fs::rename(&partial, &path).map_err(|error| Error::io(&path, error))
}

impl Model {
    /// Reads a Hugging Face folder: `config.json`, and the weights in one file or several. Every
    /// tensor's shape is compared with the config's before any memory is taken for it.
    pub fn load(dir: &Path, device: Device, kind: Kind) -> Result<Self> {
        Self::load_keeping(dir, device, kind, Keep::Stored)
    }

    /// As [`Model::load`], the weights of projections kept as `keep` says: no more than one of them is held wide.
    fn load_keeping(dir: &Path, device: Device, kind: Kind, keep: Keep) -> Result<Self> {
        let config = Config::from_dir(dir)?;
        let folder = Folder::open(dir)?;
        folder.require_model(&config)?;
        let table = config.tensors();
        let mut named = Vec::with_capacity(table.len());
        let mut narrow = HashMap::new();
        tch::no_grad(|| -> Result<()> {
            for (name, shape) in table {
                let tensor = folder.tensor(&name, &shape, device, kind)?;
                if keep != Keep::Stored && name.ends_with(PROJECTION) {
                    narrow.insert(name, Weight::Plain(tensor).keep(keep)?);
                } else {
                    named.push((name, tensor));
                }
            }
            Ok(())
        })?;
        Self::assemble(config, named, &narrow, device, kind)
    }

    /// Random weights: normal with the config's deviation, norms at one, biases at zero. The same
    /// seed gives the same weights on every device and with any number of threads: no draw of libtorch's
    /// own is taken.
    pub fn init(config: Config, device: Device, kind: Kind, seed: u64) -> Result<Self> {
        config.validate()?;
        let deviation = config.initializer_range;
        let draw = |(at, (name, shape)): (usize, (String, Vec<i64>))| {
            let tensor = if name.ends_with("norm.weight") {
                Tensor::f_ones(&shape, (kind, device))?
            } else if name.ends_with(".bias") {
                Tensor::f_zeros(&shape, (kind, device))?
            } else {
                normal(&shape, deviation, (seed, at as u64))?.f_to_device(device)?.f_to_kind(kind)?
            };
            Ok((name, tensor))
        };
        let table = config.tensors();
        let named = tch::no_grad(|| table.into_iter().enumerate().map(draw).collect::<Result<_>>())?;
        Self::assemble(config, named, &HashMap::new(), device, kind)
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    pub fn device(&self) -> Device {
        self.device
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Every weight by its Hugging Face name, in a fixed order. The tensors share storage with the
    /// model: writing into one changes the model. A tied head is not listed, nor are adapters and what they
    /// keep in bytes.
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        self.named.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
    }

    /// Whether [`Model::hidden`] records a graph for gradients of the weights.
    pub fn set_trainable(&self, trainable: bool) {
        for (_, tensor) in &self.named {
            let _ = tensor.set_requires_grad(trainable);
        }
    }

    /// Hidden states after the final norm, `[b, t, h]`, of token ids int64 `[b, t]` on any device.
    ///
    /// Causal, positions from 0. Rows may be padded on the right with any token: padding disturbs
    /// only its own positions. Differentiable; wrap it in [`tch::no_grad`] for inference.
    pub fn hidden(&self, ids_bt: &Tensor) -> Result<Tensor> {
        let (rows, tokens) = self.check_ids(ids_bt)?;
        let lengths = vec![tokens; rows as usize];
        let hidden_nh = self.hidden_packed(&ids_bt.f_reshape([-1])?, &lengths)?;
        Ok(hidden_nh.f_view([rows, tokens, -1])?)
    }

    /// Logits `[..., v]` of hidden states `[..., h]`, in the model's kind.
    pub fn head(&self, hidden_nh: &Tensor) -> Result<Tensor> {
        Ok(hidden_nh.f_linear(&self.head_vh, None::<&Tensor>)?)
    }

    /// The head's weight `[v, h]`, sharing the model's storage.
    pub fn head_weight(&self) -> Tensor {
        self.head_vh.shallow_clone()
    }

    /// Adds `lengths[b]` tokens of each row of `ids_bt` (padded on the right) to the cache, and
    /// gives the hidden state `[b, h]` of each row's last. The cache may already hold positions.
    /// Records no gradients.
    pub fn prefill(&self, ids_bt: &Tensor, lengths: &[i64], cache: &mut KvCache) -> Result<Tensor> {
        let (rows, tokens) = self.check_ids(ids_bt)?;
        if lengths.len() as i64 != rows || lengths.iter().any(|&length| !(1..=tokens).contains(&length)) {
            return Err(Error::Invalid(format!(
                "lengths {lengths:?} do not fit token ids of shape [{rows}, {tokens}]"
            )));
        }
        tch::no_grad(|| {
            let hidden_bth = self.extend(ids_bt, cache)?;
            cache.advance(lengths);
            let last_b = Tensor::f_from_slice(lengths)?.f_sub_scalar(1)?.f_to_device(self.device)?;
            let row_b = Tensor::f_arange(rows, (Kind::Int64, self.device))?;
            self.final_norm(&hidden_bth.f_index(&[Some(row_b), Some(last_b)])?)
        })
    }

    /// Adds one token to each row, ids int64 `[b]`, and gives its hidden state `[b, h]`. Records
    /// no gradients.
    pub fn decode(&self, ids_b: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        let ids_bt = ids_b.f_unsqueeze(-1)?;
        let (rows, _) = self.check_ids(&ids_bt)?;
        tch::no_grad(|| {
            let hidden_bth = self.extend(&ids_bt, cache)?;
            cache.advance(&vec![1; rows as usize]);
            self.final_norm(&hidden_bth.f_squeeze_dim(1)?)
        })
    }

    /// Writes `config.json` and `model.safetensors` in this kind, adapters merged into their projections in f32;
    /// the weights appear complete or not at all.
    pub fn save(&self, dir: &Path, kind: Kind) -> Result<()> {
        save(&self.config, dir, kind, |name| self.merged(name))
    }

    /// A copy of the weights as [`Model::save`] would write them now, on the CPU and in the model's kind.
    pub fn copied(&self) -> Result<Weights> {
        let copy = |(name, _): (String, Vec<i64>)| -> Result<(String, Tensor)> {
            let tensor = self.merged(&name)?;
            let mut copy = Tensor::f_empty(tensor.size(), (self.kind, Device::Cpu))?;
            copy.f_copy_(&tensor)?;
            Ok((name, copy))
        };
        let named = tch::no_grad(|| self.config.tensors().into_iter().map(copy).collect::<Result<_>>())?;
        Ok(Weights { config: self.config.clone(), named, kind: self.kind })
    }

    /// Of tensors in the order of [`Config::tensors`], and those weights that are not among them.
    fn assemble(
        config: Config,
        named: Vec<(String, Tensor)>,
        narrow: &HashMap<String, Weight>,
        device: Device,
        kind: Kind,
    ) -> Result<Self> {
        let tensors: HashMap<&str, &Tensor> = named.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let find = |name: &str| tensors.get(name).map(|tensor| tensor.shallow_clone());
        let take = |name: &str| find(name).ok_or_else(|| Error::Invalid(format!("no tensor {name:?}")));
        let embedding_vh = take("model.embed_tokens.weight")?;
        let weight =
            |name: &str| Ok(find(name).map(Weight::Plain).or_else(|| narrow.get(name).map(Weight::shallow_clone)));
        let blocks =
            (0..config.num_hidden_layers).map(|layer| Block::assemble(layer, &weight)).collect::<Result<Vec<_>>>()?;
        let norm_h = take("model.norm.weight")?;
        let head_vh = if config.tie_word_embeddings { embedding_vh.shallow_clone() } else { take("lm_head.weight")? };
        let rope = Rope::new(&config, device)?;
        Ok(Self { embedding_vh, blocks, norm_h, head_vh, rope, kind, device, named, config, lora: None })
    }

    /// Rows and positions of token ids, once they are known to fit the model.
    fn check_ids(&self, ids_bt: &Tensor) -> Result<(i64, i64)> {
        let shape = ids_bt.size();
        let &[rows, tokens] = shape.as_slice() else {
            return Err(Error::Invalid(format!("token ids of shape {shape:?}; it must be [rows, positions]")));
        };
        if rows < 1 || tokens < 1 || ids_bt.kind() != Kind::Int64 {
            return Err(Error::Invalid(format!(
                "token ids of shape {shape:?} and kind {:?}; give at least one int64 id",
                ids_bt.kind()
            )));
        }
        let context = self.config.max_position_embeddings;
        if tokens > context {
            return Err(Error::TooLong(format!("{tokens} positions are more than the model's context of {context}")));
        }
        self.check_vocabulary(ids_bt)?;
        Ok((rows, tokens))
    }

    fn embed(&self, ids_bt: &Tensor) -> Result<Tensor> {
        let ids_bt = ids_bt.f_to_device(self.device)?;
        Ok(Tensor::f_embedding(&self.embedding_vh, &ids_bt, -1, false, false)?)
    }

    fn final_norm(&self, hidden_nh: &Tensor) -> Result<Tensor> {
        norm(hidden_nh, &self.norm_h, self.config.rms_norm_eps)
    }

    /// Runs new tokens against the cache and stores them there, without counting them.
    fn extend(&self, ids_bt: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        let (rows, tokens) = ids_bt.size2()?;
        if rows != cache.batch() as i64 {
            return Err(Error::Invalid(format!("{rows} rows of token ids for a cache of {} rows", cache.batch())));
        }
        let step = cache.plan(tokens)?;
        let angles = self.rope.angles(&step.position_bt, self.kind)?.over_heads()?;
        let mut hidden_bth = self.embed(ids_bt)?;
        for (layer, block) in self.blocks.iter().enumerate() {
            hidden_bth = block.forward(&self.config, &hidden_bth, &angles, None, |query, key, value| {
                cache.attend(layer, &step, query, key, value)
            })?;
        }
        Ok(hidden_bth)
    }
}

#[cfg(test)]
mod tests;
