//! `retort-broker`: Kafka's protocol on one machine, over one SQLite file, nothing to install.
//!
//! The protocol and the storage are tansu's; connections, consumer groups and fetching are ours
//! (why: `docs/decisions/002-embedded-broker.md`).

mod arrivals;
mod coordinator;
mod data;
mod fetch;
mod group;
mod routes;
mod server;

use std::{
    path::PathBuf,
    process::ExitCode,
    time::{Duration, SystemTime},
};

use clap::Parser;
use retort_core::{Error, Result, task_group::TaskGroup};
use retort_process::{LogArgs, Ready, die_with_parent, exit_with, on_signals};
use tansu_storage::{Storage, StorageContainer};
use tokio_util::sync::CancellationToken;

use crate::{arrivals::Arrivals, coordinator::Groups, data::DataFolder};

/// How often consumer groups look for members that have gone silent.
const GROUP_TICK: Duration = Duration::from_millis(200);
const MAINTENANCE: Duration = Duration::from_secs(600);
const WATCHDOG: Duration = Duration::from_secs(2);
const STRIKES: u32 = 3;

/// Kafka's protocol on one machine, over one SQLite file.
///
/// Prints one line of JSON on standard output once it answers. Records it acknowledged survive
/// its being killed.
#[derive(Debug, Parser)]
#[command(name = "retort-broker", version, after_help = EXAMPLES)]
struct Args {
    /// Where to listen; port 0 takes a free port
    #[arg(long, default_value = "127.0.0.1:9092", value_name = "HOST:PORT")]
    listen: String,
    /// Where clients are told to connect, when that is not where it listens
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Option<String>,
    /// Folder of the broker's file; made if it is missing
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Stop when the process that started this one ends
    #[arg(long)]
    die_with_parent: bool,
    #[command(flatten)]
    log: LogArgs,
}

const EXAMPLES: &str = "Examples:
  retort-broker --listen 127.0.0.1:9092 --data /var/lib/retort/broker
  retort-broker --listen 127.0.0.1:0 --data ./broker      # any free port; the ready line tells which
  retort-broker --listen 0.0.0.0:9092 --advertise broker:9092 --data /data";

fn main() -> ExitCode {
    let mut args = Args::parse();
    // tansu logs what its callers handle, its storage engine even as errors. The user's filter
    // comes after, so that it can ask for them.
    args.log.log = format!(
        "tansu_storage=error,tansu_storage::lite=off,tansu_service=error,tansu_sans_io=error,libsql=warn,{}",
        args.log.log
    );
    args.log.init();
    if args.die_with_parent {
        die_with_parent();
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return exit_with(&Error::internal(format!("cannot start the runtime: {error}"))),
    };
    let outcome = runtime.block_on(run(&args));
    runtime.shutdown_timeout(Duration::from_millis(100));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => exit_with(&error),
    }
}

async fn run(args: &Args) -> Result<()> {
    let shutdown = on_signals()?;
    let data = DataFolder::enter(&args.data)?;
    let (listener, address) = server::bind(&args.listen).await?;
    let advertised = args.advertise.clone().unwrap_or_else(|| address.to_string());
    let storage = data.open(&advertised).await?;
    let defect = |error: tansu_broker::Error| Error::internal(format!("setting up the broker: {error}"));
    let groups = Groups::new(storage.clone()).map_err(defect)?;
    let requests =
        routes::requests(storage.clone(), groups.clone(), Arrivals::default(), shutdown.clone()).map_err(defect)?;

    let mut tasks = TaskGroup::new(shutdown.clone());
    tasks.spawn("server", server::serve(listener, requests, shutdown.clone()));
    tasks.spawn("groups", follow_groups(groups, shutdown.clone()));
    tasks.spawn("maintenance", maintain(storage.clone(), shutdown.clone()));
    tasks.spawn("watchdog", watch(storage, shutdown.clone()));
    tasks.spawn("ready", async move {
        server::probe(address).await?;
        tracing::info!(listen = %address, advertised, "the broker is ready");
        Ready { ready: "broker".to_owned(), listen: Some(address.to_string()) }.announce();
        Ok(())
    });
    tasks.join().await
}

async fn follow_groups(groups: Groups<StorageContainer>, shutdown: CancellationToken) -> Result<()> {
    let mut tick = tokio::time::interval(GROUP_TICK);
    while shutdown.run_until_cancelled(tick.tick()).await.is_some() {
        groups.tick();
    }
    groups.close();
    Ok(())
}

/// Removes what has passed its retention.
async fn maintain(storage: StorageContainer, shutdown: CancellationToken) -> Result<()> {
    let mut tick = tokio::time::interval(MAINTENANCE);
    while shutdown.run_until_cancelled(tick.tick()).await.is_some() {
        if let Err(error) = storage.maintain(SystemTime::now()).await {
            tracing::warn!("maintenance: {error}");
        }
    }
    Ok(())
}

/// tansu's storage is one task; should it ever end, every request fails from then on. A broker
/// that starts again is better than one that lives and answers nothing.
async fn watch(storage: StorageContainer, shutdown: CancellationToken) -> Result<()> {
    let mut tick = tokio::time::interval(WATCHDOG);
    let mut strikes = 0;
    while shutdown.run_until_cancelled(tick.tick()).await.is_some() {
        match storage.ping().await {
            Ok(()) => strikes = 0,
            Err(error) if strikes + 1 < STRIKES => {
                strikes += 1;
                tracing::warn!(strikes, "the storage does not answer: {error}");
            }
            Err(error) => {
                return Err(Error::internal(format!(
                    "the broker's storage has stopped: {error}; start the broker again"
                )));
            }
        }
    }
    Ok(())
}
