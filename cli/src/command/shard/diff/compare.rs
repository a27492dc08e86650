//! How far two shards lie apart.

use std::collections::BTreeMap;

use retort_artifact::soft_targets::{DecodedSequence, Header, Shard, SparseTargets};
use retort_core::{Error, Result};
use serde::Serialize;
use serde_json::Value;

#[derive(Debug, Default, Serialize)]
pub struct Difference {
    /// Same rows with the same tokens, descriptions and distributions; what the metadata says does
    /// not count.
    pub same: bool,
    /// Key, and its values in a and b.
    pub metadata: BTreeMap<String, [Value; 2]>,
    /// Row ids; a row that a shard has twice is compared with its like, in their order.
    pub only_in_a: Vec<String>,
    pub only_in_b: Vec<String>,
    pub other_tokens: Vec<String>,
    /// Rows whose line in the prompt set, tags or finish reason differ.
    pub other_description: Vec<String>,
    /// Over rows with the same tokens, as is all below.
    pub positions: u64,
    /// Positions whose most likely token differs.
    pub other_top: u64,
    /// Mean over positions of half the sum of |mass a - mass b|: 0 is the same, 1 disjoint.
    pub mean_total_variation: f64,
    /// Largest of a single position.
    pub max_total_variation: f64,
    /// |log-probability a - b| in nats, over the tokens that both supports have.
    pub mean_logprob_difference: f64,
    pub max_logprob_difference: f64,
    /// The same of the tokens that follow, one a position.
    pub mean_label_difference: f64,
    pub max_label_difference: f64,
    /// Tokens of the supports, over all positions.
    pub shared_entries: u64,
    pub entries_only_in_a: u64,
    pub entries_only_in_b: u64,
    /// The positions with the largest total variation, the largest first; none that is the same.
    pub worst: Vec<Worst>,
}

#[derive(Debug, Serialize)]
pub struct Worst {
    pub row_id: String,
    /// Among the row's targets, from 0.
    pub position: usize,
    /// The one that follows, id.
    pub token: u32,
    pub total_variation: f64,
    pub max_logprob_difference: f64,
    /// Most likely token in a and b.
    pub top: [u32; 2],
}

/// Compares `a` with `b`, naming up to `worst` positions.
pub fn compare(a: &Shard, b: &Shard, worst: usize) -> Result<Difference> {
    let mut found = Difference { metadata: metadata(&a.header, &b.header)?, ..Difference::default() };
    let (rows_a, rows_b) = (by_id(a), by_id(b));
    found.only_in_b = rows_b.keys().filter(|key| !rows_a.contains_key(*key)).map(|(id, _)| (*id).to_owned()).collect();
    for (key, row) in &rows_a {
        match rows_b.get(key) {
            None => found.only_in_a.push(key.0.to_owned()),
            Some(other) => found.row(row, other, worst),
        }
    }
    found.mean_total_variation /= found.positions.max(1) as f64;
    found.mean_label_difference /= found.positions.max(1) as f64;
    found.mean_logprob_difference /= found.shared_entries.max(1) as f64;
    let rows = [&found.only_in_a, &found.only_in_b, &found.other_tokens, &found.other_description];
    let apart = [found.max_total_variation, found.max_logprob_difference, found.max_label_difference];
    found.same = rows.iter().all(|rows| rows.is_empty())
        && apart.iter().all(|&apart| apart == 0.0)
        && found.other_top + found.entries_only_in_a + found.entries_only_in_b == 0;
    Ok(found)
}

/// Rows by their id and how many of that id came before.
fn by_id(shard: &Shard) -> BTreeMap<(&str, u64), &DecodedSequence> {
    let mut seen: BTreeMap<&str, u64> = BTreeMap::new();
    shard
        .sequences
        .iter()
        .map(|sequence| {
            let times = seen.entry(&sequence.row_id).or_default();
            *times += 1;
            ((sequence.row_id.as_str(), *times), sequence)
        })
        .collect()
}

impl Difference {
    fn row(&mut self, a: &DecodedSequence, b: &DecodedSequence, worst: usize) {
        if (a.row, &a.tags, &a.finish_reason) != (b.row, &b.tags, &b.finish_reason) {
            self.other_description.push(a.row_id.clone());
        }
        if a.token_ids != b.token_ids || a.target_mask != b.target_mask {
            self.other_tokens.push(a.row_id.clone());
            return;
        }
        let labels = a.token_ids.iter().zip(&a.target_mask).filter(|(_, target)| **target).map(|(&id, _)| id);
        for (p, token) in labels.enumerate() {
            let (x, y) = (&a.targets, &b.targets);
            let apart = Apart::at(x, y, p);
            let label = f64::from(x.label_logprobs[p] - y.label_logprobs[p]).abs();
            self.positions += 1;
            self.other_top += u64::from(x.top_ids[p] != y.top_ids[p]);
            self.mean_total_variation += apart.variation;
            self.max_total_variation = self.max_total_variation.max(apart.variation);
            self.mean_logprob_difference += apart.logprobs;
            self.max_logprob_difference = self.max_logprob_difference.max(apart.largest);
            self.mean_label_difference += label;
            self.max_label_difference = self.max_label_difference.max(label);
            self.shared_entries += apart.shared;
            self.entries_only_in_a += apart.only_in_a;
            self.entries_only_in_b += apart.only_in_b;
            self.keep(worst, apart.variation, || Worst {
                row_id: a.row_id.clone(),
                position: p,
                token,
                total_variation: apart.variation,
                max_logprob_difference: apart.largest,
                top: [x.top_ids[p], y.top_ids[p]],
            });
        }
    }

    /// Keeps a position that is among the `most` that lie furthest apart; of equals the first.
    fn keep(&mut self, most: usize, variation: f64, position: impl FnOnce() -> Worst) {
        let at = self.worst.partition_point(|other| other.total_variation >= variation);
        if variation > 0.0 && at < most {
            self.worst.truncate(most - 1);
            self.worst.insert(at, position());
        }
    }
}

/// Of one position.
#[derive(Default)]
struct Apart {
    /// Half the sum of |mass a - mass b|.
    variation: f64,
    /// Sum and maximum of |log-probability a - b| over the tokens that both have.
    logprobs: f64,
    largest: f64,
    shared: u64,
    only_in_a: u64,
    only_in_b: u64,
}

impl Apart {
    /// Supports are sorted, so one walk over both suffices.
    fn at(a: &SparseTargets, b: &SparseTargets, p: usize) -> Self {
        let (mut i, mut j) = (a.range(p), b.range(p));
        let mut apart = Self::default();
        loop {
            let ids = (a.ids[i.clone()].first(), b.ids[j.clone()].first());
            match ids {
                (None, None) => break,
                (Some(x), Some(y)) if x == y => {
                    let logprob = f64::from(a.logprobs[i.start] - b.logprobs[j.start]).abs();
                    apart.variation += f64::from(a.masses[i.start] - b.masses[j.start]).abs() / 2.0;
                    apart.logprobs += logprob;
                    apart.largest = apart.largest.max(logprob);
                    apart.shared += 1;
                    (i.start, j.start) = (i.start + 1, j.start + 1);
                }
                (Some(x), y) if y.is_none_or(|y| x < y) => {
                    apart.variation += f64::from(a.masses[i.start]) / 2.0;
                    apart.only_in_a += 1;
                    i.start += 1;
                }
                _ => {
                    apart.variation += f64::from(b.masses[j.start]) / 2.0;
                    apart.only_in_b += 1;
                    j.start += 1;
                }
            }
        }
        apart
    }
}

fn metadata(a: &Header, b: &Header) -> Result<BTreeMap<String, [Value; 2]>> {
    let pairs = |header: &Header| match serde_json::to_value(header) {
        Ok(Value::Object(pairs)) => Ok(pairs),
        other => Err(Error::internal(format!("a header is no object: {other:?}"))),
    };
    let (a, mut b) = (pairs(a)?, pairs(b)?);
    let mut differing = BTreeMap::new();
    for (key, value) in a {
        let other = b.remove(&key).unwrap_or(Value::Null);
        if value != other {
            differing.insert(key, [value, other]);
        }
    }
    // What only b's version of the format says.
    differing.extend(b.into_iter().map(|(key, other)| (key, [Value::Null, other])));
    Ok(differing)
}
