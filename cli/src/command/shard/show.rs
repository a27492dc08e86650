use std::path::PathBuf;

use clap::Args;
use retort_artifact::soft_targets::{Description, Limits, describe};
use retort_core::{
    Error, Result,
    spec::{Codec, SoftTargets},
};

use super::files;
use crate::{
    command::Context,
    outcome::Outcome,
    text::{bytes, count, shorten, table},
};

/// Says what a soft-target file holds and what it costs
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  retort shard show ~/.retort/store/jobs/JOB/shards/00000/1.parquet
  retort shard show 1.parquet --rows 3
  retort shard show 1.parquet --json | jq .header")]
pub struct Show {
    /// A shard, Parquet
    file: PathBuf,
    /// How many of its sequences to list
    #[arg(long, value_name = "N", default_value_t = 10)]
    rows: usize,
}

impl Show {
    pub async fn run(self, context: &Context) -> Result<Outcome> {
        let shard = describe(files::open(&self.file)?, Limits::default(), self.rows)
            .map_err(|error| files::named(&self.file, &error))?;
        let value =
            serde_json::to_value(&shard).map_err(|error| Error::internal(format!("cannot write JSON: {error}")))?;
        context.output.json(&value);
        context.output.text(&render(&shard));
        Ok(Outcome::Done)
    }
}

fn render(shard: &Description) -> String {
    let header = &shard.header;
    let pair = |(name, value): (&str, String)| vec![name.to_owned(), value];
    let mut text = table(
        &[
            (
                "shard",
                format!(
                    "{} of job {}, attempt {}, {}",
                    header.shard,
                    shorten(&header.job, 40),
                    header.epoch,
                    shorten(&header.split, 20)
                ),
            ),
            ("size", format!("{}, {:.1} bytes per token", bytes(shard.bytes), shard.bytes_per_token)),
            (
                "sequences",
                format!(
                    "{}, {} tokens, {} of them targets",
                    count(shard.rows),
                    count(shard.tokens),
                    count(shard.target_tokens)
                ),
            ),
            ("support", format!("{}, {:.1} tokens a position", codec(&header.soft_targets), shard.mean_support)),
            ("tail mass", format!("{:.4} outside the head on average", shard.mean_tail_mass)),
            ("perplexity", format!("{:.3} of the teacher on these targets", shard.teacher_perplexity)),
            (
                "engine",
                format!(
                    "{} {}, {}",
                    shorten(&header.engine, 40),
                    shorten(&header.engine_version, 40),
                    shorten(&header.dtype, 10)
                ),
            ),
            (
                "mode",
                format!("{}, seed {}, {}", shorten(&header.mode, 20), header.seed, shorten(&header.sampling_json, 100)),
            ),
            ("vocabulary", count(u64::from(header.vocab_size))),
            ("teacher", shorten(&header.teacher_sha256, 64)),
            ("tokenizer", shorten(&header.tokenizer_sha256, 64)),
            ("sha256", shard.sha256.clone()),
        ]
        .map(pair),
        &[],
    );
    let mut rows = vec![["column", "encoding", "stored", "plain"].map(str::to_owned).to_vec()];
    rows.extend(shard.columns.iter().map(|column| {
        vec![
            shorten(&column.name, 40),
            shorten(&column.encoding, 40),
            bytes(column.bytes),
            bytes(column.uncompressed_bytes),
        ]
    }));
    text.push_str(&format!("\n{}", table(&rows, &[2, 3])));
    if !shard.sequences.is_empty() {
        let mut rows =
            vec![["line", "row", "tokens", "targets", "perplexity", "finish", "tags"].map(str::to_owned).to_vec()];
        rows.extend(shard.sequences.iter().map(|sequence| {
            vec![
                sequence.row.to_string(),
                shorten(&sequence.row_id, 32),
                count(sequence.token_ids.len() as u64),
                count(sequence.target_tokens),
                format!("{:.2}", sequence.teacher_perplexity),
                shorten(&sequence.finish_reason, 16),
                shorten(&sequence.tags.join(" "), 40),
            ]
        }));
        text.push_str(&format!("\n{}", table(&rows, &[0, 2, 3, 4])));
    }
    text
}

/// A codec with its parameters.
fn codec(soft_targets: &SoftTargets) -> String {
    let parameters = match soft_targets.codec {
        Codec::Full => String::new(),
        Codec::TopK { head } | Codec::TopKTail { head } => format!(", head {head}"),
        Codec::HeadDraws { head, draws } => format!(", head {head}, {draws} draws"),
        Codec::Threshold { threshold } => format!(" {threshold}"),
        Codec::Random { draws } => format!(", {draws} draws"),
    };
    format!("{}{parameters}, {}", soft_targets.codec.name(), soft_targets.quantiser.name())
}
