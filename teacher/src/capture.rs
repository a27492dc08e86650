//! Logits in, soft targets out: an exact head and a sampled tail of the raw distribution
//! (temperature 1, before anything a sampler does).
//!
//! Shapes: n positions, v vocabulary, k head, d draws.
//!
//! The tail is drawn with replacement from the distribution without its head, renormalised. With
//! `m` the tail's mass, `m * count / d` is an unbiased estimate of a tail token's probability
//! (importance-sampled soft targets: Anshumann et al., "Sparse Logit Sampling: Accelerating
//! Knowledge Distillation in LLMs", ACL 2025).

use retort_artifact::soft_targets::Position;
use retort_core::{
    Code, Error, Result,
    random::{Counter, Purpose},
};
use tch::{Kind, Tensor};

use crate::{
    cdf::Cdf,
    torch::{host_f32, host_i64, torch},
};

/// A tail with less mass than this is below what f32 resolves beside a head near one: none is stored.
const LEAST_TAIL: f64 = 1e-6;

/// How much of each distribution is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capture {
    /// Most likely tokens, kept exactly.
    pub head: u32,
    /// Draws from the rest, at most 255.
    pub draws: u32,
    /// The job's seed.
    pub seed: u64,
}

/// The token a distribution predicts, and the name of its random stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Line of the prompt set.
    pub row: u64,
    /// Index of the token in its sequence.
    pub position: u64,
    pub token: u32,
}

impl Capture {
    /// The soft target of each row of `logits_nv` (any float dtype, any device), which predicts the
    /// target of the same index.
    ///
    /// Tokens of probability zero (logit minus infinity) are never part of a soft target. A NaN or
    /// plus infinity among the logits, or a row of nothing but minus infinity, is
    /// [`Code::ShardUnfaithful`].
    pub fn positions(&self, logits_nv: &Tensor, targets: &[Target]) -> Result<Vec<Position>> {
        let (n, vocab) = logits_nv.size2().map_err(torch)?;
        if n as usize != targets.len() || vocab < 1 {
            return Err(Error::internal(format!("{n} rows of {vocab} logits for {} targets", targets.len())));
        }
        if targets.is_empty() {
            return Ok(Vec::new());
        }
        if let Some(target) = targets.iter().find(|target| i64::from(target.token) >= vocab) {
            return Err(Error::new(
                Code::VocabularyMismatch,
                format!("row {} holds token {}, beyond the model's vocabulary of {vocab}", target.row, target.token),
            ));
        }
        let device = logits_nv.device();
        let logits_nv = logits_nv.f_to_kind(Kind::Float).map_err(torch)?;
        let log_sum_n1 = logits_nv.f_logsumexp([1i64].as_slice(), true).map_err(torch)?;
        let log_sum_n = host_f32(&log_sum_n1)?;
        if let Some(index) = log_sum_n.iter().position(|sum| !sum.is_finite()) {
            let Target { row, position, .. } = targets[index];
            return Err(Error::new(
                Code::ShardUnfaithful,
                format!("the teacher's logits at row {row}, position {position} are not finite; try --dtype f32"),
            ));
        }

        let head = i64::from(self.head.max(1)).min(vocab);
        let (top_nk, ids_nk) = logits_nv.f_topk(head, 1, true, true).map_err(torch)?;
        let tokens: Vec<i64> = targets.iter().map(|target| i64::from(target.token)).collect();
        let tokens_n1 =
            Tensor::from_slice(&tokens).f_to_device(device).and_then(|t| t.f_view([n, 1])).map_err(torch)?;
        let labels_n = host_f32(&logits_nv.f_gather(1, &tokens_n1, false).map_err(torch)?)?;
        let tails = self.tails(&logits_nv, &log_sum_n1, &ids_nk, targets)?;

        let (top_nk, ids_nk) = (host_f32(&top_nk)?, host_i64(&ids_nk)?);
        let head = head as usize;
        let rows = top_nk.chunks_exact(head).zip(ids_nk.chunks_exact(head)).zip(tails).enumerate();
        Ok(rows
            .map(|(index, ((logits, ids), tail))| Position {
                head: ids
                    .iter()
                    .zip(logits)
                    .filter(|(_, logit)| **logit > f32::NEG_INFINITY)
                    .map(|(&id, &logit)| (id as u32, logit - log_sum_n[index]))
                    .collect(),
                tail,
                label_logprob: labels_n[index] - log_sum_n[index],
            })
            .collect())
    }

    fn tails(
        &self,
        logits_nv: &Tensor,
        log_sum_n1: &Tensor,
        ids_nk: &Tensor,
        targets: &[Target],
    ) -> Result<Vec<Vec<(u32, u8, f32)>>> {
        let draws = self.draws.min(u32::from(u8::MAX)) as usize;
        let (_, vocab) = logits_nv.size2().map_err(torch)?;
        let (_, head) = ids_nk.size2().map_err(torch)?;
        if draws == 0 || head == vocab {
            return Ok(vec![Vec::new(); targets.len()]);
        }
        let mut rest_nv = logits_nv.f_sub(log_sum_n1).and_then(|mut t| t.f_exp_()).map_err(torch)?;
        let rest_nv = rest_nv.f_scatter_value_(1, ids_nk, 0.0).map_err(torch)?;
        let cdf = Cdf::new(rest_nv)?;
        let mut uniforms_nd = Vec::with_capacity(targets.len() * draws);
        for target in targets {
            let mut random = Counter::new(self.seed, Purpose::Tail, target.row, target.position);
            uniforms_nd.extend((0..draws).map(|_| random.next_f64()));
        }
        let drawn_nd = cdf.invert(&uniforms_nd, draws)?;
        let rows = drawn_nd.chunks_exact(draws).enumerate();
        Ok(rows.map(|(row, drawn)| if cdf.total(row) < LEAST_TAIL { Vec::new() } else { tally(drawn) }).collect())
    }
}

/// Draws to `(id, count, log-probability)`, by id.
fn tally(drawn: &[(u32, f32)]) -> Vec<(u32, u8, f32)> {
    let mut drawn = drawn.to_vec();
    drawn.sort_unstable_by_key(|(id, _)| *id);
    let groups = drawn.chunk_by(|a, b| a.0 == b.0);
    groups.map(|group| (group[0].0, group.len() as u8, group[0].1.ln())).collect()
}

#[cfg(test)]
mod tests;
