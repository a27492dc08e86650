//! Logits in, soft targets out: what a codec keeps of the raw distribution (temperature 1, before
//! anything a sampler does).
//!
//! Shapes: n positions, v vocabulary, k head.
//!
//! A tail is sampled from what the head leaves, in proportion to *p*, so `m * count / draws`, with `m`
//! the tail's mass, is an unbiased estimate of a tail token's probability (importance-sampled soft
//! targets: Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs", ACL
//! 2025). Beside a head the samples are systematic: one random offset and equal steps through the
//! cumulative distribution, which leaves the expectation as it is and takes most of the variance away
//! (Madow, "On the theory of systematic sampling", 1949). With a threshold for a head and steps of
//! little more than it, a token is kept with about min(1, p / threshold), which has the least variance
//! that so many entries allow.

use retort_artifact::soft_targets::Position;
use retort_core::{
    Code, Error, Result,
    random::{Counter, Purpose},
    spec::Codec,
};
use tch::{Kind, Tensor};

mod host;

use crate::{
    cdf::Cdf,
    torch::{host_f32, host_i64, torch},
};

/// A tail with less mass than this is below what f32 resolves beside a head near one: none is stored.
const LEAST_TAIL: f64 = 1e-6;

/// How much of each distribution is kept.
#[derive(Clone, Debug, PartialEq)]
pub struct Capture {
    pub codec: Codec,
    /// Besides 1: those for which the log-sum-exp over the whole vocabulary is kept.
    pub temperatures: Vec<f64>,
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

impl Target {
    fn beyond(&self, vocab: i64) -> Error {
        Error::new(
            Code::VocabularyMismatch,
            format!("row {} holds token {}, beyond the model's vocabulary of {vocab}", self.row, self.token),
        )
    }

    fn not_finite(&self) -> Error {
        let Self { row, position, .. } = self;
        Error::new(
            Code::ShardUnfaithful,
            format!("the teacher's logits at row {row}, position {position} are not finite; try --dtype f32"),
        )
    }
}

/// `(id, log-probability)` of each position's head.
type Heads = Vec<Vec<(u32, f32)>>;

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
            return Err(target.beyond(vocab));
        }
        let device = logits_nv.device();
        let logits_nv = logits_nv.f_to_kind(Kind::Float).map_err(torch)?;
        let log_sum_n1 = logits_nv.f_logsumexp([1i64].as_slice(), true).map_err(torch)?;
        let log_sum_n = host_f32(&log_sum_n1)?;
        if let Some(index) = log_sum_n.iter().position(|sum| !sum.is_finite()) {
            return Err(targets[index].not_finite());
        }

        let tokens: Vec<i64> = targets.iter().map(|target| i64::from(target.token)).collect();
        let tokens_n1 =
            Tensor::from_slice(&tokens).f_to_device(device).and_then(|t| t.f_view([n, 1])).map_err(torch)?;
        let logprobs_nv = logits_nv.f_sub(&log_sum_n1).map_err(torch)?;
        let labels_n = host_f32(&logprobs_nv.f_gather(1, &tokens_n1, false).map_err(torch)?)?;
        let log_sum_exps = self.log_sum_exps(&logprobs_nv)?;
        let (heads, rest_nv) = self.heads(logprobs_nv)?;
        let tails = self.tails(rest_nv, targets)?;
        let rows = heads.into_iter().zip(tails).zip(labels_n).enumerate();
        let position = |(index, ((head, tail), label_logprob)): (usize, _)| Position {
            head,
            tail,
            label_logprob,
            log_sum_exps: log_sum_exps.iter().map(|of| of[index]).collect(),
        };
        Ok(rows.map(position).collect())
    }

    /// For each temperature, of every position.
    fn log_sum_exps(&self, logprobs_nv: &Tensor) -> Result<Vec<Vec<f32>>> {
        let of = |&temperature: &f64| {
            let tempered_nv = logprobs_nv.f_div_scalar(temperature).map_err(torch)?;
            host_f32(&tempered_nv.f_logsumexp([1i64].as_slice(), false).map_err(torch)?)
        };
        self.temperatures.iter().map(of).collect()
    }

    /// The heads, likeliest first, and the probabilities of what they leave `[n, v]`, if there is
    /// anything to draw.
    fn heads(&self, logprobs_nv: Tensor) -> Result<(Heads, Option<Tensor>)> {
        let (n, vocab) = logprobs_nv.size2().map_err(torch)?;
        let most = i64::from(self.codec.max_head(vocab as u32));
        let possible = |(&id, &logprob): (&i64, &f32)| (logprob > f32::NEG_INFINITY).then_some((id as u32, logprob));
        if most == 0 {
            return Ok((vec![Vec::new(); n as usize], Some(logprobs_nv.f_exp().map_err(torch)?)));
        }
        let (top_nk, ids_nk) = logprobs_nv.f_topk(most, 1, true, true).map_err(torch)?;
        let (logprobs, ids) = (host_f32(&top_nk)?, host_i64(&ids_nk)?);
        let rows = logprobs.chunks_exact(most as usize).zip(ids.chunks_exact(most as usize));
        let least = match self.codec {
            Codec::Threshold { threshold } => threshold.ln() as f32,
            _ => f32::NEG_INFINITY,
        };
        let heads = rows.map(|(logprobs, ids)| {
            let kept = logprobs.iter().enumerate().take_while(|&(at, &logprob)| at == 0 || logprob >= least).count();
            ids.iter().zip(logprobs).take(kept).filter_map(possible).collect()
        });
        let heads = heads.collect();
        if self.codec.max_draws() == 0 || most == vocab {
            return Ok((heads, None));
        }
        // The likeliest is in every head, so it goes whatever its probability.
        let outside_nk = top_nk.f_lt(f64::from(least)).map_err(torch)?;
        let _ = outside_nk.narrow(1, 0, 1).f_fill_(0.0).map_err(torch)?;
        let left_nk = top_nk.f_exp().and_then(|top_nk| top_nk.f_mul(&outside_nk)).map_err(torch)?;
        let mut rest_nv = logprobs_nv.f_exp().map_err(torch)?;
        Ok((heads, Some(rest_nv.f_scatter_(1, &ids_nk, &left_nk).map_err(torch)?)))
    }

    fn tails(&self, rest_nv: Option<Tensor>, targets: &[Target]) -> Result<Vec<Vec<(u32, u8, f32)>>> {
        let Some(rest_nv) = rest_nv else { return Ok(vec![Vec::new(); targets.len()]) };
        let cdf = Cdf::new(rest_nv)?;
        let uniforms: Vec<Vec<f64>> = targets
            .iter()
            .enumerate()
            .map(|(row, target)| {
                let mut random = Counter::new(self.seed, Purpose::Tail, target.row, target.position);
                uniforms(self.codec, cdf.total(row), &mut random)
            })
            .collect();
        Ok(cdf.invert(&uniforms)?.into_iter().map(tally).collect())
    }
}

/// Where in the cumulative distribution of a tail of this mass samples are taken, each in [0, 1).
fn uniforms(codec: Codec, mass: f64, random: &mut Counter) -> Vec<f64> {
    let draws = match codec {
        _ if mass < LEAST_TAIL => 0,
        Codec::Full | Codec::TopK { .. } | Codec::TopKTail { .. } => 0,
        Codec::Random { draws } => return (0..draws).map(|_| random.next_f64()).collect(),
        Codec::HeadDraws { draws, .. } => draws,
        // A tail lighter than the threshold has one sample as often as keeps the expectation.
        Codec::Threshold { threshold } if mass < threshold => u32::from(random.next_f64() * threshold < mass),
        // Rounded down, steps are no shorter than the threshold: no token is met twice.
        Codec::Threshold { threshold } => (mass / threshold) as u32,
    };
    let offset = random.next_f64();
    (0..draws).map(|draw| ((f64::from(draw) + offset) / f64::from(draws)).min(1.0 - f64::EPSILON)).collect()
}

/// Draws to `(id, count, log-probability)`, by id.
fn tally(mut drawn: Vec<(u32, f32)>) -> Vec<(u32, u8, f32)> {
    drawn.sort_unstable_by_key(|(id, _)| *id);
    let groups = drawn.chunk_by(|a, b| a.0 == b.0);
    groups.map(|group| (group[0].0, group.len() as u8, group[0].1.ln())).collect()
}

#[cfg(test)]
mod tests;
