//! Events: what workers report, applied exactly once in effect.
//!
//! An event's effects and its offset share one transaction, so a crash applies both or neither. An
//! event seen before (by its id), of a stale epoch, of an ended job or of one that is gone changes
//! nothing but the offset. A record that cannot be read, or that claims what cannot be, is written
//! down in `skipped_records` and passed over.
//!
//! Within one attempt the order of events does not matter either: progress keeps the highest step,
//! and results are separate rows.

mod apply;
mod from_proto;

use std::{sync::Arc, time::Duration};

use retort_bus::EventRecord;
use retort_core::{Error, Kind, Result};
use tokio_util::sync::CancellationToken;

pub(crate) use from_proto::is_sha256;
pub use from_proto::{Event, What};

use crate::{
    bus::{Bus, Events},
    context::Context,
    database::{commit, offsets},
    retry::Backoff,
};

/// What became of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Applied,
    /// Seen before, or its news is known already.
    Repeated,
    /// Of an attempt or a job that is over.
    Stale,
    /// Unreadable, or impossible; the reason.
    Skipped(String),
}

/// Reads and applies events until `shutdown`.
pub async fn run(context: Context, bus: Arc<dyn Bus>, shutdown: CancellationToken) -> Result<()> {
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
    while !shutdown.is_cancelled() {
        let read = tokio::select! {
            biased;
            () = shutdown.cancelled() => return Ok(()),
            reader = open(&context, bus.as_ref()) => reader,
        };
        let error = match read {
            Ok(mut reader) => match read_on(&context, reader.as_mut(), &shutdown, &mut backoff).await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            },
            Err(error) => error,
        };
        tracing::warn!(code = %error.code, "events cannot be read, trying again: {}", error.chain());
        pause(backoff.wait(), &shutdown).await;
    }
    Ok(())
}

async fn open(context: &Context, bus: &dyn Bus) -> Result<Box<dyn Events>> {
    let starts = offsets::list(&mut *context.database.read().await?).await?;
    bus.events(&starts).await
}

async fn read_on(
    context: &Context,
    reader: &mut dyn Events,
    shutdown: &CancellationToken,
    backoff: &mut Backoff,
) -> Result<()> {
    loop {
        let record = tokio::select! {
            biased;
            () = shutdown.cancelled() => return Ok(()),
            record = reader.next() => record?,
        };
        // The record is kept until it is applied: the next one must not overtake it.
        loop {
            match apply(context, &record).await {
                Ok(_) => break,
                // A defect of ours must not stop every job: the lease of what is lost here runs out.
                Err(error) if error.kind() == Kind::Internal => match skip(context, &record, &error.chain()).await {
                    Ok(()) => break,
                    Err(error) => tracing::error!(code = %error.code, "{}", error.chain()),
                },
                Err(error) => {
                    tracing::warn!(
                        code = %error.code, offset = record.offset,
                        "an event could not be applied, trying again: {}", error.chain()
                    );
                }
            }
            pause(backoff.wait(), shutdown).await;
            if shutdown.is_cancelled() {
                return Ok(());
            }
        }
        backoff.reset();
    }
}

/// Applies one record and stores its offset, both or neither. An error says that the database did
/// not take it: the record must be applied again.
pub async fn apply(context: &Context, record: &EventRecord) -> Result<Outcome> {
    let now_ms = context.now_ms();
    let event = match &record.event {
        Ok(event) => Event::try_from(event),
        Err(error) => Err(Error::new(error.code, error.message.clone())),
    };
    let mut tx = context.database.begin().await?;
    offsets::store(&mut tx, record.partition, record.offset.saturating_add(1)).await?;
    let outcome = match event {
        Ok(event) => match apply::apply(context, &mut tx, &event).await {
            // Only the event itself can be at fault here; the transaction is clean up to its refusal.
            Err(error) if error.kind() == Kind::Invalid => Outcome::Skipped(error.message),
            other => other?,
        },
        Err(error) => Outcome::Skipped(error.message),
    };
    if let Outcome::Skipped(reason) = &outcome {
        tracing::warn!(partition = record.partition, offset = record.offset, "an event was skipped: {reason}");
        offsets::skip(&mut tx, record.partition, record.offset, reason, now_ms).await?;
    }
    commit(tx).await?;
    if let Ok(event) = &record.event {
        if outcome == Outcome::Applied
            && let Ok(job) = event.job_id.parse()
        {
            context.wakers.job_changed(&job);
        }
        tracing::debug!(job = event.job_id, task = event.task_id, epoch = event.epoch, ?outcome, "event");
    }
    Ok(outcome)
}

async fn skip(context: &Context, record: &EventRecord, reason: &str) -> Result<()> {
    tracing::error!(partition = record.partition, offset = record.offset, "an event was skipped: {reason}");
    let mut tx = context.database.begin().await?;
    offsets::store(&mut tx, record.partition, record.offset.saturating_add(1)).await?;
    offsets::skip(&mut tx, record.partition, record.offset, reason, context.now_ms()).await?;
    commit(tx).await
}

async fn pause(wait: Duration, shutdown: &CancellationToken) {
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = tokio::time::sleep(wait) => {}
    }
}

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;
