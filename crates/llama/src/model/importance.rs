//! How much of what a model does on given texts each layer, head and channel has a part in: what pruning goes by.
//!
//! Widths by Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation" (2024): the
//! size of a head's output, of an activation inside the feed-forward block, of a norm's output, as the mean over
//! a text's tokens and then the L2 norm over texts. Layers by Men et al., "ShortGPT" (2024): block influence.
//! One forward pass a text, nothing but sums is kept.

use tch::{Kind, Tensor};

use super::{Model, block::Seen};
use crate::Result;

/// What [`Observer::finish`] gives. All numbers are at least 0, or not finite where the model's activations are
/// not.
#[derive(Clone, Debug, PartialEq)]
pub struct Importance {
    /// Of every layer of the model.
    pub layers: Vec<LayerImportance>,
    /// As of the layers' norms.
    pub final_norm: Vec<f64>,
    pub texts: u32,
    pub tokens: u64,
}

#[derive(Clone, Debug, PartialEq)]
pub struct LayerImportance {
    /// 1 - cosine of the layer's input and output, mean over all tokens; 0 to 2.
    pub influence: f64,
    /// Of each query head: the L2 norm of its output.
    pub heads: Vec<f64>,
    /// Of each channel inside the feed-forward block: its activation's absolute value.
    pub channels: Vec<f64>,
    /// Of each hidden channel: the absolute value of what the norm before attention gives.
    pub input_norm: Vec<f64>,
    /// The same of the norm before the feed-forward block.
    pub post_norm: Vec<f64>,
}

/// Sums over the texts that a model has been shown.
#[derive(Debug)]
pub struct Observer<'a> {
    model: &'a Model,
    layers: Vec<LayerSums>,
    final_norm: Sums,
    texts: u32,
    tokens: u64,
}

#[derive(Debug, Default)]
struct LayerSums {
    turn: f64,
    heads: Sums,
    channels: Sums,
    input_norm: Sums,
    post_norm: Sums,
}

/// One sum a channel.
#[derive(Debug, Default)]
struct Sums(Vec<f64>);

impl<'a> Observer<'a> {
    /// Nothing seen yet.
    pub fn new(model: &'a Model) -> Self {
        let layers = (0..model.blocks.len()).map(|_| LayerSums::default()).collect();
        Self { model, layers, final_norm: Sums::default(), texts: 0, tokens: 0 }
    }

    /// Runs the model over a text of at least one token id, and no more than its context; records no gradients.
    pub fn add(&mut self, ids: &[i64]) -> Result<()> {
        tch::no_grad(|| self.observe(ids))
    }

    /// Zeros where nothing was seen.
    pub fn finish(self) -> Importance {
        let tokens = self.tokens.max(1) as f64;
        let layer = |sums: LayerSums| LayerImportance {
            // Unlike `max`, keeps what is not a number.
            influence: (sums.turn / tokens).clamp(0.0, 2.0),
            heads: sums.heads.root(),
            channels: sums.channels.root(),
            input_norm: sums.input_norm.root(),
            post_norm: sums.post_norm.root(),
        };
        Importance {
            layers: self.layers.into_iter().map(layer).collect(),
            final_norm: self.final_norm.root(),
            texts: self.texts,
            tokens: self.tokens,
        }
    }

    fn observe(&mut self, ids: &[i64]) -> Result<()> {
        let model = self.model;
        let ids_n = Tensor::f_from_slice(ids)?;
        let mut hidden_1nh = model.embedded(&ids_n)?.f_unsqueeze(0)?;
        let tokens = ids.len() as i64;
        let documents = model.documents(tokens, &[tokens], None)?;
        for (block, sums) in model.blocks.iter().zip(&mut self.layers) {
            let attend = |query: &Tensor, key: &Tensor, value: &Tensor| documents.attend(query, key, value);
            let see = |seen: Seen| match seen {
                Seen::InputNorm(normed) => sums.input_norm.add_square_of_mean(&rows(normed)?.f_abs()?),
                Seen::Mixed(mixed) => {
                    let heads = [-1, model.config.num_attention_heads, model.config.head_dim];
                    let heads_nqd = mixed.f_to_kind(Kind::Float)?.f_view(heads)?;
                    let size_nq = heads_nqd.f_square()?.f_sum_dim_intlist([-1i64].as_slice(), false, Kind::Float)?;
                    sums.heads.add_square_of_mean(&size_nq.f_sqrt()?)
                }
                Seen::PostNorm(normed) => sums.post_norm.add_square_of_mean(&rows(normed)?.f_abs()?),
                Seen::Inner(inner) => sums.channels.add_square_of_mean(&rows(inner)?.f_abs()?),
            };
            let next_1nh = block.forward_seen(&model.config, &hidden_1nh, &documents.angles, None, attend, see)?;
            sums.turn += turn(&rows(&hidden_1nh)?, &rows(&next_1nh)?)?;
            hidden_1nh = next_1nh;
        }
        self.final_norm.add_square_of_mean(&rows(&model.final_norm(&hidden_1nh)?)?.f_abs()?)?;
        self.texts = self.texts.saturating_add(1);
        self.tokens += ids.len() as u64;
        Ok(())
    }
}

impl Sums {
    /// `values_nc` is `[n, c]`.
    fn add_square_of_mean(&mut self, values_nc: &Tensor) -> Result<()> {
        let means = Vec::<f64>::try_from(values_nc.f_mean_dim([0i64].as_slice(), false, Kind::Double)?)?;
        self.0.resize(means.len(), 0.0);
        for (sum, mean) in self.0.iter_mut().zip(means) {
            *sum += mean * mean;
        }
        Ok(())
    }

    fn root(self) -> Vec<f64> {
        self.0.into_iter().map(f64::sqrt).collect()
    }
}

/// `[1, n, c]` as f32 `[n, c]`.
fn rows(values_1nc: &Tensor) -> Result<Tensor> {
    Ok(values_1nc.f_squeeze_dim(0)?.f_to_kind(Kind::Float)?)
}

/// Sum over tokens of 1 - cosine between the rows of two `[n, h]`.
fn turn(before_nh: &Tensor, after_nh: &Tensor) -> Result<f64> {
    let cosine_n = Tensor::f_cosine_similarity(before_nh, after_nh, -1, 1e-8)?.f_to_kind(Kind::Double)?;
    Ok(cosine_n.f_neg()?.f_add_scalar(1.0)?.f_sum(Kind::Double)?.f_double_value(&[])?)
}

#[cfg(test)]
mod tests;
