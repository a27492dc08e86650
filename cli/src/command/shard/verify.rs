use std::path::{Path, PathBuf};

use clap::Args;
use retort_core::{Error, Result};
use retort_process::escaped;
use serde_json::json;

use super::files;
use crate::{command::Context, outcome::Outcome, text::count};

/// Checks soft-target files: hashes, structure, ids, masses
///
/// Everything a student checks before it trains. Every file that is not sound is named with what is
/// wrong; the exit code is then 1. With --json, one line a file.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  retort shard verify 1.parquet
  retort shard verify ~/.retort/store/jobs/JOB/shards
  retort shard verify store --json | jq 'select(.sound | not)'")]
pub struct Verify {
    /// Shards, or folders to search for *.parquet
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
}

impl Verify {
    pub async fn run(self, context: &Context) -> Result<Outcome> {
        for path in &self.paths {
            std::fs::metadata(path).map_err(|error| Error::io(path, error))?;
        }
        let files = files::find(&self.paths)?;
        let (mut targets, mut first, mut wrong) = (0, None, 0u64);
        for file in &files {
            let path = file.display().to_string();
            match verify(file) {
                Ok((rows, target_tokens)) => {
                    targets += target_tokens;
                    context
                        .output
                        .json(&json!({ "path": path, "sound": true, "rows": rows, "target_tokens": target_tokens }));
                }
                Err(error) => {
                    let message = error.chain();
                    context.output.json(
                        &json!({ "path": path, "sound": false, "code": error.code.as_str(), "message": message }),
                    );
                    context.output.text(&escaped(&format!("{}  {message}", error.code)));
                    wrong += 1;
                    first.get_or_insert(error.code);
                }
            }
        }
        let all = count(files.len() as u64);
        match first {
            None => {
                context.output.text(&format!("{all} shards are sound: {} target tokens", count(targets)));
                Ok(Outcome::Done)
            }
            Some(code) => Err(Error::new(code, format!("{} of {all} shards are not sound", count(wrong)))),
        }
    }
}

/// Rows and target tokens of a sound shard, in memory for one of its row groups.
fn verify(file: &Path) -> Result<(u64, u64)> {
    let (mut rows, mut target_tokens) = (0, 0);
    for group in files::reader(file)? {
        let group = group.map_err(|error| files::named(file, &error))?;
        rows += group.len() as u64;
        target_tokens += group.iter().map(|sequence| sequence.targets.len() as u64).sum::<u64>();
    }
    Ok((rows, target_tokens))
}
