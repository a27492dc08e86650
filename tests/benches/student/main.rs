//! How fast a student trains: its step beside plain PyTorch's, and what a whole job pays besides steps, for rows and
//! for checkpoints. `docs/student-speed.md` has the tables.

mod job;
mod journal;
mod overheads;
mod steps;

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, ValueEnum};
use retort_tests::ticks::Others;
use serde_json::json;

pub type Failure = Box<dyn std::error::Error>;

/// Runs retort's distillation step beside plain PyTorch's, then a whole job, and prints what was wanted and what came.
#[derive(Parser)]
#[command(name = "student", after_help = EXAMPLES)]
pub struct Options {
    /// Teacher of the job: a Hugging Face folder
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Where set-up puts PyTorch's environment, and where figures and the job's home go
    #[arg(long, value_name = "DIR")]
    cache: PathBuf,
    /// One part alone
    #[arg(long, value_name = "PART")]
    only: Option<Part>,
    /// Turns of each side of the steps
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Steps of a turn; the first is not counted
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u32).range(2..))]
    steps: u32,
    /// Cores of each side, and of the job's workers; all of them when not given
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    threads: Option<u32>,
    /// Steps in bf16, which is slow where the CPU does not multiply it
    #[arg(long)]
    bf16: bool,
    /// Print the figures as JSON, not as tables
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// The step beside plain PyTorch's
    Steps,
    /// What a job pays besides steps
    Job,
}

const EXAMPLES: &str = "Examples:
  make bench-student
  make bench-student BENCH_STUDENT='--only job'
  student --model DIR --cache ~/.cache/retort --rounds 2 --json";

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("student: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<String, Failure> {
    let wanted = |part| options.only.is_none_or(|only| only == part);
    let folder = options.cache.join("bench-student");
    std::fs::create_dir_all(&folder)?;
    let steps = wanted(Part::Steps).then(|| steps::measure(options)).transpose()?;
    let overheads = wanted(Part::Job).then(|| overheads::measure(options, &folder)).transpose()?;
    let figures = json!({ "steps": steps, "job": overheads });
    std::fs::write(folder.join("figures.json"), format!("{figures:#}\n"))?;
    if options.json {
        return Ok(format!("{figures:#}"));
    }
    let tables = [steps.map(|steps| steps.table()), overheads.map(|overheads| overheads.table())];
    Ok(tables.into_iter().flatten().collect::<Vec<_>>().join("\n\n"))
}

/// Who else used the machine, as every table says it.
fn quiet(others: Others) -> String {
    let Others { used, stolen } = others;
    let warning = if others.quiet() { "" } else { "\n**Something else was running: do not quote these figures.**" };
    format!("Others used {used:.2} cores meanwhile, and the host kept {stolen:.2}.{warning}")
}
