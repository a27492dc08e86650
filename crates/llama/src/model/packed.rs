//! Documents laid one after another without padding ("packed"): no document sees another, and positions
//! start anew with each.

use std::cell::OnceCell;

use tch::{Device, Kind, Tensor};

use super::{Masks, Model};
use crate::{
    Error, Result,
    attention::{
        self, Mask,
        host::{Extent, Heads},
    },
    memory::is_host,
    rope::Angles,
};

/// Where documents begin and end, and what their positions need.
pub(super) struct Documents {
    /// Positions of each.
    lengths: Vec<usize>,
    window: Option<usize>,
    /// Of each run of documents of one length, what libtorch needs.
    runs: Vec<Run>,
    pub(super) angles: Angles,
    /// Of adapters, in training.
    pub(super) masks: Option<Masks>,
}

struct Run {
    documents: i64,
    /// Of each.
    tokens: i64,
    /// The window's, where the causal mask does not say it all; made when it is needed first.
    bias: OnceCell<Tensor>,
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

    pub(super) fn block(&self, layer: usize, hidden_1nh: &Tensor, documents: &Documents) -> Result<Tensor> {
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
        let run = |run: &[i64]| Run { documents: run.len() as i64, tokens: run[0], bias: OnceCell::new() };
        let runs = lengths.chunk_by(|a, b| a == b).map(run).collect();
        let positions: Vec<i64> = lengths.iter().flat_map(|&length| 0..length).collect();
        let angles = self.rope.angles(&Tensor::f_from_slice(&positions)?.f_to_device(self.device)?, self.kind)?;
        let window = self.config.sliding_window.map(|window| window as usize);
        Ok(Documents { runs, lengths: lengths.iter().map(|&length| length as usize).collect(), window, angles, masks })
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
    /// Each document over itself, `[1, heads, n, d]` each: by our own kernel where it can and no graph is recorded.
    pub(super) fn attend(&self, query_1qnd: &Tensor, key_1knd: &Tensor, value_1knd: &Tensor) -> Result<Tensor> {
        let is_recorded = [query_1qnd, key_1knd, value_1knd].iter().any(|heads| heads.requires_grad());
        if is_recorded || !is_host(query_1qnd) {
            return self.attend_in_graph(query_1qnd, key_1knd, value_1knd);
        }
        let mixed_1nm = Heads::of([query_1qnd, key_1knd, value_1knd])?.attend(self.extent())?;
        let (_, heads, positions, size) = query_1qnd.size4()?;
        Ok(mixed_1nm.f_view([1, positions, heads, size])?.f_transpose(1, 2)?)
    }

    pub(super) fn extent(&self) -> Extent<'_> {
        Extent { lengths: &self.lengths, window: self.window }
    }

    /// As [`Documents::attend`], libtorch's; a run of documents of one length goes together.
    fn attend_in_graph(&self, query_1qnd: &Tensor, key_1knd: &Tensor, value_1knd: &Tensor) -> Result<Tensor> {
        let sizes: Vec<i64> = self.runs.iter().map(|run| run.documents * run.tokens).collect();
        let split = |heads: &Tensor| heads.f_split_with_sizes(&sizes[..], 2);
        let (queries, keys, values) = (split(query_1qnd)?, split(key_1knd)?, split(value_1knd)?);
        let mut mixed = Vec::with_capacity(self.runs.len());
        for (((run, query), key), value) in self.runs.iter().zip(&queries).zip(&keys).zip(&values) {
            let apart = |heads_1hnd: &Tensor| -> Result<Tensor> {
                let (_, heads, _, size) = heads_1hnd.size4()?;
                Ok(heads_1hnd.f_reshape([heads, run.documents, run.tokens, size])?.f_transpose(0, 1)?)
            };
            let bias = run.bias(self.window, (query.kind(), query.device()))?;
            let mask = bias.map_or(Mask::Causal, Mask::Bias);
            let out_bqtd = attention::attend(&apart(query)?, &apart(key)?, &apart(value)?, &mask)?;
            let (_, heads, _, size) = out_bqtd.size4()?;
            mixed.push(out_bqtd.f_transpose(0, 1)?.f_reshape([1, heads, run.documents * run.tokens, size])?);
        }
        if mixed.len() == 1 {
            return Ok(mixed.remove(0));
        }
        Ok(Tensor::f_cat(&mixed, 2)?)
    }
}

impl Run {
    fn bias(&self, window: Option<usize>, (kind, device): (Kind, Device)) -> Result<Option<&Tensor>> {
        let Some(window) = window.map(|window| window as i64).filter(|&window| self.tokens > window) else {
            return Ok(None);
        };
        if self.bias.get().is_none() {
            let position_1t = Tensor::f_arange(self.tokens, (Kind::Int64, device))?.f_unsqueeze(0)?;
            let _ = self.bias.set(attention::bias(&position_1t, self.tokens, Some(window), (kind, device))?);
        }
        Ok(self.bias.get())
    }
}
