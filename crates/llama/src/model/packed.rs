//! Documents laid one after another without padding ("packed"): no document sees another, and positions
//! start anew with each.

use tch::{Device, Kind, Tensor};

use super::{Masks, Model};
use crate::{
    Error, Result,
    attention::{self, Mask},
    rope::Angles,
};

/// Where documents begin and end, and what their positions need.
pub(super) struct Documents {
    /// Of each run of documents of one length: documents, tokens of each, and the window's bias where the
    /// causal mask does not say it all.
    runs: Vec<(i64, i64, Option<Tensor>)>,
    pub(super) angles: Angles,
    /// Of adapters, in training.
    masks: Option<Masks>,
}

/// What [`Model::backward`] computes the blocks again from: their inputs, `[1, n, h]` each, and the last one's
/// output.
pub struct Tape {
    documents: Documents,
    inputs: Vec<Tensor>,
}

impl Model {
    /// Embeddings `[n, h]` of token ids int64 `[n]` on any device.
    pub fn embedded(&self, ids_n: &Tensor) -> Result<Tensor> {
        let shape = ids_n.size();
        if shape.len() != 1 || shape[0] < 1 {
            return Err(Error::Invalid(format!(
                "token ids of shape {shape:?}; packed documents lie one after another"
            )));
        }
        self.check_vocabulary(ids_n)?;
        self.embed(ids_n)
    }

    /// Hidden states after the final norm, `[n, h]`, of token ids int64 `[n]` on any device: documents of
    /// `lengths` tokens one after another. Causal. Differentiable; wrap it in [`tch::no_grad`] for inference.
    pub fn hidden_packed(&self, ids_n: &Tensor, lengths: &[i64]) -> Result<Tensor> {
        self.hidden_masked(&self.embedded(ids_n)?, lengths, None)
    }

    /// As [`Model::hidden_packed`] of what [`Model::embedded`] gave, with `masks` over what goes into adapters.
    pub fn hidden_masked(&self, embedded_nh: &Tensor, lengths: &[i64], masks: Option<Masks>) -> Result<Tensor> {
        let documents = self.documents(embedded_nh.size2()?.0, lengths, masks)?;
        let mut hidden_1nh = embedded_nh.f_unsqueeze(0)?;
        for layer in 0..self.blocks.len() {
            hidden_1nh = self.block(layer, &hidden_1nh, &documents)?;
        }
        self.final_norm(&hidden_1nh.f_squeeze_dim(0)?)
    }

    /// As [`Model::hidden_masked`] without a graph, and what a backward pass starts from: one input a block
    /// instead of all that happens in it (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016).
    pub fn hidden_taped(&self, embedded_nh: &Tensor, lengths: &[i64], masks: Option<Masks>) -> Result<(Tensor, Tape)> {
        tch::no_grad(|| {
            let documents = self.documents(embedded_nh.size2()?.0, lengths, masks)?;
            let mut inputs = Vec::with_capacity(self.blocks.len() + 1);
            let mut hidden_1nh = embedded_nh.f_unsqueeze(0)?;
            for layer in 0..self.blocks.len() {
                let next = self.block(layer, &hidden_1nh, &documents)?;
                inputs.push(std::mem::replace(&mut hidden_1nh, next));
            }
            let hidden_nh = self.final_norm(&hidden_1nh.f_squeeze_dim(0)?)?;
            inputs.push(hidden_1nh);
            Ok((hidden_nh, Tape { documents, inputs }))
        })
    }

    /// Adds to the weights' gradients those of a loss whose gradient in [`Model::hidden_taped`]'s hidden states is
    /// `grad_nh`: block after block from the last, each computed once more. Gives the gradient in the embeddings,
    /// `[n, h]`.
    pub fn backward(&self, tape: Tape, grad_nh: &Tensor) -> Result<Tensor> {
        let Tape { documents, mut inputs } = tape;
        let last = inputs.pop().ok_or_else(|| Error::Invalid("a tape without inputs".into()))?;
        let mut grad_1nh = through(&last, &grad_nh.f_unsqueeze(0)?, |input| self.final_norm(input))?;
        for layer in (0..self.blocks.len()).rev() {
            let input = inputs.pop().ok_or_else(|| Error::Invalid("a tape of fewer blocks".into()))?;
            grad_1nh = through(&input, &grad_1nh, |input| self.block(layer, input, &documents))?;
        }
        Ok(grad_1nh.f_squeeze_dim(0)?)
    }

    fn block(&self, layer: usize, hidden_1nh: &Tensor, documents: &Documents) -> Result<Tensor> {
        self.blocks[layer].forward(&self.config, hidden_1nh, &documents.angles, documents.masks, |query, key, value| {
            documents.attend(query, key, value)
        })
    }

    /// Of `lengths` tokens each, `tokens` together.
    pub(super) fn documents(&self, tokens: i64, lengths: &[i64], masks: Option<Masks>) -> Result<Documents> {
        if lengths.iter().sum::<i64>() != tokens || lengths.iter().any(|&length| length < 1) || tokens < 1 {
            return Err(Error::Invalid(format!("{tokens} token ids for documents of {lengths:?} tokens")));
        }
        let context = self.config.max_position_embeddings;
        if let Some(length) = lengths.iter().find(|&&length| length > context) {
            return Err(Error::TooLong(format!("{length} positions are more than the model's context of {context}")));
        }
        let run = |run: &[i64]| -> Result<(i64, i64, Option<Tensor>)> {
            let tokens = run[0];
            let bias = match self.config.sliding_window {
                Some(window) if tokens > window => {
                    let position_1t = Tensor::f_arange(tokens, (Kind::Int64, self.device))?.f_unsqueeze(0)?;
                    Some(attention::bias(&position_1t, tokens, Some(window), (self.kind, self.device))?)
                }
                _ => None,
            };
            Ok((run.len() as i64, tokens, bias))
        };
        let runs = lengths.chunk_by(|a, b| a == b).map(run).collect::<Result<_>>()?;
        let positions: Vec<i64> = lengths.iter().flat_map(|&length| 0..length).collect();
        let angles = self.rope.angles(&Tensor::f_from_slice(&positions)?.f_to_device(self.device)?, self.kind)?;
        Ok(Documents { runs, angles, masks })
    }

    /// Refuses ids that the embedding has no row for.
    pub(super) fn check_vocabulary(&self, ids: &Tensor) -> Result<()> {
        // On a GPU the check would wait for all work before it; ids are made on the CPU.
        if ids.device() != Device::Cpu {
            return Ok(());
        }
        let (least, most) = (ids.f_min()?.f_int64_value(&[])?, ids.f_max()?.f_int64_value(&[])?);
        let vocabulary = self.config.vocab_size;
        if least >= 0 && most < vocabulary {
            return Ok(());
        }
        let wrong = if least < 0 { least } else { most };
        Err(Error::Invalid(format!("token id {wrong} is outside the model's vocabulary of {vocabulary}")))
    }
}

impl Documents {
    /// Each document over itself; a run of documents of one length goes together. `[1, heads, n, d]` each.
    pub(super) fn attend(&self, query_1qnd: &Tensor, key_1knd: &Tensor, value_1knd: &Tensor) -> Result<Tensor> {
        let sizes: Vec<i64> = self.runs.iter().map(|(count, tokens, _)| count * tokens).collect();
        let split = |heads: &Tensor| heads.f_split_with_sizes(&sizes[..], 2);
        let (queries, keys, values) = (split(query_1qnd)?, split(key_1knd)?, split(value_1knd)?);
        let mut mixed = Vec::with_capacity(self.runs.len());
        for ((((count, tokens, bias), query), key), value) in self.runs.iter().zip(&queries).zip(&keys).zip(&values) {
            let apart = |heads_1hnd: &Tensor| -> Result<Tensor> {
                let (_, heads, _, size) = heads_1hnd.size4()?;
                Ok(heads_1hnd.f_reshape([heads, *count, *tokens, size])?.f_transpose(0, 1)?)
            };
            let mask = bias.as_ref().map_or(Mask::Causal, Mask::Bias);
            let out_bqtd = attention::attend(&apart(query)?, &apart(key)?, &apart(value)?, &mask)?;
            let (_, heads, _, size) = out_bqtd.size4()?;
            mixed.push(out_bqtd.f_transpose(0, 1)?.f_reshape([1, heads, count * tokens, size])?);
        }
        if mixed.len() == 1 {
            return Ok(mixed.remove(0));
        }
        Ok(Tensor::f_cat(&mixed, 2)?)
    }
}

/// The gradient in `input` of a loss whose gradient in `compute(input)` is `grad`; those of weights are added to
/// theirs.
fn through(input: &Tensor, grad: &Tensor, compute: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let input = input.f_detach()?.set_requires_grad(true);
    // The gradient of this sum in what was computed is `grad`; its value means nothing.
    compute(&input)?.f_mul(grad)?.f_sum(Kind::Float)?.f_backward()?;
    Ok(input.f_grad()?)
}
