use std::{collections::BTreeMap, path::PathBuf};

use clap::Args;
use retort_artifact::soft_targets::{Description, Limits, describe};
use retort_core::Result;
use serde::Serialize;

use super::files;
use crate::{
    command::Context,
    outcome::Outcome,
    text::{bytes, count, shorten, table},
};

/// Sums up soft-target files: tokens, bytes, mass, by tag
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  retort shard stats ~/.retort/store/jobs/JOB/shards
  retort shard stats a.parquet b.parquet --json | jq .bytes_per_token")]
pub struct Stats {
    /// Shards, or folders to search for *.parquet
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
}

/// Of all files together. Means are over target tokens.
#[derive(Debug, Default, Serialize)]
struct Summary {
    files: u64,
    bytes: u64,
    rows: u64,
    tokens: u64,
    target_tokens: u64,
    bytes_per_token: f64,
    mean_support: f64,
    mean_tail_mass: f64,
    teacher_perplexity: f64,
    /// Bytes as stored.
    columns: BTreeMap<String, u64>,
    /// How often each reason ended a sequence.
    finish_reasons: BTreeMap<String, u64>,
    tags: BTreeMap<String, Part>,
    splits: BTreeMap<String, Part>,
}

#[derive(Debug, Default, Serialize)]
struct Part {
    rows: u64,
    target_tokens: u64,
}

impl Stats {
    pub async fn run(self, context: &Context) -> Result<Outcome> {
        let mut sums = Summary::default();
        for file in files::find(&self.paths)? {
            let shard = describe(files::open(&file)?, Limits::default(), usize::MAX)
                .map_err(|error| files::named(&file, &error))?;
            sums.add(&shard);
        }
        let summary = sums.means();
        let value = serde_json::to_value(&summary)
            .map_err(|error| retort_core::Error::internal(format!("cannot write JSON: {error}")))?;
        context.output.json(&value);
        context.output.text(&render(&summary));
        Ok(Outcome::Done)
    }
}

impl Summary {
    /// The means hold sums until [`Summary::means`].
    fn add(&mut self, shard: &Description) {
        let targets = shard.target_tokens as f64;
        self.files += 1;
        self.bytes += shard.bytes;
        self.rows += shard.rows;
        self.tokens += shard.tokens;
        self.target_tokens += shard.target_tokens;
        self.mean_support += shard.mean_support * targets;
        self.mean_tail_mass += shard.mean_tail_mass * targets;
        if shard.target_tokens > 0 {
            self.teacher_perplexity += shard.teacher_perplexity.ln() * targets;
        }
        for column in &shard.columns {
            *self.columns.entry(column.name.clone()).or_default() += column.bytes;
        }
        for sequence in &shard.sequences {
            *self.finish_reasons.entry(sequence.finish_reason.clone()).or_default() += 1;
            for tag in &sequence.tags {
                self.tags.entry(tag.clone()).or_default().add(sequence.target_tokens);
            }
            self.splits.entry(shard.header.split.clone()).or_default().add(sequence.target_tokens);
        }
    }

    fn means(mut self) -> Self {
        let per_token = |sum: f64| if self.target_tokens == 0 { 0.0 } else { sum / self.target_tokens as f64 };
        let log_perplexity = per_token(self.teacher_perplexity);
        (self.bytes_per_token, self.mean_support, self.mean_tail_mass) =
            (per_token(self.bytes as f64), per_token(self.mean_support), per_token(self.mean_tail_mass));
        self.teacher_perplexity = if self.target_tokens == 0 { 0.0 } else { log_perplexity.exp() };
        self
    }
}

impl Part {
    fn add(&mut self, target_tokens: u64) {
        self.rows += 1;
        self.target_tokens += target_tokens;
    }
}

fn render(summary: &Summary) -> String {
    let reasons = summary.finish_reasons.iter().map(|(reason, n)| format!("{} {}", count(*n), shorten(reason, 16)));
    let rows = [
        ("files", count(summary.files)),
        ("size", format!("{}, {:.1} bytes per token", bytes(summary.bytes), summary.bytes_per_token)),
        (
            "sequences",
            format!(
                "{}, {} tokens, {} of them targets",
                count(summary.rows),
                count(summary.tokens),
                count(summary.target_tokens)
            ),
        ),
        ("ended by", reasons.collect::<Vec<_>>().join(", ")),
        ("support", format!("{:.1} tokens a position", summary.mean_support)),
        ("tail mass", format!("{:.4} outside the head on average", summary.mean_tail_mass)),
        ("perplexity", format!("{:.3} of the teacher on these targets", summary.teacher_perplexity)),
    ];
    let mut text = table(&rows.map(|(name, value)| vec![name.to_owned(), value]), &[]);
    for (what, parts) in [("split", &summary.splits), ("tag", &summary.tags)] {
        if !parts.is_empty() {
            let mut rows = vec![[what, "rows", "targets"].map(str::to_owned).to_vec()];
            rows.extend(
                parts.iter().map(|(name, part)| vec![shorten(name, 40), count(part.rows), count(part.target_tokens)]),
            );
            text.push_str(&format!("\n{}", table(&rows, &[1, 2])));
        }
    }
    let mut rows = vec![["column", "stored"].map(str::to_owned).to_vec()];
    rows.extend(summary.columns.iter().map(|(name, stored)| vec![name.clone(), bytes(*stored)]));
    text.push_str(&format!("\n{}", table(&rows, &[1])));
    text
}
