//! `retort-orchestrator`.

use std::{path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use clap::Parser;
use retort_artifact::Store;
use retort_core::{Code, Error, Result, clock::SystemClock};
use retort_orchestrator::{Options, Orchestrator, Settings, bus::Kafka, refuse_folder};
use retort_process::{LogArgs, Ready, exit_with, on_signals};

/// Plans distillation jobs, hands their tasks to workers and promotes what passes its gates.
#[derive(Debug, Parser)]
#[command(
    name = "retort-orchestrator",
    version,
    after_help = "Examples:\n  retort-orchestrator --database retort.sqlite --store ./store --brokers 127.0.0.1:9092\n  retort-orchestrator --listen 127.0.0.1:0 --database /var/lib/retort/retort.sqlite --store file:///var/lib/retort/store --brokers kafka-1:9092,kafka-2:9092 --lease-seconds 30"
)]
struct Args {
    /// Where the gRPC API listens; port 0 takes a free one and the ready line says which
    #[arg(long, env = "RETORT_LISTEN", default_value = "127.0.0.1:7474", value_name = "HOST:PORT")]
    listen: String,
    /// SQLite file with the state of every job; made when it is not there
    #[arg(long, env = "RETORT_DATABASE", value_name = "FILE")]
    database: PathBuf,
    /// Object store that all workers share; made with a new database, and for one that has jobs it must be there
    #[arg(long, env = "RETORT_STORE", value_name = "URL_OR_PATH")]
    store: String,
    /// Kafka brokers
    #[arg(long, env = "RETORT_BROKERS", value_name = "HOST:PORT[,HOST:PORT]")]
    brokers: String,
    /// A task whose worker sends no heartbeat for this long is given to another
    #[arg(long, env = "RETORT_LEASE_SECONDS", default_value_t = 15.0, value_name = "SECONDS")]
    lease_seconds: f64,
    /// Tasks published ahead of the workers, for each pool
    #[arg(long, env = "RETORT_WINDOW", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=100_000), value_name = "TASKS")]
    window: u32,
    /// Attempts at one task before its job fails
    #[arg(long, env = "RETORT_MAX_ATTEMPTS", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000), value_name = "ATTEMPTS")]
    max_attempts: u32,
    /// Stop when the process that started this one dies
    #[arg(long)]
    die_with_parent: bool,
    #[command(flatten)]
    log: LogArgs,
}

#[tokio::main]
async fn main() -> ExitCode {
    let args = Args::parse();
    args.log.init();
    match run(args).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => exit_with(&error),
    }
}

async fn run(args: Args) -> Result<()> {
    if args.die_with_parent {
        retort_process::die_with_parent();
    }
    let shutdown = on_signals()?;
    refuse_folder(&args.database)?;
    let lease = Duration::try_from_secs_f64(args.lease_seconds)
        .ok()
        .filter(|lease| (Duration::from_millis(500)..=Duration::from_secs(3600)).contains(lease))
        .ok_or_else(|| {
            Error::new(
                Code::RequestInvalid,
                format!("--lease-seconds is {}; it must lie between 0.5 and 3600", args.lease_seconds),
            )
        })?;
    let settings = Settings { lease, window: args.window, max_attempts: args.max_attempts, ..Settings::default() };
    let options = Options { listen: args.listen, database: args.database, settings };
    // Said before a database is made.
    Store::check_address(&args.store)?;
    let bus = Arc::new(Kafka::new(&args.brokers)?);
    let orchestrator = Orchestrator::open(&options, &args.store, bus, Arc::new(SystemClock)).await?;
    let address = orchestrator.address().to_string();
    tracing::info!(listen = address, database = %options.database.display(), "ready");
    Ready { ready: "orchestrator".to_owned(), listen: Some(address) }.announce();
    orchestrator.run(shutdown).await?;
    tracing::info!("stopped");
    Ok(())
}
