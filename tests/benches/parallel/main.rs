//! One model trained by two student processes: seconds a step over links of several rates beside what
//! docs/parallel-training.md computes, and what each way of sharing costs in quality. docs/parallel-training.md
//! has the tables.

mod carry;
mod cluster;
mod far;
mod quality;
mod speed;
mod table;

use std::{
    path::PathBuf,
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use clap::{Parser, Subcommand};
use retort_tests::ticks::{Others, Ticks};
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use crate::{cluster::Cluster, far::Far};

pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Trains with two students of one thread each: over loopback, 1 Gbit/s and 100 Mbit/s, synchronously and by DiLoCo.
#[derive(Parser)]
#[command(name = "parallel", after_help = EXAMPLES, subcommand_negates_reqs = true)]
struct Options {
    /// Where figures go, and where the jobs are while they run
    #[arg(long, value_name = "DIR", required = true)]
    cache: Option<PathBuf>,
    /// One part alone
    #[arg(long, value_name = "PART")]
    only: Option<Part>,
    /// A trial of everything in a few minutes, whose figures are not to be quoted
    #[arg(long)]
    quick: bool,
    /// Print the figures as JSON, not as tables
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

const EXAMPLES: &str = "Examples:
  make bench-parallel
  make bench-parallel BENCH_PARALLEL=--quick
  parallel --cache ~/.cache/retort --only quality --json";

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    Speed,
    Quality,
}

#[derive(Subcommand)]
enum Command {
    /// The other end of a measured transfer
    #[command(hide = true)]
    Carry {
        /// Where to listen
        address: String,
    },
}

/// All that was measured.
#[derive(Serialize)]
struct Figures {
    cpu: String,
    cores: usize,
    quick: bool,
    seconds: f64,
    others: Others,
    speed: Option<speed::Speed>,
    quality: Option<quality::Quality>,
}

/// Set once a signal came: what fails from then on is not told.
static STOPPING: AtomicBool = AtomicBool::new(false);

fn main() -> ExitCode {
    let options = Options::parse();
    if let Some(Command::Carry { address }) = &options.command {
        return told(carry::serve(address));
    }
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !STOPPING.load(Ordering::Relaxed) {
            print(panic);
        }
    }));
    // The measuring blocks; this thread waits for signals meanwhile.
    let measuring = std::thread::spawn(move || measure(&options));
    let signalled = async {
        let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        while !measuring.is_finished() {
            tokio::select! {
                _ = interrupt.recv() => return Ok(true),
                _ = terminate.recv() => return Ok(true),
                () = tokio::time::sleep(std::time::Duration::from_millis(100)) => {}
            }
        }
        Ok::<_, Failure>(false)
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime.map_err(Failure::from).and_then(|runtime| runtime.block_on(signalled)) {
        Ok(false) => measuring.join().map_or(ExitCode::FAILURE, told),
        Ok(true) => {
            STOPPING.store(true, Ordering::Relaxed);
            eprintln!("parallel: stopping what was started");
            cluster::end_children();
            far::remove_own();
            ExitCode::from(130)
        }
        Err(error) => told(Err(error)),
    }
}

fn told(done: Result<(), Failure>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("parallel: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure(options: &Options) -> Result<(), Failure> {
    let folder = options.cache.as_deref().ok_or("--cache DIR is missing")?.join("bench-parallel");
    let work = folder.join("work");
    if work.exists() {
        std::fs::remove_dir_all(&work)?;
    }
    std::fs::create_dir_all(&work)?;
    let (started, before) = (Instant::now(), Ticks::now().map_err(|error| error.to_string())?);
    let cores = std::thread::available_parallelism()?.get();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (speed, quality) = runtime.block_on(async {
        let far = Far::new()?;
        let mut cluster = Cluster::start(&work, &far, cores)?;
        let speed = match options.only {
            Some(Part::Quality) => None,
            _ => Some(speed::measure(&mut cluster, options.quick).await?),
        };
        let quality = match options.only {
            Some(Part::Speed) => None,
            _ => Some(quality::measure(&mut cluster, options.quick).await?),
        };
        Ok::<_, Failure>((speed, quality))
    })?;
    let others = Ticks::now().map_err(|error| error.to_string())?.since(&before, cores);
    std::fs::remove_dir_all(&work)?;
    let seconds = started.elapsed().as_secs_f64();
    let figures = Figures { cpu: cpu()?, cores, quick: options.quick, seconds, others, speed, quality };
    let json = serde_json::to_string_pretty(&figures)?;
    let name = if options.quick { "figures-quick.json" } else { "figures.json" };
    std::fs::write(folder.join(name), format!("{json}\n"))?;
    println!("{}", if options.json { json } else { table::markdown(&figures) });
    Ok(())
}

fn cpu() -> Result<String, Failure> {
    let text = std::fs::read_to_string("/proc/cpuinfo")?;
    let name = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    Ok(name.map_or_else(|| "unnamed CPU".to_owned(), |(_, name)| name.trim().to_owned()))
}
