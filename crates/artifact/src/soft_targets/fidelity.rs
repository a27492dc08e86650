//! What storing a shard cost, measured on the bytes that were written.

use retort_core::{Code, Error, Result};
use serde::{Deserialize, Serialize};

use super::{
    Position, Sequence, Shard,
    encode::{head_mass, top},
};

/// Means over all positions of a shard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Fidelity {
    /// Mean true probability mass of the exact head.
    pub head_mass: f64,
    /// Mean |read back - true| log-probability over the support, nats.
    pub mean_abs_error: f64,
    /// Share of positions whose stored most likely token is the true one.
    pub argmax_agreement: f64,
    /// Mean KL of what is read back against what the teacher handed over, nats.
    pub kl: f64,
}

/// Compares what the teacher said with what a reader gets.
pub(super) fn measure(sequences: &[Sequence], shard: &Shard) -> Result<Fidelity> {
    let mut total = Totals::default();
    for (raw, stored) in sequences.iter().zip(&shard.sequences) {
        if raw.token_ids != stored.token_ids || raw.positions.len() != stored.targets.len() {
            return Err(unfaithful(&raw.row_id, "tokens or positions differ"));
        }
        for (p, position) in raw.positions.iter().enumerate() {
            let range = stored.targets.range(p);
            let (ids, logprobs) = (&stored.targets.ids[range.clone()], &stored.targets.logprobs[range.clone()]);
            let masses = &stored.targets.masses[range];
            total
                .add(position, ids, logprobs, masses, stored.targets.top_ids[p])
                .ok_or_else(|| unfaithful(&raw.row_id, &format!("the support of position {p} differs")))?;
        }
    }
    Ok(total.means())
}

#[derive(Default)]
struct Totals {
    positions: u64,
    entries: u64,
    head_mass: f64,
    abs_error: f64,
    argmax: u64,
    kl: f64,
}

impl Totals {
    /// None when the stored support is not the raw one.
    fn add(&mut self, raw: &Position, ids: &[u32], logprobs: &[f32], masses: &[f32], top_id: u32) -> Option<()> {
        if ids.len() != raw.head.len() + raw.tail.len() {
            return None;
        }
        let tail = raw.tail.iter().map(|&(id, _, logprob)| (id, logprob));
        for (id, logprob) in raw.head.iter().copied().chain(tail) {
            let at = ids.binary_search(&id).ok()?;
            self.abs_error += (f64::from(logprobs[at]) - f64::from(logprob)).abs();
        }
        let head = raw.head.iter().map(|&(id, logprob)| (id, f64::from(logprob).exp()));
        let draws: f64 = raw.tail.iter().map(|&(_, count, _)| f64::from(count)).sum();
        let rest = (1.0 - head_mass(raw)).max(0.0);
        let tail = raw.tail.iter().map(|&(id, count, _)| (id, rest * f64::from(count) / draws));
        for (id, mass) in head.chain(tail).filter(|(_, mass)| *mass > 0.0) {
            let stored = f64::from(masses[ids.binary_search(&id).ok()?]);
            self.kl += mass * (mass / stored.max(f64::MIN_POSITIVE)).ln();
        }
        self.entries += ids.len() as u64;
        self.positions += 1;
        self.head_mass += head_mass(raw).min(1.0);
        self.argmax += u64::from(top(&raw.head).is_some_and(|(id, _)| id == top_id));
        Some(())
    }

    fn means(&self) -> Fidelity {
        let positions = self.positions.max(1) as f64;
        Fidelity {
            head_mass: self.head_mass / positions,
            mean_abs_error: self.abs_error / self.entries.max(1) as f64,
            argmax_agreement: if self.positions == 0 { 1.0 } else { self.argmax as f64 / positions },
            kl: self.kl / positions,
        }
    }
}

fn unfaithful(row_id: &str, why: &str) -> Error {
    Error::new(Code::ShardUnfaithful, format!("row {row_id:?} reads back otherwise than it was written: {why}"))
}
