//! As [`Capture::positions`], of one row of logits in the host's memory: the row is read about three
//! times, and nothing as long as it is written.

use retort_artifact::soft_targets::Position;
use retort_core::{
    Error, Result,
    random::{Counter, Purpose},
    spec::Codec,
};
use retort_kernels::{BLOCK, Logits};

use super::{Capture, Target, tally, uniforms};
use crate::cdf::walk;

impl Capture {
    /// The soft target that `logits` are, which predicts `target`.
    ///
    /// Errors are those of [`Capture::positions`].
    pub fn position(&self, logits: &Logits, target: &Target) -> Result<Position> {
        let vocab = logits.len();
        if target.token as usize >= vocab {
            return Err(target.beyond(vocab as i64));
        }
        if !logits.log_sum_exp().is_finite() {
            return Err(target.not_finite());
        }
        let head = self.head(logits)?;
        Ok(Position {
            tail: self.tail(logits, &head, target),
            head,
            label_logprob: logits.logprob(target.token as usize),
            log_sum_exps: self.temperatures.iter().map(|&t| logits.tempered_log_sum_exp(t)).collect(),
        })
    }

    /// The likeliest tokens and their log-probabilities, the likeliest first.
    fn head(&self, logits: &Logits) -> Result<Vec<(u32, f32)>> {
        let vocab = u32::try_from(logits.len()).map_err(|_| Error::internal("a vocabulary beyond 32 bits"))?;
        let least = match self.codec {
            Codec::Threshold { threshold } => threshold.ln() as f32,
            _ => f32::NEG_INFINITY,
        };
        let top = logits.largest(self.codec.max_head(vocab) as usize).into_iter();
        let top = top.map(|(id, logit)| (id, logit - logits.log_sum_exp())).enumerate();
        let kept = top.take_while(|&(at, (_, logprob))| at == 0 || logprob >= least).map(|(_, token)| token);
        Ok(kept.filter(|&(_, logprob)| logprob > f32::NEG_INFINITY).collect())
    }

    fn tail(&self, logits: &Logits, head: &[(u32, f32)], target: &Target) -> Vec<(u32, u8, f32)> {
        if self.codec.max_draws() == 0 || head.len() == logits.len() {
            return Vec::new();
        }
        let mut out: Vec<u32> = head.iter().map(|(id, _)| *id).collect();
        out.sort_unstable();
        let rest = Rest { logits, out };
        let ends = rest.ends();
        let total = ends.last().copied().unwrap_or(0.0);
        let mut random = Counter::new(self.seed, Purpose::Tail, target.row, target.position);
        let uniforms = uniforms(self.codec, total, &mut random);
        // Rounding can bring u * total up to total; the last block with mass takes it.
        let last = ends.partition_point(|&end| end < total);
        let draw = |uniform: f64| {
            let wanted = uniform * total;
            let block = ends.partition_point(|&end| end <= wanted).min(last);
            let before = if block == 0 { 0.0 } else { ends[block - 1] };
            let mut masses = [0.0; BLOCK];
            let count = rest.masses(block, &mut masses);
            let (offset, mass) = walk(&masses[..count], wanted - before);
            ((block * BLOCK + offset) as u32, mass)
        };
        tally(uniforms.into_iter().map(draw).collect())
    }
}

/// What a head leaves of a distribution.
struct Rest<'a> {
    logits: &'a Logits<'a>,
    /// The head's tokens, ascending.
    out: Vec<u32>,
}

impl Rest<'_> {
    /// Running sums of the blocks' masses.
    fn ends(&self) -> Vec<f64> {
        let mut running = 0.0;
        let masses = self.logits.block_masses().enumerate().map(|(block, mass)| {
            // What is left of a block beside a likely token would drown in the rounding of a difference.
            running += if self.head_of(block).is_empty() { mass } else { self.mass(block) };
            running
        });
        masses.collect()
    }

    fn mass(&self, block: usize) -> f64 {
        let mut masses = [0.0; BLOCK];
        let count = self.masses(block, &mut masses);
        masses[..count].iter().map(|&mass| f64::from(mass)).sum()
    }

    fn masses(&self, block: usize, masses: &mut [f32; BLOCK]) -> usize {
        let count = self.logits.probabilities(block, masses);
        for &id in self.head_of(block) {
            masses[id as usize - block * BLOCK] = 0.0;
        }
        count
    }

    /// The head's tokens in a block.
    fn head_of(&self, block: usize) -> &[u32] {
        let first = self.out.partition_point(|&id| (id as usize) < block * BLOCK);
        let end = self.out.partition_point(|&id| (id as usize) < (block + 1) * BLOCK);
        &self.out[first..end]
    }
}
