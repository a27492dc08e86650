//! A smaller model out of a model's own weights: some of its layers, and of these some heads and channels.

use std::collections::HashMap;

use tch::{Kind, Tensor};

use super::Model;
use crate::{Config, Error, Result};

/// What stays. Indices are the model's, from 0, and every list ascends.
#[derive(Clone, Debug, PartialEq)]
pub struct Cut {
    pub layers: Vec<LayerCut>,
    /// Hidden channels, the same ones everywhere: what a layer adds, all later ones read.
    pub hidden: Vec<usize>,
}

/// What stays of one layer. All layers of a cut keep equally many of each.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerCut {
    pub layer: usize,
    pub key_value_heads: Vec<usize>,
    /// Equally many of each key-value head that stays, and none of another.
    pub query_heads: Vec<usize>,
    /// Inside the feed-forward block.
    pub channels: Vec<usize>,
}

impl Cut {
    /// These layers in their whole width.
    pub fn to_layers(config: &Config, keep: &[usize]) -> Self {
        let all = |size: i64| (0..size.unsigned_abs() as usize).collect::<Vec<_>>();
        let layer = |&layer: &usize| LayerCut {
            layer,
            key_value_heads: all(config.num_key_value_heads),
            query_heads: all(config.num_attention_heads),
            channels: all(config.intermediate_size),
        };
        Self { layers: keep.iter().map(layer).collect(), hidden: all(config.hidden_size) }
    }

    /// Refuses what `config` has not, and what would be no model.
    fn check(&self, config: &Config) -> Result<()> {
        let layers: Vec<usize> = self.layers.iter().map(|layer| layer.layer).collect();
        check_list("layers", &layers, config.num_hidden_layers)?;
        check_list("hidden channels", &self.hidden, config.hidden_size)?;
        let sizes = |layer: &LayerCut| [layer.key_value_heads.len(), layer.query_heads.len(), layer.channels.len()];
        let group = config.num_attention_heads / config.num_key_value_heads;
        for layer in &self.layers {
            check_list("key-value heads", &layer.key_value_heads, config.num_key_value_heads)?;
            check_list("query heads", &layer.query_heads, config.num_attention_heads)?;
            check_list("channels", &layer.channels, config.intermediate_size)?;
            let each = layer.query_heads.len() / layer.key_value_heads.len();
            let of_group = |(&key_value, queries): (&usize, &[usize])| {
                queries.len() == each && queries.iter().all(|&query| query as i64 / group == key_value as i64)
            };
            let grouped = each * layer.key_value_heads.len() == layer.query_heads.len()
                && layer.key_value_heads.iter().zip(layer.query_heads.chunks(each)).all(of_group);
            if !grouped {
                return Err(Error::Invalid(format!(
                    "query heads {:?} cannot be kept with key-value heads {:?}: each serves {group} in turn, keep \
                     equally many of each",
                    layer.query_heads, layer.key_value_heads
                )));
            }
            if sizes(layer) != sizes(&self.layers[0]) {
                return Err(Error::Invalid(format!(
                    "layer {} keeps {:?} key-value heads, query heads and channels, the first {:?}",
                    layer.layer,
                    sizes(layer),
                    sizes(&self.layers[0])
                )));
            }
        }
        Ok(())
    }

    fn config(&self, config: &Config) -> Config {
        let kept = |count: &dyn Fn(&LayerCut) -> usize| self.layers.first().map_or(0, count) as i64;
        Config {
            num_hidden_layers: self.layers.len() as i64,
            intermediate_size: kept(&|layer| layer.channels.len()),
            num_attention_heads: kept(&|layer| layer.query_heads.len()),
            num_key_value_heads: kept(&|layer| layer.key_value_heads.len()),
            ..config.clone()
        }
        .of_width(self.hidden.len() as i64)
    }
}

impl Model {
    /// The model that `cut` leaves, with its own copy of every weight. Norms are scaled so that channels which were
    /// zero are not missed.
    pub fn prune(&self, cut: &Cut) -> Result<Self> {
        if self.lora.is_some() {
            return Err(Error::Invalid("a model with adapters cannot be pruned".into()));
        }
        cut.check(&self.config)?;
        let config = cut.config(&self.config);
        let slices = Slices { cut, config: &self.config };
        let named: HashMap<&str, &Tensor> = self.named.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let copy = |(name, shape): (String, Vec<i64>)| {
            let slice = slices.of(&name)?;
            let tensor = named
                .get(slice.source.as_str())
                .ok_or_else(|| Error::Invalid(format!("no tensor {:?}", slice.source)))?;
            let copy = slice.take(tensor)?;
            if copy.size() != shape {
                return Err(Error::Invalid(format!("{name:?} was cut to {:?}, not to {shape:?}", copy.size())));
            }
            Ok((name, copy))
        };
        let table = config.tensors();
        let copies = tch::no_grad(|| table.into_iter().map(copy).collect::<Result<_>>())?;
        Self::assemble(config, copies, &HashMap::new(), self.device, self.kind)
    }

    /// [`Model::prune`] to the layers `keep` in their whole width.
    pub fn prune_layers(&self, keep: &[usize]) -> Result<Self> {
        self.prune(&Cut::to_layers(&self.config, keep))
    }
}

fn check_list(what: &str, kept: &[usize], size: i64) -> Result<()> {
    let ascending = kept.windows(2).all(|pair| pair[0] < pair[1]);
    if kept.is_empty() || !ascending || kept.iter().any(|&index| index as i64 >= size) {
        return Err(Error::Invalid(format!(
            "{what} {kept:?} cannot be kept: name some of 0 to {}, in ascending order",
            size - 1
        )));
    }
    Ok(())
}

/// Where each of the smaller model's tensors comes from.
struct Slices<'a> {
    cut: &'a Cut,
    /// Of the model that is cut.
    config: &'a Config,
}

/// One tensor of the smaller model.
struct Slice {
    /// Its name in the model that is cut.
    source: String,
    /// Indices kept on each axis; `None` keeps all.
    axes: [Option<Vec<i64>>; 2],
    scale: f64,
}

impl Slices<'_> {
    fn of(&self, name: &str) -> Result<Slice> {
        let hidden = || self.some(&self.cut.hidden, self.config.hidden_size, 1);
        let slice = |source: &str, axes, scale| Ok(Slice { source: source.to_owned(), axes, scale });
        let Some((layer, part)) = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) else {
            return match name {
                "model.norm.weight" => slice(name, [hidden(), None], self.norm_scale()),
                // Embeddings and a head of its own, `[v, h]`.
                _ => slice(name, [None, hidden()], 1.0),
            };
        };
        let unknown = || Error::Invalid(format!("no way to cut {name:?}"));
        let layer = layer.parse::<usize>().ok().and_then(|layer| self.cut.layers.get(layer)).ok_or_else(unknown)?;
        let source = format!("model.layers.{}.{part}", layer.layer);
        let queries = || self.some(&layer.query_heads, self.config.num_attention_heads, self.config.head_dim);
        let keys = || self.some(&layer.key_value_heads, self.config.num_key_value_heads, self.config.head_dim);
        let inner = || self.some(&layer.channels, self.config.intermediate_size, 1);
        let (projection, field) = part.rsplit_once('.').ok_or_else(unknown)?;
        let (outputs, inputs) = match projection {
            "input_layernorm" | "post_attention_layernorm" => {
                return slice(&source, [hidden(), None], self.norm_scale());
            }
            "self_attn.q_proj" => (queries(), hidden()),
            "self_attn.k_proj" | "self_attn.v_proj" => (keys(), hidden()),
            "self_attn.o_proj" => (hidden(), queries()),
            "mlp.gate_proj" | "mlp.up_proj" => (inner(), hidden()),
            "mlp.down_proj" => (hidden(), inner()),
            _ => return Err(unknown()),
        };
        slice(&source, [outputs, if field == "bias" { None } else { inputs }], 1.0)
    }

    /// By what norms are multiplied: each divides by a mean over fewer channels, which is larger by this squared if
    /// those that go were zero.
    fn norm_scale(&self) -> f64 {
        (self.config.hidden_size as f64 / self.cut.hidden.len() as f64).sqrt()
    }

    /// Indices of `kept` runs of `run` numbers each; `None` where all `size` are kept.
    fn some(&self, kept: &[usize], size: i64, run: i64) -> Option<Vec<i64>> {
        let indices = || kept.iter().flat_map(|&index| (0..run).map(move |at| index as i64 * run + at)).collect();
        (kept.len() as i64 != size).then(indices)
    }
}

impl Slice {
    /// A copy of what is kept of `tensor`, in its kind.
    fn take(&self, tensor: &Tensor) -> Result<Tensor> {
        let mut kept = tensor.f_detach()?;
        for (axis, indices) in (0i64..).zip(&self.axes) {
            if let Some(indices) = indices {
                kept = kept.f_index_select(axis, &Tensor::f_from_slice(indices)?.f_to_device(tensor.device())?)?;
            }
        }
        if self.scale != 1.0 {
            kept = kept.f_to_kind(Kind::Float)?.f_mul_scalar(self.scale)?.f_to_kind(tensor.kind())?;
        }
        let mut copy = kept.f_empty_like()?;
        copy.f_copy_(&kept)?;
        Ok(copy)
    }
}

#[cfg(test)]
mod tests;
