//! The backward pass of packed documents, block after block, and what of the forward pass it needs.
//!
//! Projections are autograd's. On a CPU what lies between them is not: norms and attention have their gradients in
//! closed form, in retort-kernels, with fewer passes over memory (docs/decisions/020).

use half::bf16;
use retort_kernels::Norm;
use tch::{Kind, Tensor, no_grad};

use super::{Masks, Model, packed::Documents};
use crate::{
    Error, Result,
    attention::host::Heads,
    memory::{Number, is_host, read, threads, write},
};

/// What [`Model::backward`] needs of the forward pass.
pub struct Tape {
    documents: Documents,
    blocks: Vec<Kept>,
    /// The last block's output, `[1, n, h]`.
    last: Tensor,
}

/// What a block's backward pass begins with.
enum Kept {
    /// Its input, `[1, n, h]`: it is computed once more (Chen et al., "Training Deep Nets with Sublinear Memory Cost",
    /// 2016).
    Input(Tensor),
    Graph(Graph),
    Pieces(Box<Pieces>),
}

/// What autograd recorded between a tensor without a past and what was made of it.
struct Graph {
    from: Tensor,
    to: Vec<Tensor>,
}

/// A block in pieces, each `[1, n, ..]`.
struct Pieces {
    input: Tensor,
    projected: Graph,
    heads: Heads,
    attended: Graph,
    /// Between attention and the feed-forward block.
    middle: Tensor,
    fed: Graph,
}

impl Model {
    /// As [`Model::hidden_masked`] but for roundings, with a tape for [`Model::backward`] instead of a graph. Where blocks are
    /// `recomputed` it holds one tensor a block.
    pub fn hidden_taped(
        &self,
        embedded_nh: &Tensor,
        lengths: &[i64],
        masks: Option<Masks>,
        recomputed: bool,
    ) -> Result<(Tensor, Tape)> {
        let documents = self.documents(embedded_nh.size2()?.0, lengths, masks)?;
        let mut blocks = Vec::with_capacity(self.blocks.len());
        let mut last = embedded_nh.f_detach()?.f_unsqueeze(0)?;
        for layer in 0..self.blocks.len() {
            // Both ways the same operators, so that both give the same bits.
            let pass = || self.block_kept(layer, &last, &documents);
            let (next, kept) = if recomputed { no_grad(pass)? } else { pass()? };
            let input = std::mem::replace(&mut last, next);
            blocks.push(if recomputed { Kept::Input(input) } else { kept });
        }
        let hidden_1nh =
            if is_host(&last) { self.normed(&self.norm_h, &last)? } else { no_grad(|| self.final_norm(&last))? };
        Ok((hidden_1nh.f_squeeze_dim(0)?, Tape { documents, blocks, last }))
    }

    /// Adds to the weights' gradients those of a loss whose gradient in [`Model::hidden_taped`]'s hidden states is
    /// `grad_nh`, block after block from the last. Gives the gradient in the embeddings, `[n, h]`.
    pub fn backward(&self, tape: Tape, grad_nh: &Tensor) -> Result<Tensor> {
        let Tape { documents, blocks, last } = tape;
        let grad_1nh = grad_nh.f_unsqueeze(0)?;
        let mut grad_1nh = if is_host(&last) {
            self.norm_back(&self.norm_h, &last, &grad_1nh, last.f_zeros_like()?)?
        } else {
            let graph = Graph::record(&last, |last| Ok(vec![self.final_norm(last)?]))?;
            graph.back(&[&grad_1nh])?
        };
        drop(last);
        for (layer, kept) in blocks.into_iter().enumerate().rev() {
            grad_1nh = match kept {
                Kept::Input(input) => {
                    let (_, kept) = self.block_kept(layer, &input, &documents)?;
                    self.block_back(layer, kept, grad_1nh, &documents)?
                }
                kept => self.block_back(layer, kept, grad_1nh, &documents)?,
            };
        }
        Ok(grad_1nh.f_squeeze_dim(0)?)
    }

    /// A block's output, without a past, and all that its backward pass needs.
    fn block_kept(&self, layer: usize, input_1nh: &Tensor, documents: &Documents) -> Result<(Tensor, Kept)> {
        if !is_host(input_1nh) {
            let graph = Graph::record(input_1nh, |input| Ok(vec![self.block(layer, input, documents)?]))?;
            return Ok((graph.to[0].f_detach()?, Kept::Graph(graph)));
        }
        let (block, masks) = (&self.blocks[layer], documents.masks);
        let normed_1nh = self.normed(&block.input_norm_h, input_1nh)?;
        let projected = Graph::record(&normed_1nh, |normed| {
            Ok(block.project(&self.config, normed, &documents.angles, masks)?.into())
        })?;
        let [query, key, value] = &projected.to[..] else {
            return Err(Error::Invalid("a block that projects to more or less than three".into()));
        };
        let heads = Heads::of([query, key, value])?;
        let mixed = heads.attend(documents.extent())?;
        let attended = Graph::record(&mixed, |mixed| Ok(vec![input_1nh.f_add(&block.attended(mixed, masks)?)?]))?;
        let middle = attended.to[0].f_detach()?;
        let normed_1nh = self.normed(&block.post_norm_h, &middle)?;
        let fed = Graph::record(&normed_1nh, |normed| Ok(vec![middle.f_add(&block.fed(normed, masks)?)?]))?;
        let (input, output) = (input_1nh.shallow_clone(), fed.to[0].f_detach()?);
        Ok((output, Kept::Pieces(Box::new(Pieces { input, projected, heads, attended, middle, fed }))))
    }

    /// The gradient in a block's input of a loss whose gradient in its output is `grad_1nh`.
    fn block_back(&self, layer: usize, kept: Kept, grad_1nh: Tensor, documents: &Documents) -> Result<Tensor> {
        let pieces = match kept {
            Kept::Pieces(pieces) => *pieces,
            Kept::Graph(graph) => return graph.back(&[&grad_1nh]),
            Kept::Input(_) => return Err(Error::Invalid("a block that was not computed".into())),
        };
        let Pieces { input, projected, heads, attended, middle, fed } = pieces;
        let block = &self.blocks[layer];
        let grad_normed = fed.back(&[&grad_1nh])?;
        let grad_1nh = self.norm_back(&block.post_norm_h, &middle, &grad_normed, grad_1nh)?;
        let grad_mixed = attended.back(&[&grad_1nh])?;
        let [query, key, value] = heads.gradients(documents.extent(), &grad_mixed)?;
        let grad_normed = projected.back(&[&query, &key, &value])?;
        self.norm_back(&block.input_norm_h, &input, &grad_normed, grad_1nh)
    }

    /// RMSNorm by our own kernel. Of bf16 it rounds once, where [`super::norm`] rounds before it multiplies by the weight
    /// too, as transformers does.
    fn normed(&self, weight_h: &Tensor, input: &Tensor) -> Result<Tensor> {
        let input = input.f_contiguous()?;
        let mut normed = input.f_empty_like()?;
        let weight = wide(weight_h)?;
        match input.kind() {
            Kind::BFloat16 => self.normed_in::<bf16>(&weight, &input, &mut normed)?,
            _ => self.normed_in::<f32>(&weight, &input, &mut normed)?,
        }
        Ok(normed)
    }

    fn normed_in<T: Number>(&self, weight: &[f32], input: &Tensor, normed: &mut Tensor) -> Result<()> {
        // SAFETY: it was made for this, and nobody else has it.
        let normed = unsafe { write(normed)? };
        self.norm_of(weight).forward::<T>(read(input)?, normed, threads());
        Ok(())
    }

    /// `grad`, which nobody else may hold and which is written over, and the gradient in `input` of a loss whose gradient
    /// in [`Model::normed`] is `grad_normed`; that in the weight is added to the weight's, where it trains.
    fn norm_back(&self, weight_h: &Tensor, input: &Tensor, grad_normed: &Tensor, grad: Tensor) -> Result<Tensor> {
        let (input, grad_normed) = (input.f_contiguous()?, grad_normed.f_contiguous()?);
        let mut grad = grad.f_contiguous()?;
        let weight = wide(weight_h)?;
        let grad_weight = match input.kind() {
            Kind::BFloat16 => self.norm_back_in::<bf16>(&weight, &input, &grad_normed, &mut grad)?,
            _ => self.norm_back_in::<f32>(&weight, &input, &grad_normed, &mut grad)?,
        };
        if weight_h.requires_grad() {
            let grad_weight = Tensor::f_from_slice(&grad_weight)?;
            // The gradient of this sum in the weight is that.
            weight_h.f_to_kind(Kind::Float)?.f_mul(&grad_weight)?.f_sum(Kind::Float)?.f_backward()?;
        }
        Ok(grad)
    }

    fn norm_back_in<T: Number>(
        &self,
        weight: &[f32],
        input: &Tensor,
        grad_normed: &Tensor,
        grad: &mut Tensor,
    ) -> Result<Vec<f32>> {
        // SAFETY: nobody else holds it, as the caller promises.
        let grad = unsafe { write(grad)? };
        Ok(self.norm_of(weight).back::<T>(read(input)?, read(grad_normed)?, grad, threads()))
    }

    fn norm_of<'a>(&self, weight: &'a [f32]) -> Norm<'a> {
        Norm { weight, epsilon: self.config.rms_norm_eps as f32 }
    }
}

impl Graph {
    fn record(from: &Tensor, compute: impl FnOnce(&Tensor) -> Result<Vec<Tensor>>) -> Result<Self> {
        let from = from.f_detach()?.set_requires_grad(true);
        let to = compute(&from)?;
        Ok(Self { from, to })
    }

    /// The gradient in `from` of a loss whose gradients in `to` are `grads`; those in weights are added to theirs.
    fn back(self, grads: &[&Tensor]) -> Result<Tensor> {
        let mut sum: Option<Tensor> = None;
        for (to, grad) in self.to.iter().zip(grads) {
            // The gradient of this sum in `to` is `grad`; its value means nothing.
            let part = to.f_mul(grad)?.f_sum(Kind::Float)?;
            sum = Some(match sum {
                Some(sum) => sum.f_add(&part)?,
                None => part,
            });
        }
        sum.ok_or_else(|| Error::Invalid("a graph of nothing".into()))?.f_backward()?;
        Ok(self.from.f_grad()?)
    }
}

/// A weight's numbers in f32.
fn wide(weight_h: &Tensor) -> Result<Vec<f32>> {
    let weight_h = weight_h.f_detach()?.f_to_kind(Kind::Float)?.f_contiguous()?;
    Ok(read::<f32>(&weight_h)?.to_vec())
}
