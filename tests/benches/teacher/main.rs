//! retort's teacher beside what a user would run instead, in one run: `docs/teacher-speed.md`.
//!
//! Each side is a process of its own that holds its model and answers requests (`side.rs`); it is asked
//! while all others wait for theirs. The sides take turns, round after round, so that a machine that
//! slows down slows all of them, and what counts is the ratio of medians. All compute on the same random
//! token ids, new ones each round. Every side has its own reason to be left out, and the table says it.
//!
//! A token counts when its distribution was delivered (scoring) or when it was written (generating), so
//! of 8 sequences of 512 transformers delivers 4,096, and who predicts from the token before, 4,088.

mod answering;
mod bars;
mod figures;
mod machine;
mod measure;
mod memory;
mod roof;
mod side;
mod stages;
mod table;
mod teacher;
mod work;

use std::{path::PathBuf, process::ExitCode};

use clap::{Args, Parser, Subcommand};
use retort_tests::ticks::Ticks;

use crate::machine::Machine;

pub type Failure = Box<dyn std::error::Error>;

/// Runs retort's teacher beside transformers, vLLM and the bare matrix products, and prints the ratios.
#[derive(Parser)]
#[command(name = "teacher", args_conflicts_with_subcommands = true, subcommand_negates_reqs = true, after_help = EXAMPLES)]
struct Cli {
    #[command(flatten)]
    options: Option<Options>,
    #[command(subcommand)]
    command: Option<Command>,
}

const EXAMPLES: &str = "Examples:
  make bench-teacher
  teacher --model DIR --cache ~/.cache/retort --quick
  teacher --model DIR --cache ~/.cache/retort --rounds 7 --without vllm --json";

#[derive(Args)]
pub struct Options {
    /// A Hugging Face folder
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Where set-up puts the peers' Python environments, and where figures, logs and shards go
    #[arg(long, value_name = "DIR")]
    cache: PathBuf,
    /// Turns of every side
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// One round of less work: shows that everything runs, not how fast
    #[arg(long)]
    quick: bool,
    /// Arithmetic of every side; auto is bf16 where the CPU multiplies it, f32 elsewhere
    #[arg(long, default_value = "auto", value_parser = ["auto", "f32", "bf16"])]
    dtype: String,
    /// Cores of every side; all of them when not given
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    threads: Option<u32>,
    /// A side to leave out; again for more
    #[arg(long, value_name = "SIDE")]
    without: Vec<String>,
    /// Print the figures as JSON, not as tables
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand)]
enum Command {
    /// One side of ours, asked on standard input: retort, or roof (the matrix products alone)
    #[command(hide = true)]
    Answer(answering::Options),
    /// A stage of a teacher group, for the side that has one
    #[command(hide = true)]
    Stage(stages::Options),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match (cli.command, cli.options) {
        (Some(Command::Answer(options)), _) => answering::run(&options),
        (Some(Command::Stage(options)), _) => stages::serve(&options),
        (None, Some(options)) => bench(&options),
        (None, None) => Err("name a model and a cache: --model DIR --cache DIR".into()),
    };
    done.map_or_else(
        |error| {
            eprintln!("teacher: {error}");
            ExitCode::FAILURE
        },
        |()| ExitCode::SUCCESS,
    )
}

fn bench(options: &Options) -> Result<(), Failure> {
    let folder = options.cache.join("bench-teacher");
    // What a run that was killed left behind.
    if let Err(error) = std::fs::remove_dir_all(folder.join("store"))
        && error.kind() != std::io::ErrorKind::NotFound
    {
        return Err(error.into());
    }
    std::fs::create_dir_all(folder.join("store"))?;
    let machine = Machine::of(options)?;
    let before = Ticks::now()?;
    let measured = measure::run(options, &machine, &folder)?;
    let others = Ticks::now()?.since(&before, machine.cores);
    let memory = memory::run(options, &machine, &folder)?;
    let figures = figures::whole(options, &machine, others, &measured, &memory);
    let path = folder.join("figures.json");
    let part = path.with_extension("part");
    std::fs::write(&part, serde_json::to_vec_pretty(&figures)?)?;
    std::fs::rename(part, &path)?;
    if options.json {
        println!("{figures:#}");
    } else {
        println!("{}", table::markdown(&machine, others, &measured, &memory, options.quick));
        println!("All figures: {}", path.display());
    }
    Ok(())
}
