use std::{
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use clap::Args;
use retort_artifact::soft_targets::DecodedSequence;
use retort_core::{Code, Error, Result};
use serde_json::{Value, json};

use super::files;
use crate::{command::Context, outcome::Outcome, text::count};

/// Writes soft targets as JSON lines
///
/// One line a sequence: row_id, row, tags, token_ids, target_mask, finish_reason, and "targets", one
/// object a target token with its support: "ids", "mass" (what a loss uses; sums to 1), "logprobs",
/// "top" (the most likely id) and "label_logprob". Large: about ten times the shard.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  retort shard export 1.parquet --out 1.jsonl
  retort shard export ~/.retort/store/jobs/JOB/shards --out all.jsonl
  retort shard export 1.parquet --out /dev/stdout | head -1 | jq .targets[0]")]
pub struct Export {
    /// Shards, or folders to search for *.parquet
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
    /// Where the lines go; a file that is there is kept
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

impl Export {
    pub async fn run(self, context: &Context) -> Result<Outcome> {
        let files = files::find(&self.paths)?;
        let mut out = BufWriter::new(create(&self.out)?);
        let io = |error: std::io::Error| Error::io(&self.out, error);
        let mut sequences = 0u64;
        for file in &files {
            for sequence in files::decode(file)?.sequences {
                match writeln!(out, "{}", line(&sequence)) {
                    Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return Ok(Outcome::Done),
                    written => written.map_err(io)?,
                }
                sequences += 1;
            }
        }
        out.flush().map_err(io)?;
        context.output.json(&json!({ "path": self.out, "sequences": sequences, "files": files.len() }));
        context.output.remark(&format!("{} sequences are in {}", count(sequences), self.out.display()));
        Ok(Outcome::Done)
    }
}

/// A new file; or a pipe or terminal that is there.
fn create(path: &Path) -> Result<File> {
    if path.metadata().is_ok_and(|metadata| metadata.is_file()) {
        return Err(Error::new(
            Code::ObjectExists,
            format!("{}: it is there already; remove it or name another with --out", path.display()),
        ));
    }
    File::options().write(true).create(true).truncate(true).open(path).map_err(|error| Error::io(path, error))
}

fn line(sequence: &DecodedSequence) -> Value {
    let targets = &sequence.targets;
    let position = |p: usize| {
        let range = targets.range(p);
        json!({
            "ids": targets.ids[range.clone()],
            "mass": targets.masses[range.clone()],
            "logprobs": targets.logprobs[range],
            "top": targets.top_ids[p],
            "label_logprob": targets.label_logprobs[p],
        })
    };
    json!({
        "row_id": sequence.row_id,
        "row": sequence.row,
        "tags": sequence.tags,
        "token_ids": sequence.token_ids,
        "target_mask": sequence.target_mask,
        "finish_reason": sequence.finish_reason,
        "targets": (0..targets.len()).map(position).collect::<Vec<_>>(),
    })
}
