//! `WatchJob`: a job's events from the database, then as they are written.

use std::{collections::VecDeque, time::Duration};

use futures::{Stream, stream};
use retort_core::{Code, Error, Result, id::JobId};
use retort_proto::JobEvent;
use tokio::sync::broadcast::{self, error::RecvError};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::refuse;
use crate::{
    context::Context,
    database::{jobs, journal},
};

/// Events read at once.
const BATCH: u32 = 256;
/// Looks without being woken: nothing depends on it, but nothing hangs without it.
const TICK: Duration = Duration::from_secs(10);

/// Every event after a sequence, each once and in order; ends after the one that ends the job.
pub fn events(
    context: Context,
    id: JobId,
    after: u64,
    shutdown: CancellationToken,
) -> impl Stream<Item = Result<JobEvent, Status>> + Send {
    // Subscribed before the first look, so nothing falls between.
    let changes = context.wakers.watch_jobs();
    let watch = Watch { context, id, after, shutdown, changes, read: VecDeque::new(), ended: false };
    stream::unfold(watch, |mut watch| async move {
        match watch.next().await {
            Ok(Some(event)) => Some((Ok(event), watch)),
            Ok(None) => None,
            Err(error) => {
                watch.ended = true;
                Some((Err(refuse(error)), watch))
            }
        }
    })
}

struct Watch {
    context: Context,
    id: JobId,
    after: u64,
    shutdown: CancellationToken,
    changes: broadcast::Receiver<JobId>,
    read: VecDeque<JobEvent>,
    ended: bool,
}

impl Watch {
    async fn next(&mut self) -> Result<Option<JobEvent>> {
        loop {
            if self.ended {
                return Ok(None);
            }
            if let Some(event) = self.read.pop_front() {
                self.after = event.sequence;
                return Ok(Some(event));
            }
            let mut snapshot = self.context.database.read().await?;
            let job = jobs::get(&mut snapshot, &self.id).await?;
            self.read = journal::list(&mut snapshot, &self.id, self.after, BATCH).await?.into();
            drop(snapshot);
            if !self.read.is_empty() {
                continue;
            }
            if job.state.is_final() {
                return Ok(None);
            }
            self.changed().await?;
        }
    }

    /// Waits until the job may have new events.
    async fn changed(&mut self) -> Result<()> {
        loop {
            tokio::select! {
                biased;
                () = self.shutdown.cancelled() => {
                    return Err(Error::new(
                        Code::OrchestratorUnavailable,
                        format!("the orchestrator is shutting down; watch again after sequence {}", self.after),
                    ));
                }
                changed = self.changes.recv() => match changed {
                    Ok(id) if id != self.id => {}
                    // Lagging only means that it may have been this job.
                    Ok(_) | Err(RecvError::Lagged(_)) => return Ok(()),
                    Err(RecvError::Closed) => return Err(Error::internal("the orchestrator's wakers are gone")),
                },
                () = tokio::time::sleep(TICK) => return Ok(()),
            }
        }
    }
}
