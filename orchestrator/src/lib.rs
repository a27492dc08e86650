//! The orchestrator: the gRPC API, the state store, the planner and everything that decides.
//!
//! One process owns one database. Requests and events change rows in transactions; five loops move
//! what follows from them: the outbox publishes, the event reader applies, the lease keeper takes
//! lost work back, promotion judges what is done and the janitor removes what is over. Each loop
//! starts from the database alone, so a killed orchestrator resumes by being started again.

pub mod admission;
mod api;
pub mod bus;
pub mod context;
pub mod database;
pub mod events;
mod forecast;
pub mod gates;
pub mod intake;
pub mod janitor;
pub mod leases;
mod model_card;
pub mod outbox;
pub mod planner;
pub mod progress;
pub mod promotion;
pub mod report;
mod retry;
mod store;
mod to_proto;

#[cfg(test)]
mod testing;

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use retort_artifact::Store;
use retort_core::{Code, Error, Result, clock::Clock, task_group::TaskGroup};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

pub use context::{Context, Settings};

use crate::{bus::Bus, database::Database};

/// After being told to stop, running calls and transactions have this long.
const GRACE: Duration = Duration::from_millis(2500);

#[derive(Clone, Debug)]
pub struct Options {
    /// `host:port`; port 0 takes a free one.
    pub listen: String,
    pub database: PathBuf,
    pub settings: Settings,
}

/// Holds its port and its database from [`Orchestrator::start`] on.
pub struct Orchestrator {
    context: Context,
    bus: Arc<dyn Bus>,
    listener: TcpListener,
    address: SocketAddr,
}

impl Orchestrator {
    /// Opens the database, takes the port and gives every running attempt a whole lease.
    pub async fn start(options: &Options, store: Store, bus: Arc<dyn Bus>, clock: Arc<dyn Clock>) -> Result<Self> {
        let database = Database::open(&options.database).await?;
        Self::begin(options, database, store, bus, clock).await
    }

    /// As [`Self::start`], with the store at this path or URL. It is made for a database that has no jobs yet; for any
    /// other it must be there.
    pub async fn open(options: &Options, store: &str, bus: Arc<dyn Bus>, clock: Arc<dyn Clock>) -> Result<Self> {
        let database = Database::open(&options.database).await?;
        let store = store::open(&database, &options.database, store).await?;
        Self::begin(options, database, store, bus, clock).await
    }

    async fn begin(
        options: &Options,
        database: Database,
        store: Store,
        bus: Arc<dyn Bus>,
        clock: Arc<dyn Clock>,
    ) -> Result<Self> {
        let listener = api::bind(&options.listen).await?;
        let address = api::local_address(&listener)?;
        let context = Context::new(database, store, clock, options.settings);
        let kept = leases::grant_grace(&context).await?;
        if kept > 0 {
            tracing::info!(leases = kept, "running attempts are given a whole lease to report");
        }
        Ok(Self { context, bus, listener, address })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Serves until `shutdown`; then ends what runs, within three seconds.
    pub async fn run(self, shutdown: CancellationToken) -> Result<()> {
        let Self { context, bus, listener, .. } = self;
        let mut group = TaskGroup::new(shutdown.clone());
        group.spawn("api", api::serve(context.clone(), listener, shutdown.clone()));
        group.spawn("outbox", outbox::run(context.clone(), Arc::clone(&bus), shutdown.clone()));
        group.spawn("events", events::run(context.clone(), bus, shutdown.clone()));
        group.spawn("leases", leases::run(context.clone(), shutdown.clone()));
        group.spawn("promotion", promotion::run(context.clone(), shutdown.clone()));
        group.spawn("janitor", janitor::run(context.clone(), shutdown.clone()));
        let too_slow = async {
            shutdown.cancelled().await;
            tokio::time::sleep(GRACE).await;
        };
        let ended = tokio::select! {
            ended = group.join() => ended,
            () = too_slow => {
                tracing::warn!("some calls did not end within {GRACE:?} and were cut off");
                Ok(())
            }
        };
        if tokio::time::timeout(Duration::from_millis(400), context.database.close()).await.is_err() {
            tracing::warn!("the database was not closed in time; its log is folded in at the next start");
        }
        ended
    }
}

/// A file of another kind, or a folder, where the database should be.
pub fn refuse_folder(path: &std::path::Path) -> Result<()> {
    if path.is_dir() {
        return Err(Error::new(
            Code::RequestInvalid,
            format!(
                "--database {} is a folder; name a file in it, such as {}",
                path.display(),
                path.join("retort.sqlite").display()
            ),
        ));
    }
    Ok(())
}
