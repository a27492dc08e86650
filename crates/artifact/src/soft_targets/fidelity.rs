//! What storing a shard cost, measured on what a reader of it gets.

use retort_core::{Code, Error, Result};
use serde::{Deserialize, Serialize};

use super::{
    DecodedSequence, Header, Position, Sequence, SparseTargets, TailLogprobs,
    encode::{head_mass, tail_mass, top},
    quantise::RANGE,
};

/// Means over all positions of a shard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Fidelity {
    /// Mean true probability mass of the exact head.
    pub head_mass: f64,
    /// Mean |read back - true| over the log-probabilities that are stored and in the byte's range, nats.
    pub mean_abs_error: f64,
    /// Mean KL of the target that is read back from the one that was handed over, nats: what rounding
    /// cost. What sampling costs is variance, not error.
    pub kl: f64,
    /// Share of positions whose stored most likely token is the true one; of positions without a head
    /// none is known, and they do not count.
    pub argmax_agreement: f64,
}

/// Sums over positions.
#[derive(Clone, Debug, Default)]
pub(super) struct Totals {
    positions: u64,
    entries: u64,
    head_mass: f64,
    abs_error: f64,
    kl: f64,
    headed: u64,
    argmax: u64,
    tail_mass: f64,
    /// Of tail entries, weighted by their target mass.
    tail_logprob: f64,
}

impl Totals {
    /// Compares what the teacher said with what a reader gets.
    pub(super) fn add(&mut self, header: &Header, raw: &Sequence, read: &DecodedSequence) -> Result<()> {
        if raw.token_ids != read.token_ids || raw.positions.len() != read.targets.len() {
            return Err(unfaithful(&raw.row_id, "tokens or positions differ"));
        }
        for (p, position) in raw.positions.iter().enumerate() {
            self.position(header, position, &read.targets, p)
                .ok_or_else(|| unfaithful(&raw.row_id, &format!("the support of position {p} differs")))?;
        }
        Ok(())
    }

    /// None when the support that is read back is not the raw one.
    fn position(&mut self, header: &Header, raw: &Position, read: &SparseTargets, p: usize) -> Option<()> {
        let range = read.range(p);
        let ids = &read.ids[range.clone()];
        if ids.len() != raw.head.len() + raw.tail.len() {
            return None;
        }
        let mass = head_mass(raw).min(1.0);
        let drawn: u32 = raw.tail.iter().map(|&(_, count, _)| u32::from(count)).sum();
        let a_draw = tail_mass(header.soft_targets.codec, drawn, 1.0 - mass, 1.0)? / f64::from(drawn.max(1));
        // What lies beyond the byte's range has no mass to speak of, and its error no bound.
        let max = top(&raw.head).map_or(0.0, |(_, logprob)| logprob);
        let stored = header.tail_logprobs == TailLogprobs::Stored;
        let head = raw.head.iter().map(|&(id, logprob)| (id, f64::from(logprob).exp(), logprob, true));
        let tail = raw.tail.iter().map(|&(id, count, logprob)| (id, a_draw * f64::from(count), logprob, stored));
        for (id, truth, logprob, known) in head.chain(tail) {
            let at = range.start + ids.binary_search(&id).ok()?;
            let found = f64::from(read.masses[at]);
            self.kl += generalised_kl(truth, found);
            if known && max - logprob <= RANGE {
                self.abs_error += (f64::from(read.logprobs[at]) - f64::from(logprob)).abs();
                self.entries += 1;
            }
        }
        for &(_, count, logprob) in &raw.tail {
            let share = a_draw * f64::from(count);
            self.tail_mass += share;
            self.tail_logprob += share * f64::from(logprob);
        }
        self.positions += 1;
        self.head_mass += mass;
        if let Some((id, _)) = top(&raw.head) {
            self.headed += 1;
            self.argmax += u64::from(id == read.top_ids[p]);
        }
        Some(())
    }

    /// Nats; 0 without a tail.
    pub(super) fn mean_tail_logprob(&self) -> f32 {
        if self.tail_mass > 0.0 { (self.tail_logprob / self.tail_mass).min(0.0) as f32 } else { 0.0 }
    }

    pub(super) fn means(&self) -> Fidelity {
        let positions = self.positions.max(1) as f64;
        Fidelity {
            head_mass: self.head_mass / positions,
            mean_abs_error: self.abs_error / self.entries.max(1) as f64,
            kl: self.kl / positions,
            argmax_agreement: if self.headed == 0 { 1.0 } else { self.argmax as f64 / self.headed as f64 },
        }
    }
}

/// One entry's part of a KL between masses that need not sum to one; never negative.
fn generalised_kl(truth: f64, found: f64) -> f64 {
    if truth > 0.0 { truth * (truth / found.max(f64::MIN_POSITIVE)).ln() - truth + found } else { found }
}

fn unfaithful(row_id: &str, why: &str) -> Error {
    Error::new(Code::ShardUnfaithful, format!("row {row_id:?} reads back otherwise than it was written: {why}"))
}
