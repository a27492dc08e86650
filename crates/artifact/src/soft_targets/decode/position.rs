//! One position's entries: ranks to tokens, bytes to log-probabilities, and the target masses.

use retort_core::spec::Codec;

use super::{COARSE_TOLERANCE, LEAST_MASS};
use crate::soft_targets::{
    Header, TailLogprobs,
    encode::{MASS_TOLERANCE, tail_mass},
    id_table,
    quantise::{MAX_ERROR, below_max},
};

/// How much less than the most likely token another one has at least, relatively; more than f32 rounds.
const BELOW_TOP: f64 = 1.0 - 1e-6;

/// One position's part of a row's lists.
pub(super) struct Position<'a> {
    pub(super) head_deltas: &'a [u32],
    /// Empty where `head_logprobs` are not.
    pub(super) head_qs: &'a [u8],
    pub(super) head_logprobs: &'a [f32],
    pub(super) tail_deltas: &'a [u32],
    /// Empty where every count is 1.
    pub(super) tail_counts: &'a [u8],
    /// Empty unless the tail's log-probabilities are stored.
    pub(super) tail_qs: &'a [u8],
    pub(super) max: f32,
    pub(super) tail_mass: f32,
}

/// An entry of a support.
pub(super) struct Entry {
    pub(super) id: u32,
    /// Of the target.
    pub(super) mass: f64,
    pub(super) logprob: f64,
    /// Whether it is of the head.
    pub(super) head: bool,
}

/// Whether a tail's counts are stored; where they are not, each is 1.
pub(in crate::soft_targets) fn has_counts(codec: Codec) -> bool {
    matches!(codec, Codec::HeadDraws { .. } | Codec::Random { .. })
}

impl Position<'_> {
    /// The support by rising id; the id of the most likely token.
    pub(super) fn entries(&self, header: &Header, table: &[u32], entries: &mut Vec<Entry>) -> Result<u32, String> {
        entries.clear();
        let head_top = self.head(header, table, entries)?;
        let heads = entries.len();
        let drawn_top = self.tail(header, table, entries)?;
        debug_assert!(entries.len() - heads == self.tail_deltas.len());
        entries.sort_unstable_by_key(|entry| entry.id);
        if let Some(twice) = entries.windows(2).find(|pair| pair[0].id == pair[1].id) {
            return Err(format!("token {} is in its support twice", twice[0].id));
        }
        head_top.or(drawn_top).ok_or_else(|| "its support is empty".to_owned())
    }

    fn head(&self, header: &Header, table: &[u32], entries: &mut Vec<Entry>) -> Result<Option<u32>, String> {
        let codec = header.soft_targets.codec;
        let (size, most) = (self.head_deltas.len(), codec.max_head(header.vocab_size) as usize);
        if size > most || (size == 0 && most > 0) {
            return Err(format!("its head has {size} entries, the codec {} has 1 to {most}", codec.name()));
        }
        if size == 0 {
            return Ok(None);
        }
        push_ids(header, table, self.head_deltas, true, entries)?;
        let max = f64::from(self.max);
        let mut top = None;
        let mut rest = 0.0;
        for (at, Entry { id, mass, logprob, .. }) in entries.iter_mut().enumerate() {
            *logprob = match self.head_qs.get(at) {
                Some(&q) => max - below_max(q),
                None => f64::from(self.head_logprobs[at]),
            };
            let is_top = match self.head_qs.get(at) {
                Some(&q) => q == 0,
                None if !logprob.is_finite() || *logprob > MASS_TOLERANCE => {
                    return Err(format!("token {id} has log-probability {logprob}"));
                }
                None => top.is_none_or(|(best_id, best)| *logprob > best || (*logprob == best && *id < best_id)),
            };
            if is_top {
                if !self.head_qs.is_empty() && top.is_some() {
                    return Err("two tokens are marked as its most likely".to_owned());
                }
                top = Some((*id, *logprob));
            }
            *mass = logprob.exp();
            rest += *mass;
        }
        let (top_id, top_logprob) = top.ok_or("none of its tokens is marked as the most likely")?;
        if (top_logprob - max).abs() > max.abs() * COARSE_TOLERANCE + MASS_TOLERANCE {
            return Err(format!("its likeliest token has log-probability {top_logprob}, its largest is {max}"));
        }
        // Rounding is spread over the others first: the largest is the best known.
        let top_mass = top_logprob.exp();
        rest -= top_mass;
        let wanted = 1.0 - f64::from(self.tail_mass);
        let bound = f64::from(MAX_ERROR).exp();
        // No factor lifts another token to the first place.
        let best_rest = entries.iter().filter(|entry| entry.id != top_id).map(|entry| entry.mass).fold(0.0, f64::max);
        let most = bound.min(BELOW_TOP * top_mass / best_rest);
        let scale = if rest > 0.0 { ((wanted - top_mass) / rest).min(most).max(1.0 / bound) } else { 1.0 };
        let whole = top_mass + rest * scale;
        // The largest is kept to a part in 256 of itself, which is a larger part of a small mass.
        let coarse = COARSE_TOLERANCE.max((max.abs() / 256.0).exp_m1().min(0.2));
        if (whole - wanted).abs() > coarse * wanted + LEAST_MASS {
            return Err(format!("its head's masses sum to {whole}, its tail has {}", self.tail_mass));
        }
        let all = if wanted > LEAST_MASS { wanted / whole } else { 1.0 };
        for entry in entries.iter_mut() {
            let factor = if entry.id == top_id { all } else { scale * all };
            entry.mass *= factor;
            entry.logprob += factor.ln();
        }
        Ok(Some(top_id))
    }

    fn tail(&self, header: &Header, table: &[u32], entries: &mut Vec<Entry>) -> Result<Option<u32>, String> {
        let codec = header.soft_targets.codec;
        let (heads, most) = (entries.len(), codec.max_draws() as usize);
        if self.tail_deltas.len() > most {
            return Err(format!(
                "its tail has {} entries, the codec {} has at most {most}",
                self.tail_deltas.len(),
                codec.name()
            ));
        }
        push_ids(header, table, self.tail_deltas, false, entries)?;
        let tail = &mut entries[heads..];
        if self.tail_counts.contains(&0) {
            return Err("a tail entry was drawn 0 times".to_owned());
        }
        let count = |at: usize| u32::from(self.tail_counts.get(at).copied().unwrap_or(1));
        let drawn: u32 = (0..tail.len()).map(count).sum();
        let mass = tail_mass(codec, drawn, f64::from(self.tail_mass), COARSE_TOLERANCE).ok_or_else(|| {
            format!("its tail has {drawn} draws and mass {}, which {} cannot have", self.tail_mass, codec.name())
        })?;
        let mut top: Option<(u32, u32)> = None;
        for (at, entry) in tail.iter_mut().enumerate() {
            entry.mass = mass * f64::from(count(at)) / f64::from(drawn);
            entry.logprob = match (header.tail_logprobs, self.tail_qs.get(at)) {
                (TailLogprobs::Mean(mean), _) => f64::from(mean),
                (TailLogprobs::Stored, q) => f64::from(self.max) - below_max(q.copied().unwrap_or(0)),
            };
            let better = |(id, most): (u32, u32)| count(at) > most || (count(at) == most && entry.id < id);
            if top.is_none_or(better) {
                top = Some((entry.id, count(at)));
            }
        }
        Ok(top.map(|(id, _)| id))
    }
}

/// Undoes differences and ranks.
fn push_ids(
    header: &Header,
    table: &[u32],
    deltas: &[u32],
    head: bool,
    entries: &mut Vec<Entry>,
) -> Result<(), String> {
    let mut rank = 0u64;
    for &delta in deltas {
        rank += u64::from(delta);
        let id = id_table::token(table, rank, header.vocab_size)
            .ok_or_else(|| format!("rank {rank} is outside the vocabulary of {}", header.vocab_size))?;
        entries.push(Entry { id, mass: 0.0, logprob: 0.0, head });
    }
    Ok(())
}
