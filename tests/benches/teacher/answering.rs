//! Our own sides' end of the wire: reads requests, does the work, answers.

use std::{io::Write as _, path::PathBuf};

use serde_json::{Value, json};

use crate::{
    Failure,
    roof::Roof,
    teacher::Teacher,
    work::{RETORT, RETORT_2, RETORT_16, ROOF, Request},
};

#[derive(clap::Args)]
pub struct Options {
    /// retort, retort-2, retort-16 or roof
    side: String,
    model: PathBuf,
    /// f32 or bf16
    dtype: String,
    threads: usize,
    /// A folder for shards
    store: PathBuf,
}

/// What one piece of work came to.
pub struct Done {
    pub tokens: u64,
    pub seconds: f64,
    pub detail: Value,
}

pub fn run(options: &Options) -> Result<(), Failure> {
    let Options { model, dtype, threads, store, .. } = options;
    let mut work: Box<dyn FnMut(&Request) -> Result<Done, Failure>> = match options.side.as_str() {
        RETORT | RETORT_2 | RETORT_16 => {
            let stages = match options.side.as_str() {
                RETORT_2 => 2,
                RETORT_16 => 16,
                _ => 1,
            };
            match Teacher::load(model, dtype, *threads, stages, store) {
                Ok(mut teacher) => Box::new(move |request| teacher.work(request)),
                Err(error) => return refuse(error),
            }
        }
        ROOF => match Roof::of(model, dtype, *threads) {
            Ok(mut roof) => Box::new(move |request| roof.work(request)),
            Err(error) => return refuse(error),
        },
        other => return Err(format!("{other:?} is no side of ours: retort, retort-2, retort-16 or roof").into()),
    };
    let version = format!("retort {}, libtorch {}", env!("CARGO_PKG_VERSION"), torch_version());
    say(&json!({ "ready": { "version": version, "dtype": dtype, "threads": threads } }))?;
    for line in std::io::stdin().lines() {
        let request: Request = serde_json::from_str(&line?)?;
        forget_peak()?;
        let before_mb = status_mb("VmRSS:")?;
        match work(&request) {
            Ok(Done { tokens, seconds, detail }) => say(&json!({
                "tokens": tokens, "seconds": seconds, "detail": detail,
                "before_mb": before_mb, "peak_mb": status_mb("VmHWM:")?,
            }))?,
            Err(error) => return refuse(error),
        }
    }
    Ok(())
}

fn refuse(error: Failure) -> Result<(), Failure> {
    say(&json!({ "error": error.to_string() }))?;
    Err(error)
}

fn say(answer: &Value) -> Result<(), Failure> {
    let mut output = std::io::stdout().lock();
    writeln!(output, "{answer}")?;
    Ok(output.flush()?)
}

/// From here on the highest resident size counts; Linux only.
fn forget_peak() -> Result<(), Failure> {
    Ok(std::fs::write("/proc/self/clear_refs", "5")?)
}

fn status_mb(field: &str) -> Result<u64, Failure> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with(field)).ok_or("/proc/self/status has no such line")?;
    Ok(line.split_whitespace().nth(1).ok_or("a line without a number")?.parse::<u64>()? / 1000)
}

/// As the folder says that is linked here.
fn torch_version() -> String {
    let folder = std::env::var("LIBTORCH").unwrap_or_default();
    let text = std::fs::read_to_string(PathBuf::from(folder).join("complete")).unwrap_or_default();
    text.strip_prefix("torch ").map_or("of unknown version", str::trim).to_owned()
}
