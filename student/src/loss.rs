//! The head and its loss, a chunk of positions at a time.
//!
//! Forward KL to a sparse target `t` and cross-entropy on the label `y`, mixed with weight `c`:
//! `(1 - c) * sum_v t_v (log p_v - log q_v) - c * log q_y`, where `q = softmax(z)`. Its gradient has a
//! closed form, `w * q - u` with `u = (1 - c) t + c [v = y]` and `w = sum_v u_v`, so no graph
//! is kept: inside a chunk the logits are computed, turned into their gradient, multiplied back into
//! the gradients of the hidden states and of the head, and overwritten by the next chunk. Nothing of
//! size positions x vocabulary ever lives.
//!
//! A target may keep the mass `r` of all tokens outside its support as one bucket, of which the
//! student has `R = 1 - sum_support q`. That adds `r (log r - log R)` to the KL and, because the
//! bucket's mass follows the student's own distribution inside it, `-(r / R) q` to the gradient of
//! every token outside the support.
//!
//! Shape letters: `n` target positions (of a chunk, inside the loop), `e` support entries, `h`
//! hidden size, `v` vocabulary.

use retort_core::Result;
use tch::{Device, Kind, TchError, Tensor, no_grad};

use crate::{batch::Targets, failure::torch};

/// Bytes that one of the two working arrays of a chunk may take.
const CHUNK_BYTES: usize = 64 << 20;
/// Bounds of a chunk, positions: fewer starve the matrix product, more win nothing.
const CHUNK_POSITIONS: (usize, usize) = (16, 2048);

/// Sums over positions, in nats.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sums {
    /// Forward KL on the sparse targets.
    pub kl: f64,
    /// Cross-entropy on the labels; 0 unless it is part of the loss.
    pub ce: f64,
    pub positions: usize,
}

impl Sums {
    pub fn add(&mut self, other: Sums) {
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
    /// Log-probability of the label.
    pub label_logprobs: Vec<f32>,
}

/// Computes the loss, keeping its working memory from call to call.
#[derive(Debug)]
pub struct ChunkedLoss {
    ce_weight: f64,
    vocab_size: i64,
    /// Positions at a time.
    chunk: usize,
    /// In the head's kind.
    logits_nv: Tensor,
    logprobs_nv: Tensor,
}

impl ChunkedLoss {
    /// For a head of `vocab_size` rows in `kind`. `ce_weight` in 0..=1.
    pub fn new(ce_weight: f64, vocab_size: i64, kind: Kind, device: Device) -> Result<Self> {
        let row = vocab_size.max(1).unsigned_abs() as usize * size_of::<f32>();
        let chunk = (CHUNK_BYTES / row).clamp(CHUNK_POSITIONS.0, CHUNK_POSITIONS.1);
        Self::with_chunk(ce_weight, vocab_size, kind, device, chunk)
    }

    /// As [`ChunkedLoss::new`], with `chunk` positions at a time.
    pub fn with_chunk(ce_weight: f64, vocab_size: i64, kind: Kind, device: Device, chunk: usize) -> Result<Self> {
        let chunk = chunk.max(1);
        let shape = [chunk as i64, vocab_size];
        let failed = torch("cannot allocate the loss's working memory");
        Ok(Self {
            ce_weight,
            vocab_size,
            chunk,
            logits_nv: Tensor::f_empty(shape, (kind, device)).map_err(&failed)?,
            logprobs_nv: Tensor::f_empty(shape, (Kind::Float, device)).map_err(&failed)?,
        })
    }

    /// Sums over all positions, and the gradient `[n, h]` of `scale * loss` with respect to
    /// `hidden_nh`; the head's own is added to `weight_grad_vh` (f32, contiguous) where it is given.
    ///
    /// `hidden_nh` and `weight_vh` have one kind. No graph is recorded.
    pub fn backward(
        &mut self,
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
            for start in (0..targets.len()).step_by(self.chunk) {
                let chunk = self.chunk_at(targets, start, hidden_nh.device())?;
                let part_nh = hidden_nh.narrow(0, start as i64, chunk.n);
                let into_nh = grad_nh.narrow(0, start as i64, chunk.n);
                let logprobs_nv = self.logprobs(&part_nh, &weight_vh).map_err(&failed)?;
                let (student_e, labels_n) = chunk.gather(&logprobs_nv).map_err(&failed)?;
                sums.kl += chunk.kl_n(targets, &student_e).iter().sum::<f64>();
                sums.positions += labels_n.len();
                let bucket = chunk.bucket(targets, &student_e, self.ce_weight, hidden_nh.device())?;
                if self.ce_weight > 0.0 {
                    sums.ce -= labels_n.iter().map(|&logprob| f64::from(logprob)).sum::<f64>();
                }
                self.chunk_gradient(
                    &chunk,
                    bucket,
                    logprobs_nv,
                    &part_nh,
                    &weight_vh,
                    into_nh,
                    weight_grad_vh.as_deref_mut(),
                    scale,
                )
                .map_err(&failed)?;
            }
            Ok((sums, grad_nh))
        })
    }

    /// What the head says at every position; no gradient.
    pub fn measure(&mut self, hidden_nh: &Tensor, weight_vh: &Tensor, targets: &Targets) -> Result<Measured> {
        let failed = torch("cannot measure the head");
        no_grad(|| {
            let mut measured = Measured::default();
            for start in (0..targets.len()).step_by(self.chunk) {
                let chunk = self.chunk_at(targets, start, hidden_nh.device())?;
                let part_nh = hidden_nh.narrow(0, start as i64, chunk.n);
                let logprobs_nv = self.logprobs(&part_nh, weight_vh).map_err(&failed)?;
                let (student_e, labels_n) = chunk.gather(&logprobs_nv).map_err(&failed)?;
                measured.kl.extend(chunk.kl_n(targets, &student_e));
                measured.label_logprobs.extend(labels_n);
                let top_n = logprobs_nv.f_argmax(-1, false).and_then(Vec::<i64>::try_from).map_err(&failed)?;
                measured.top_ids.extend(top_n);
            }
            Ok(measured)
        })
    }

    fn chunk_at(&self, targets: &Targets, start: usize, device: Device) -> Result<Chunk> {
        Chunk::new(targets, start, self.chunk, self.ce_weight, self.vocab_size, device)
    }

    /// `log softmax` of the head's output, f32 `[n, v]`, in this struct's own memory.
    fn logprobs(&mut self, part_nh: &Tensor, weight_vh: &Tensor) -> Result<Tensor, TchError> {
        let n = part_nh.size().first().copied().unwrap_or(0);
        let logits_nv = self.logits_nv.f_narrow(0, 0, n)?;
        let logprobs_nv = self.logprobs_nv.f_narrow(0, 0, n)?;
        let _ = part_nh.f_matmul_out(&logits_nv, &weight_vh.f_tr()?)?;
        let _ = logits_nv.f_to_kind(Kind::Float)?.f_internal_log_softmax_out(&logprobs_nv, -1, false)?;
        Ok(logprobs_nv)
    }

    /// Turns `logprobs_nv` into `softmax(z) - u / w` where it lies and multiplies that back; the factor
    /// `w * scale` goes into the narrow side of both products.
    #[allow(clippy::too_many_arguments)]
    fn chunk_gradient(
        &self,
        chunk: &Chunk,
        bucket: Option<Bucket>,
        mut logprobs_nv: Tensor,
        part_nh: &Tensor,
        weight_vh: &Tensor,
        mut into_nh: Tensor,
        weight_grad_vh: Option<&mut Tensor>,
        scale: f64,
    ) -> Result<(), TchError> {
        let mut grad_nv = logprobs_nv.f_exp_()?;
        let mut flat = grad_nv.f_view([-1])?;
        if let Some(Bucket { keep_n1, give_back_e }) = bucket {
            let _ = grad_nv.f_mul_(&keep_n1)?;
            let _ = flat.f_index_add_(0, &chunk.support_e, &give_back_e)?;
        }
        let _ = flat.f_index_add_(0, &chunk.support_e, &chunk.minus_support_e)?;
        if self.ce_weight > 0.0 {
            let _ = flat.f_index_add_(0, &chunk.labels_n, &chunk.minus_labels_n)?;
        }
        let kind = part_nh.kind();
        let grad_nv = grad_nv.f_to_kind(kind)?;
        let factor_n1 = chunk.weight_n1.f_mul_scalar(scale)?;
        let back_nh = grad_nv.f_matmul(weight_vh)?.f_to_kind(Kind::Float)?.f_mul(&factor_n1)?;
        into_nh.f_copy_(&back_nh)?;
        let Some(weight_grad_vh) = weight_grad_vh else { return Ok(()) };
        let scaled_nh = part_nh.f_to_kind(Kind::Float)?.f_mul(&factor_n1)?.f_to_kind(kind)?;
        let grad_vn = grad_nv.f_tr()?;
        let _ = if kind == Kind::Float {
            weight_grad_vh.f_addmm_(&grad_vn, &scaled_nh)?
        } else {
            weight_grad_vh.f_add_(&grad_vn.f_matmul(&scaled_nh)?)?
        };
        Ok(())
    }
}

/// A chunk's buckets: what is left of `q` at each position, f32, and what each support entry gets back,
/// so that only tokens outside the support lose.
struct Bucket {
    keep_n1: Tensor,
    give_back_e: Tensor,
}

/// Least mass that a student is taken to have in a bucket; what it has beside a sure head is rounding.
const LEAST_BUCKET: f64 = 1e-6;

/// One chunk of positions, its indices on the device. `index` numbers the flattened `[n, v]`.
struct Chunk {
    start: usize,
    n: i64,
    /// Index among all targets' support of the chunk's first entry.
    first: usize,
    support_e: Tensor,
    /// `-(1 - c) t / w` of each support entry, f32.
    minus_support_e: Tensor,
    labels_n: Tensor,
    /// `-c / w` of each position, f32.
    minus_labels_n: Tensor,
    /// `w`, f32.
    weight_n1: Tensor,
}

impl Chunk {
    fn new(
        targets: &Targets,
        start: usize,
        chunk: usize,
        ce_weight: f64,
        vocab_size: i64,
        device: Device,
    ) -> Result<Self> {
        let end = targets.len().min(start + chunk);
        let (first, last) = (targets.offsets[start], targets.offsets[end]);
        let mut support_e = Vec::with_capacity(last - first);
        let mut minus_support_e = Vec::with_capacity(last - first);
        let mut labels_n = Vec::with_capacity(end - start);
        let mut minus_labels_n = Vec::with_capacity(end - start);
        let mut weight_n = Vec::with_capacity(end - start);
        for p in start..end {
            let range = targets.offsets[p]..targets.offsets[p + 1];
            let weight = weight(targets, p, ce_weight);
            // A position without mass has weight 0, and all it adds is multiplied by that.
            let inverse = if weight > 0.0 { 1.0 / weight } else { 0.0 };
            let row = (p - start) as i64 * vocab_size;
            support_e.extend(targets.ids[range.clone()].iter().map(|&id| row + id));
            let share = (1.0 - ce_weight) * inverse;
            minus_support_e.extend(targets.masses[range].iter().map(|&mass| -(f64::from(mass) * share) as f32));
            labels_n.push(row + targets.labels[p]);
            minus_labels_n.push(-(ce_weight * inverse) as f32);
            weight_n.push(weight as f32);
        }
        let tensors = || -> Result<Self, tch::TchError> {
            Ok(Self {
                start,
                n: (end - start) as i64,
                first,
                support_e: Tensor::f_from_slice(&support_e)?.f_to(device)?,
                minus_support_e: Tensor::f_from_slice(&minus_support_e)?.f_to(device)?,
                labels_n: Tensor::f_from_slice(&labels_n)?.f_to(device)?,
                minus_labels_n: Tensor::f_from_slice(&minus_labels_n)?.f_to(device)?,
                weight_n1: Tensor::f_from_slice(&weight_n)?.f_to(device)?.f_unsqueeze(1)?,
            })
        };
        tensors().map_err(torch("cannot copy soft targets to the device"))
    }

    /// Student's log-probability of each support entry and of each label.
    fn gather(&self, logprobs_nv: &Tensor) -> Result<(Vec<f32>, Vec<f32>), TchError> {
        let flat = logprobs_nv.f_view([-1])?;
        let support_e = Vec::try_from(flat.f_index_select(0, &self.support_e)?)?;
        let labels_n = Vec::try_from(flat.f_index_select(0, &self.labels_n)?)?;
        Ok((support_e, labels_n))
    }

    /// `sum_v t_v (log p_v - log q_v)` of each position, from the student's side of the support.
    fn kl_n(&self, targets: &Targets, student_e: &[f32]) -> Vec<f64> {
        let term = |e: usize| {
            let student = f64::from(student_e[e - self.first]);
            f64::from(targets.masses[e]) * (f64::from(targets.logprobs[e]) - student)
        };
        let of = |p: usize| {
            let kept: f64 = (targets.offsets[p]..targets.offsets[p + 1]).map(term).sum();
            match f64::from(targets.residuals[p]) {
                residual if residual > 0.0 => {
                    kept + residual * (residual / self.student_bucket(targets, student_e, p)).ln()
                }
                _ => kept,
            }
        };
        self.positions().map(of).collect()
    }

    fn positions(&self) -> std::ops::Range<usize> {
        self.start..self.start + self.n as usize
    }

    /// The student's mass outside the support of position `p`.
    fn student_bucket(&self, targets: &Targets, student_e: &[f32], p: usize) -> f64 {
        let support = targets.offsets[p] - self.first..targets.offsets[p + 1] - self.first;
        let kept: f64 = student_e[support].iter().map(|&logprob| f64::from(logprob).exp()).sum();
        (1.0 - kept).max(LEAST_BUCKET)
    }

    /// `None` where no position has a bucket.
    fn bucket(&self, targets: &Targets, student_e: &[f32], ce_weight: f64, device: Device) -> Result<Option<Bucket>> {
        if targets.residuals[self.positions()].iter().all(|&residual| residual == 0.0) {
            return Ok(None);
        }
        let mut keep_n = Vec::with_capacity(self.n as usize);
        let mut give_back_e = Vec::with_capacity(student_e.len());
        for p in self.positions() {
            let support = targets.offsets[p]..targets.offsets[p + 1];
            let residual = f64::from(targets.residuals[p]);
            let weight = weight(targets, p, ce_weight);
            let lost = if residual > 0.0 && weight > 0.0 {
                (1.0 - ce_weight) / weight * residual / self.student_bucket(targets, student_e, p)
            } else {
                0.0
            };
            keep_n.push((1.0 - lost) as f32);
            give_back_e.extend(support.map(|e| (lost * f64::from(student_e[e - self.first]).exp()) as f32));
        }
        let tensors = || -> Result<Bucket, TchError> {
            Ok(Bucket {
                keep_n1: Tensor::f_from_slice(&keep_n)?.f_to(device)?.f_unsqueeze(1)?,
                give_back_e: Tensor::f_from_slice(&give_back_e)?.f_to(device)?,
            })
        };
        tensors().map(Some).map_err(torch("cannot copy soft targets to the device"))
    }
}

/// `w` of a position: what its target's masses, its bucket and its label weigh together.
fn weight(targets: &Targets, p: usize, ce_weight: f64) -> f64 {
    let masses = &targets.masses[targets.offsets[p]..targets.offsets[p + 1]];
    let mass: f64 = masses.iter().chain([&targets.residuals[p]]).map(|&mass| f64::from(mass)).sum();
    (1.0 - ce_weight) * mass + ce_weight
}

#[cfg(test)]
mod tests;
