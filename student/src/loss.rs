//! The head and its loss, a chunk of positions at a time.
//!
//! The gradient of every loss has a closed form in the logits ([`objective`]): `spread * q`, where
//! `q = softmax(z)`, plus a correction at each entry of the support and at the label. So no graph is kept:
//! inside a chunk the logits are computed, turned into their gradient where they lie, multiplied back into the
//! gradients of the hidden states and of the head, and overwritten by the next chunk. Nothing of size positions
//! x vocabulary ever lives.
//!
//! Shape letters: `n` target positions (of a chunk, inside the loop), `e` support entries, `h`
//! hidden size, `v` vocabulary.

mod host;
pub mod objective;
mod product;

use std::ops::Range;

use retort_core::Result;
use tch::{Device, Kind, TchError, Tensor, no_grad};

use crate::{batch::Targets, failure::torch};
use objective::{Objective, Position};

/// Bytes that one of the two working arrays of a chunk may take.
const CHUNK_BYTES: usize = 128 << 20;
/// Bounds of a chunk, positions: fewer starve the matrix product, more win nothing.
const CHUNK_POSITIONS: (usize, usize) = (16, 2048);

/// Sums over positions, each as often as its weight says, in nats.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sums {
    /// All terms as they are weighed.
    pub loss: f64,
    /// Forward KL on the sparse targets, at the loss's temperature.
    pub kl: f64,
    /// Cross-entropy on the labels; 0 unless it is part of the loss.
    pub ce: f64,
    pub positions: usize,
}

impl Sums {
    pub fn add(&mut self, other: Sums) {
        self.loss += other.loss;
        self.kl += other.kl;
        self.ce += other.ce;
        self.positions += other.positions;
    }
}

/// What a student says at each position.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Measured {
    /// `sum_v t_v (log p_v - log q_v)`, nats.
    pub kl: Vec<f64>,
    /// Most likely token.
    pub top_ids: Vec<i64>,
    /// Its log-probability.
    pub top_logprobs: Vec<f32>,
    /// Log-probability of the label.
    pub label_logprobs: Vec<f32>,
}

/// Computes losses, keeping its working memory from call to call.
#[derive(Debug)]
pub struct ChunkedLoss {
    vocab_size: i64,
    /// Positions at a time, in training and in judging.
    chunk: usize,
    measured: usize,
    /// One pass of our own stands for libtorch's several.
    fused: bool,
    /// In the head's kind.
    logits_nv: Tensor,
    logprobs_nv: Tensor,
}

impl ChunkedLoss {
    /// For a head of `vocab_size` rows in `kind`.
    pub fn new(vocab_size: i64, kind: Kind, device: Device) -> Result<Self> {
        let row = vocab_size.max(1).unsigned_abs() as usize;
        let positions = |bytes: usize| (CHUNK_BYTES / (row * bytes)).clamp(CHUNK_POSITIONS.0, CHUNK_POSITIONS.1);
        let wide = positions(size_of::<f32>());
        // Other kinds stand in f32 too on the way to their gradient.
        let chunk = if is_fused(device) && kind == Kind::BFloat16 { positions(2) } else { wide };
        Self::with_chunks(vocab_size, (kind, device), chunk, wide)
    }

    /// As [`ChunkedLoss::new`], with `chunk` positions at a time.
    pub fn with_chunk(vocab_size: i64, kind: Kind, device: Device, chunk: usize) -> Result<Self> {
        Self::with_chunks(vocab_size, (kind, device), chunk.max(1), chunk.max(1))
    }

    fn with_chunks(vocab_size: i64, (kind, device): (Kind, Device), chunk: usize, measured: usize) -> Result<Self> {
        let failed = torch("cannot allocate the loss's working memory");
        Ok(Self {
            vocab_size,
            chunk,
            measured,
            fused: is_fused(device),
            logits_nv: Tensor::f_empty([chunk as i64, vocab_size], (kind, device)).map_err(&failed)?,
            logprobs_nv: Tensor::f_empty([measured as i64, vocab_size], (Kind::Float, device)).map_err(&failed)?,
        })
    }

    /// Positions whose logits lie in memory at a time.
    pub fn positions(&self) -> usize {
        self.chunk
    }

    /// Sums over all positions, and the gradient `[n, h]` of `scale * loss` with respect to
    /// `hidden_nh`; the head's own is added to `weight_grad_vh` (f32, contiguous) where it is given.
    ///
    /// `hidden_nh` and `weight_vh` have one kind. `targets` are at the objective's temperature. No graph is
    /// recorded.
    pub fn backward(
        &mut self,
        objective: &Objective,
        hidden_nh: &Tensor,
        weight_vh: &Tensor,
        mut weight_grad_vh: Option<&mut Tensor>,
        targets: &Targets,
        scale: f64,
    ) -> Result<(Sums, Tensor)> {
        let failed = torch("cannot compute the loss");
        no_grad(|| {
            let (hidden_nh, weight_vh) = (hidden_nh.detach(), weight_vh.detach());
            let grad_nh = hidden_nh.f_zeros_like().map_err(&failed)?;
            let mut sums = Sums::default();
            let step = step(targets.len(), self.chunk);
            for start in (0..targets.len()).step_by(step) {
                let chunk = Chunk::new(targets, start, step, self.vocab_size, hidden_nh.device())?;
                let part_nh = hidden_nh.narrow(0, start as i64, chunk.n);
                let mut into_nh = grad_nh.narrow(0, start as i64, chunk.n);
                let mut part = || -> Result<Sums, TchError> {
                    let logits_nv = self.logits(&part_nh, &weight_vh)?;
                    let (sums, grad_nv) = self.gradient(objective, targets, &chunk, logits_nv)?;
                    product::hidden_gradient(&grad_nv, &weight_vh, scale, &mut into_nh)?;
                    if let Some(weight_grad_vh) = weight_grad_vh.as_deref_mut() {
                        product::add_head_gradient(&grad_nv, &part_nh, scale, weight_grad_vh)?;
                    }
                    Ok(sums)
                };
                sums.add(part().map_err(&failed)?);
            }
            Ok((sums, grad_nh))
        })
    }

    /// What the head says at every position; no gradient.
    pub fn measure(&mut self, hidden_nh: &Tensor, weight_vh: &Tensor, targets: &Targets) -> Result<Measured> {
        let failed = torch("cannot measure the head");
        no_grad(|| {
            let mut measured = Measured::default();
            let step = step(targets.len(), self.measured);
            for start in (0..targets.len()).step_by(step) {
                let chunk = Chunk::new(targets, start, step, self.vocab_size, hidden_nh.device())?;
                let part_nh = hidden_nh.narrow(0, start as i64, chunk.n);
                let mut part = || -> Result<(), TchError> {
                    let logits_nv = self.logits(&part_nh, weight_vh)?;
                    let logprobs_nv = self.logprobs(&logits_nv, 1.0)?;
                    let student_e = gather(&logprobs_nv, &chunk.support_e)?;
                    let mut corrections = vec![0.0; student_e.len()];
                    for p in chunk.positions() {
                        let entries = chunk.entries(targets, p);
                        let position = Position::of(targets, p, &student_e[entries.clone()], self.vocabulary());
                        measured.kl.push(position.forward_kl(0.0, &mut corrections[entries]).0);
                    }
                    measured.label_logprobs.extend(gather(&logprobs_nv, &chunk.labels_n)?);
                    let (top_logprobs_n, top_ids_n) = logprobs_nv.f_max_dim(-1, false)?;
                    measured.top_ids.extend(Vec::<i64>::try_from(top_ids_n)?);
                    measured.top_logprobs.extend(Vec::<f32>::try_from(top_logprobs_n)?);
                    Ok(())
                };
                part().map_err(&failed)?;
            }
            Ok(measured)
        })
    }

    fn vocabulary(&self) -> usize {
        self.vocab_size.unsigned_abs() as usize
    }

    /// The head's output `[n, v]`, in this struct's own memory.
    fn logits(&self, part_nh: &Tensor, weight_vh: &Tensor) -> Result<Tensor, TchError> {
        let logits_nv = self.logits_nv.f_narrow(0, 0, part_nh.size()[0])?;
        product::logits(part_nh, weight_vh, &logits_nv)?;
        Ok(logits_nv)
    }

    /// `log softmax(z / temperature)`, f32, in this struct's own memory.
    fn logprobs(&self, logits_nv: &Tensor, temperature: f64) -> Result<Tensor, TchError> {
        let logprobs_nv = self.logprobs_nv.f_narrow(0, 0, logits_nv.size()[0])?;
        let mut logits_nv = logits_nv.f_to_kind(Kind::Float)?;
        if temperature != 1.0 {
            logits_nv = logits_nv.f_div_scalar(temperature)?;
        }
        let _ = logits_nv.f_internal_log_softmax_out(&logprobs_nv, -1, false)?;
        Ok(logprobs_nv)
    }

    /// The chunk's sums, and the loss's gradient in its logits, of their kind, in this struct's own memory.
    fn gradient(
        &self,
        objective: &Objective,
        targets: &Targets,
        chunk: &Chunk,
        mut logits_nv: Tensor,
    ) -> Result<(Sums, Tensor), TchError> {
        let on_host = host::Rows::of(&mut logits_nv).filter(|_| self.fused);
        let Some(rows) = on_host else {
            let (sums, grad_nv) = self.gradient_by_torch(objective, targets, chunk, &logits_nv)?;
            return Ok((sums, grad_nv.f_to_kind(logits_nv.kind())?));
        };
        let sums = host::gradient(objective, targets, chunk.positions(), rows, self.vocabulary());
        Ok((sums, logits_nv))
    }

    /// As [`ChunkedLoss::gradient`], on any device; the gradient is f32.
    fn gradient_by_torch(
        &self,
        objective: &Objective,
        targets: &Targets,
        chunk: &Chunk,
        logits_nv: &Tensor,
    ) -> Result<(Sums, Tensor), TchError> {
        let device = logits_nv.device();
        let temperature = objective.temperature;
        let mut logprobs_nv = self.logprobs(logits_nv, temperature)?;
        let student_e = gather(&logprobs_nv, &chunk.support_e)?;
        let mut sums = Sums { positions: chunk.n as usize, ..Sums::default() };
        let mut corrections = vec![0.0; student_e.len()];
        let mut spread_n = Vec::with_capacity(sums.positions);
        for p in chunk.positions() {
            let entries = chunk.entries(targets, p);
            let position = Position::of(targets, p, &student_e[entries.clone()], self.vocabulary());
            let judged = objective.judge(&position, &mut corrections[entries.clone()]);
            let weight = f64::from(targets.weights[p]);
            sums.loss += weight * judged.loss;
            sums.kl += weight * judged.kl;
            spread_n.push((weight * judged.spread / temperature) as f32);
            corrections[entries].iter_mut().for_each(|correction| *correction *= weight);
        }
        let weights_n = &targets.weights[chunk.positions()];
        let weighed_ce = |logprobs: Vec<f32>| -> f64 {
            -logprobs
                .iter()
                .zip(weights_n)
                .map(|(&logprob, &weight)| f64::from(weight) * f64::from(logprob))
                .sum::<f64>()
        };
        let label_ce = objective.label_ce;
        let one_softmax = label_ce > 0.0 && temperature == 1.0;
        if one_softmax {
            sums.ce = weighed_ce(gather(&logprobs_nv, &chunk.labels_n)?);
            spread_n.iter_mut().zip(weights_n).for_each(|(spread, weight)| *spread += label_ce as f32 * weight);
        }
        let corrections: Vec<f32> = corrections.iter().map(|correction| (correction / temperature) as f32).collect();
        let spread_n1 = Tensor::f_from_slice(&spread_n)?.f_to(device)?.f_unsqueeze(1)?;
        let mut grad_nv = logprobs_nv.f_exp_()?.f_mul_(&spread_n1)?;
        let _ = grad_nv.f_view([-1])?.f_index_add_(
            0,
            &chunk.support_e,
            &Tensor::f_from_slice(&corrections)?.f_to(device)?,
        )?;
        if label_ce > 0.0 {
            let label_ce_n: Vec<f32> = weights_n.iter().map(|weight| label_ce as f32 * weight).collect();
            let label_ce_n = Tensor::f_from_slice(&label_ce_n)?.f_to(device)?;
            if !one_softmax {
                let cold_nv = logits_nv.f_log_softmax(-1, Kind::Float)?;
                sums.ce = weighed_ce(gather(&cold_nv, &chunk.labels_n)?);
                let _ = grad_nv.f_add_(&cold_nv.f_exp()?.f_mul_(&label_ce_n.f_unsqueeze(1)?)?)?;
            }
            let _ = grad_nv.f_view([-1])?.f_index_add_(0, &chunk.labels_n, &label_ce_n.f_neg()?)?;
            sums.loss += label_ce * sums.ce;
        }
        Ok((sums, grad_nv))
    }
}

/// On the CPU.
fn is_fused(device: Device) -> bool {
    device == Device::Cpu
}

/// Of each chunk of so many positions: about equal, for each chunk reads the whole head.
fn step(positions: usize, most: usize) -> usize {
    positions.div_ceil(positions.div_ceil(most).max(1)).max(1)
}

/// Entries of the flattened `[n, v]`.
fn gather(logprobs_nv: &Tensor, index: &Tensor) -> Result<Vec<f32>, TchError> {
    Vec::try_from(logprobs_nv.f_view([-1])?.f_index_select(0, index)?)
}

/// One chunk of positions. Indices number the flattened `[n, v]`, and lie on the device.
struct Chunk {
    start: usize,
    n: i64,
    /// Index among all targets' support of the chunk's first entry.
    first: usize,
    support_e: Tensor,
    labels_n: Tensor,
}

impl Chunk {
    fn new(targets: &Targets, start: usize, chunk: usize, vocab_size: i64, device: Device) -> Result<Self> {
        let end = targets.len().min(start + chunk);
        let (first, last) = (targets.offsets[start], targets.offsets[end]);
        let mut support_e = Vec::with_capacity(last - first);
        let mut labels_n = Vec::with_capacity(end - start);
        for p in start..end {
            let row = (p - start) as i64 * vocab_size;
            support_e.extend(targets.ids[targets.offsets[p]..targets.offsets[p + 1]].iter().map(|&id| row + id));
            labels_n.push(row + targets.labels[p]);
        }
        let on_device = |indices: &[i64]| Tensor::f_from_slice(indices)?.f_to(device);
        let tensors = || -> Result<Self, TchError> {
            let (support_e, labels_n) = (on_device(&support_e)?, on_device(&labels_n)?);
            Ok(Self { start, n: (end - start) as i64, first, support_e, labels_n })
        };
        tensors().map_err(torch("cannot copy soft targets to the device"))
    }

    fn positions(&self) -> Range<usize> {
        self.start..self.start + self.n as usize
    }

    /// Those of position `p` among the chunk's.
    fn entries(&self, targets: &Targets, p: usize) -> Range<usize> {
        targets.offsets[p] - self.first..targets.offsets[p + 1] - self.first
    }
}

#[cfg(test)]
mod tests;
