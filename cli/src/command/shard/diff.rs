mod compare;

use std::path::PathBuf;

use clap::Args;
use retort_core::{Error, Result};
use serde_json::Value;

use self::compare::{Difference, compare};
use super::files;
use crate::{
    command::Context,
    outcome::{Outcome, fail},
    text::{count, shorten, table},
};

/// Compares two soft-target files
///
/// What their metadata says differently, rows that only one has, and how far the distributions of the
/// others lie apart. The metadata is shown and does not count: two attempts at one shard may differ in
/// it. The exit code is 0 where the soft targets are the same, 1 where they differ, 2 where they could
/// not be compared.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  retort shard diff shards/00003/1.parquet shards/00003/2.parquet
  retort shard diff a.parquet b.parquet --worst 20
  retort shard diff a.parquet b.parquet --json | jq .mean_total_variation")]
pub struct Diff {
    a: PathBuf,
    b: PathBuf,
    /// How many of the positions that lie furthest apart to list
    #[arg(long, value_name = "N", default_value_t = 5)]
    worst: usize,
}

impl Diff {
    pub async fn run(self, context: &Context) -> Result<Outcome> {
        match self.compare() {
            Ok((difference, value)) => {
                context.output.json(&value);
                context.output.text(&render(&difference));
                Ok(if difference.same { Outcome::Done } else { Outcome::Different })
            }
            Err(error) => {
                fail(&context.output, &error);
                Ok(Outcome::NotCompared)
            }
        }
    }

    fn compare(&self) -> Result<(Difference, Value)> {
        let difference = compare(&files::decode(&self.a)?, &files::decode(&self.b)?, self.worst)?;
        let value = serde_json::to_value(&difference)
            .map_err(|error| Error::internal(format!("cannot write JSON: {error}")))?;
        Ok((difference, value))
    }
}

fn render(found: &Difference) -> String {
    let mut text = String::new();
    if !found.metadata.is_empty() {
        let shown = |value: &Value| shorten(value.as_str().unwrap_or(&value.to_string()), 40);
        let mut rows = vec![["metadata", "a", "b"].map(str::to_owned).to_vec()];
        rows.extend(found.metadata.iter().map(|(key, [a, b])| vec![key.clone(), shown(a), shown(b)]));
        text.push_str(&format!("{}\n", table(&rows, &[])));
    }
    for (what, rows) in [
        ("only in a", &found.only_in_a),
        ("only in b", &found.only_in_b),
        ("other tokens", &found.other_tokens),
        ("other line, tags or finish reason", &found.other_description),
    ] {
        if !rows.is_empty() {
            text.push_str(&format!("{what}: {} rows, {}\n", count(rows.len() as u64), shorten(&rows.join(" "), 70)));
        }
    }
    let share = if found.positions == 0 { 0.0 } else { 100.0 * found.other_top as f64 / found.positions as f64 };
    text.push_str(&format!(
        "{} positions compared: top differs at {} ({share:.2} %)\n",
        count(found.positions),
        count(found.other_top)
    ));
    let figures = [
        ("", "mean".to_owned(), "max".to_owned()),
        (
            "mass moved (total variation)",
            format!("{:.6}", found.mean_total_variation),
            format!("{:.6}", found.max_total_variation),
        ),
        (
            "|log-probability a - b|, nats",
            format!("{:.6}", found.mean_logprob_difference),
            format!("{:.6}", found.max_logprob_difference),
        ),
        (
            "|label's log-probability a - b|, nats",
            format!("{:.6}", found.mean_label_difference),
            format!("{:.6}", found.max_label_difference),
        ),
    ];
    text.push_str(&table(&figures.map(|(what, mean, max)| vec![what.to_owned(), mean, max]), &[1, 2]));
    text.push_str(&format!(
        "supports: {} entries in both, {} only in a, {} only in b\n",
        count(found.shared_entries),
        count(found.entries_only_in_a),
        count(found.entries_only_in_b)
    ));
    if !found.worst.is_empty() {
        let mut rows = vec![["row", "position", "token", "mass moved", "top a", "top b"].map(str::to_owned).to_vec()];
        rows.extend(found.worst.iter().map(|worst| {
            vec![
                shorten(&worst.row_id, 32),
                worst.position.to_string(),
                worst.token.to_string(),
                format!("{:.6}", worst.total_variation),
                worst.top[0].to_string(),
                worst.top[1].to_string(),
            ]
        }));
        text.push_str(&format!("\n{}", table(&rows, &[1, 2, 3, 4, 5])));
    }
    text.push_str(if found.same { "the soft targets are the same" } else { "the soft targets differ" });
    text
}
