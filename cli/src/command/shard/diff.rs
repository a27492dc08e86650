use std::{collections::BTreeMap, path::PathBuf};

use clap::Args;
use retort_artifact::soft_targets::{DecodedSequence, Header, Shard, SparseTargets};
use retort_core::{Error, Result};
use serde::Serialize;
use serde_json::Value;

use super::files;
use crate::{
    command::Context,
    outcome::Outcome,
    text::{count, shorten, table},
};

/// Compares two soft-target files
///
/// What their metadata says differently, rows that only one has, and how far the distributions of the
/// others lie apart. The exit code is 0 either way; with --json, "same" tells.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  retort shard diff shards/00003/1.parquet shards/00003/2.parquet
  retort shard diff a.parquet b.parquet --json | jq .same")]
pub struct Diff {
    a: PathBuf,
    b: PathBuf,
}

#[derive(Debug, Default, Serialize)]
struct Difference {
    /// Same rows with the same tokens and distributions; what the metadata says does not count.
    same: bool,
    /// Key, and its values in a and b.
    metadata: BTreeMap<String, [Value; 2]>,
    /// Row ids.
    only_in_a: Vec<String>,
    only_in_b: Vec<String>,
    other_tokens: Vec<String>,
    /// Over rows with the same tokens.
    positions: u64,
    /// Positions whose most likely token differs.
    other_top: u64,
    /// Mean over positions of half the sum of |mass a - mass b|: 0 is the same, 1 disjoint.
    mean_total_variation: f64,
    /// Largest of a single position.
    max_total_variation: f64,
    /// Largest |log-probability a - b| of a token that both keep, nats.
    max_logprob_difference: f64,
}

impl Diff {
    pub async fn run(self, context: &Context) -> Result<Outcome> {
        let difference = compare(&files::decode(&self.a)?, &files::decode(&self.b)?)?;
        let value = serde_json::to_value(&difference)
            .map_err(|error| Error::internal(format!("cannot write JSON: {error}")))?;
        context.output.json(&value);
        context.output.text(&render(&difference));
        Ok(Outcome::Done)
    }
}

fn compare(a: &Shard, b: &Shard) -> Result<Difference> {
    let mut found = Difference { metadata: metadata(&a.header, &b.header)?, ..Difference::default() };
    let by_id = |shard: &Shard| -> BTreeMap<String, usize> {
        shard.sequences.iter().enumerate().map(|(at, sequence)| (sequence.row_id.clone(), at)).collect()
    };
    let (rows_a, rows_b) = (by_id(a), by_id(b));
    found.only_in_b = rows_b.keys().filter(|id| !rows_a.contains_key(*id)).cloned().collect();
    for (id, &at) in &rows_a {
        match rows_b.get(id) {
            None => found.only_in_a.push(id.clone()),
            Some(&other) => found.row(&a.sequences[at], &b.sequences[other]),
        }
    }
    found.mean_total_variation /= found.positions.max(1) as f64;
    found.same = found.only_in_a.is_empty()
        && found.only_in_b.is_empty()
        && found.other_tokens.is_empty()
        && found.max_total_variation == 0.0
        && found.max_logprob_difference == 0.0;
    Ok(found)
}

impl Difference {
    fn row(&mut self, a: &DecodedSequence, b: &DecodedSequence) {
        if a.token_ids != b.token_ids || a.target_mask != b.target_mask {
            self.other_tokens.push(a.row_id.clone());
            return;
        }
        for p in 0..a.targets.len().min(b.targets.len()) {
            let (variation, logprob) = apart(&a.targets, &b.targets, p);
            self.positions += 1;
            self.other_top += u64::from(a.targets.top_ids[p] != b.targets.top_ids[p]);
            self.mean_total_variation += variation;
            self.max_total_variation = self.max_total_variation.max(variation);
            self.max_logprob_difference = self.max_logprob_difference.max(logprob);
        }
    }
}

/// Total variation of two positions' masses, and the largest difference of a log-probability that
/// both have. Supports are sorted, so one walk over both suffices.
fn apart(a: &SparseTargets, b: &SparseTargets, p: usize) -> (f64, f64) {
    let (mut i, mut j) = (a.range(p), b.range(p));
    let (mut sum, mut largest) = (0.0f64, 0.0f64);
    loop {
        let ids = (a.ids[i.clone()].first(), b.ids[j.clone()].first());
        match ids {
            (None, None) => return (sum / 2.0, largest),
            (Some(x), Some(y)) if x == y => {
                sum += f64::from(a.masses[i.start] - b.masses[j.start]).abs();
                largest = largest.max(f64::from(a.logprobs[i.start] - b.logprobs[j.start]).abs());
                i.start += 1;
                j.start += 1;
            }
            (Some(x), y) if y.is_none_or(|y| x < y) => {
                sum += f64::from(a.masses[i.start]);
                i.start += 1;
            }
            _ => {
                sum += f64::from(b.masses[j.start]);
                j.start += 1;
            }
        }
    }
}

fn metadata(a: &Header, b: &Header) -> Result<BTreeMap<String, [Value; 2]>> {
    let pairs = |header: &Header| match serde_json::to_value(header) {
        Ok(Value::Object(pairs)) => Ok(pairs),
        other => Err(Error::internal(format!("a header is no object: {other:?}"))),
    };
    let (a, b) = (pairs(a)?, pairs(b)?);
    let differing = a.into_iter().filter_map(|(key, value)| {
        let other = b.get(&key).cloned().unwrap_or(Value::Null);
        (value != other).then_some((key, [value, other]))
    });
    Ok(differing.collect())
}

fn render(found: &Difference) -> String {
    let mut text = String::new();
    if !found.metadata.is_empty() {
        let shown = |value: &Value| shorten(value.as_str().unwrap_or(&value.to_string()), 40);
        let mut rows = vec![["metadata", "a", "b"].map(str::to_owned).to_vec()];
        rows.extend(found.metadata.iter().map(|(key, [a, b])| vec![key.clone(), shown(a), shown(b)]));
        text.push_str(&format!("{}\n", table(&rows, &[])));
    }
    for (what, rows) in
        [("only in a", &found.only_in_a), ("only in b", &found.only_in_b), ("other tokens", &found.other_tokens)]
    {
        if !rows.is_empty() {
            text.push_str(&format!("{what}: {} rows, {}\n", count(rows.len() as u64), shorten(&rows.join(" "), 70)));
        }
    }
    text.push_str(&format!(
        "{} positions compared: top differs at {}, total variation {:.6} on average and {:.6} at most, log-probabilities up to {:.4} nats apart\n",
        count(found.positions),
        count(found.other_top),
        found.mean_total_variation,
        found.max_total_variation,
        found.max_logprob_difference
    ));
    text.push_str(if found.same { "the soft targets are the same" } else { "the soft targets differ" });
    text
}
