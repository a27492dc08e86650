mod target;
mod work;

use std::{
    path::{Path, PathBuf},
    str::FromStr,
};

use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use retort_core::{Code, Error, Result};
use serde_json::json;

use self::work::{Ended, STEPS, Work};
use super::files;
use crate::{
    command::Context,
    outcome::Outcome,
    signals::Signals,
    text::{bytes, count},
};

/// Writes soft targets as JSON lines, numpy arrays or top-k lists
///
/// jsonl: one line a sequence: row_id, split, row, tags, token_ids, target_mask, finish_reason, and
/// "targets", one object a target token with its support: "ids", "mass" (what a loss uses; sums to
/// 1 with the "residual" of a bucket), "logprobs" (null for samples), "top" (the most likely id), "label_logprob", and
/// "log_sum_exps" for the line's "temperatures" where it has any. Ten times the shard and more.
///
/// npz: arrays for numpy.load, among them the dense masses, positions x vocabulary: large once
/// loaded, so --max-bytes limits it.
///
/// top-k: Parquet with input_ids, labels, top_indices and top_values (log-probabilities), as
/// trainers on a teacher's top-k read them. The sampled tail is left out.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  retort shard export 1.parquet --out 1.jsonl
  retort shard export 1.parquet --out - | head -1 | jq .targets[0]
  retort shard export 1.parquet --format npz --dtype f16 --rows 0..64 --out 1.npz
  retort shard export ~/.retort/store/jobs/JOB/shards --split train --format top-k --k 16 --out all.parquet")]
pub struct Export {
    /// Shards, or folders to search for *.parquet
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
    /// Where it goes, whole or not at all; - is standard output (jsonl)
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[arg(long, value_enum, default_value_t = Format::Jsonl)]
    format: Format,
    /// Replace a file that is there
    #[arg(long)]
    force: bool,
    /// Only these lines of the prompt set, from 0, B left out; either end may be missing
    #[arg(long, value_name = "A..B")]
    rows: Option<Rows>,
    /// top-k: how many tokens a position; all that are exact if not said
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    k: Option<u32>,
    /// Only shards of this split; needed where there are both
    #[arg(long, value_enum)]
    split: Option<Split>,
    /// npz: of the masses [default: f32]
    #[arg(long, value_enum)]
    dtype: Option<Precision>,
    /// npz: refuse arrays that take more once loaded [default: 4294967296]
    #[arg(long, value_name = "BYTES")]
    max_bytes: Option<u64>,
}

const DEFAULT_MAX_BYTES: u64 = 4 << 30;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Jsonl,
    Npz,
    TopK,
}

impl Format {
    fn name(self) -> &'static str {
        match self {
            Self::Jsonl => "jsonl",
            Self::Npz => "npz",
            Self::TopK => "top-k",
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Split {
    Train,
    HeldOut,
    All,
}

impl Split {
    /// Whether a shard of the split of this name is wanted.
    fn takes(self, name: &str) -> bool {
        match self {
            Self::Train => name == "train",
            Self::HeldOut => name == "held_out",
            Self::All => true,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Precision {
    F16,
    F32,
}

/// `A..B`, `A..` or `..B`.
#[derive(Clone, Copy, Debug)]
struct Rows {
    from: u64,
    to: u64,
}

impl Rows {
    fn contains(self, row: u64) -> bool {
        (self.from..self.to).contains(&row)
    }
}

impl FromStr for Rows {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let end = |end: &str, missing| if end.is_empty() { Ok(missing) } else { end.parse::<u64>() };
        let (from, to) = text.split_once("..").ok_or("it must be A..B, such as 0..100")?;
        let (Ok(from), Ok(to)) = (end(from, 0), end(to, u64::MAX)) else {
            return Err("both ends of A..B are whole numbers from 0".to_owned());
        };
        if from < to { Ok(Self { from, to }) } else { Err("A must be smaller than B in A..B".to_owned()) }
    }
}

impl Export {
    pub async fn run(self, context: &Context) -> Result<Outcome> {
        self.check()?;
        let files = files::find(&self.paths)?;
        let (shards, stream) = (files.len(), target::is_stream(&self.out));
        let (out, format, bar) = (self.out.clone(), self.format, bar(shards));
        // Writing to a stream may wait for its reader: there a signal ends the process at once.
        let signals = if stream { None } else { Some(Signals::listen()?) };
        let stop = signals.as_ref().map(|signals| signals.stop.clone()).unwrap_or_default();
        let work = Work { options: self, files, stop, bar: bar.clone() };
        let ended = tokio::task::spawn_blocking(move || work.run())
            .await
            .unwrap_or_else(|error| Err(Error::internal(format!("the export broke off: {error}"))));
        bar.finish_and_clear();
        match ended? {
            Ended::Unread => Ok(Outcome::Done),
            Ended::Stopped => {
                context.output.remark(&format!("stopped: {} was not written", out.display()));
                Ok(Outcome::Interrupted)
            }
            Ended::Done(written) => {
                if out != Path::new("-") {
                    context.output.json(&json!({
                        "path": out.display().to_string(), "format": format.name(), "files": shards, "sequences": written.sequences,
                        "target_tokens": written.positions, "bytes": written.bytes,
                    }));
                }
                let size = written.bytes.map(|n| format!(", {}", bytes(n))).unwrap_or_default();
                context.output.remark(&format!(
                    "{} sequences are in {}: {} target tokens{size}",
                    count(written.sequences),
                    if out == Path::new("-") { "the output".to_owned() } else { out.display().to_string() },
                    count(written.positions)
                ));
                Ok(Outcome::Done)
            }
        }
    }

    /// Options that say something of another form are a mistake, not to be passed over.
    fn check(&self) -> Result<()> {
        let options = [
            ("--k", Format::TopK, self.k.is_some()),
            ("--dtype", Format::Npz, self.dtype.is_some()),
            ("--max-bytes", Format::Npz, self.max_bytes.is_some()),
        ];
        for (option, format, given) in options {
            if given && format != self.format {
                return Err(Error::new(
                    Code::RequestInvalid,
                    format!("{option} goes with --format {}, not {}", format.name(), self.format.name()),
                ));
            }
        }
        if self.format != Format::Jsonl && target::is_stream(&self.out) {
            let (out, format) = (self.out.display(), self.format.name());
            let message = format!("--out {out} is a stream, and {format} needs a file; only jsonl can be streamed");
            return Err(Error::new(Code::RequestInvalid, message));
        }
        Ok(())
    }
}

/// On standard error, and hidden where that is no terminal.
fn bar(files: usize) -> ProgressBar {
    let template = "{msg:<8} {bar:32.cyan/dim} {percent:>3} %  {eta} left";
    ProgressBar::new(STEPS * files as u64)
        .with_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()))
}
