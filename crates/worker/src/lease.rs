use std::{sync::Arc, time::Duration};

use retort_core::{Kind, Result};
use retort_proto as proto;
use tokio::time::Instant;

use crate::{Stop, StopSwitch, ports::Orchestrator, retry::Backoff};

/// Shortest and longest lease believed; outside of it the nearer bound counts.
const LEASE_BOUNDS: (Duration, Duration) = (Duration::from_millis(300), Duration::from_secs(3600));
/// A heartbeat without an answer after this long counts as lost.
const CALL_LIMIT: Duration = Duration::from_secs(5);

/// Sends a heartbeat each third of the lease until the switch is thrown, and throws it itself when
/// the attempt was fenced, its job cancelled, or when no heartbeat sent within the last lease was
/// answered.
///
/// `claimed_at` is when the claim was *sent*: the orchestrator's lease began later than that, so by
/// the time this side gives up, the other one still counts at least a moment.
pub(crate) async fn keep(
    orchestrator: Arc<dyn Orchestrator>,
    request: proto::HeartbeatRequest,
    lease: Option<prost_types::Duration>,
    claimed_at: Instant,
    stop: StopSwitch,
) -> Result<()> {
    let mut lease = duration(lease);
    let mut expires = claimed_at + lease;
    let mut next = claimed_at + lease / 3;
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
    loop {
        tokio::select! {
            biased;
            () = stop.token().cancelled() => return Ok(()),
            () = tokio::time::sleep_until(next.min(expires)) => {}
        }
        let sent = Instant::now();
        if sent >= expires {
            tracing::warn!("no heartbeat got through for a whole lease ({lease:?}): giving the attempt up");
            stop.stop(Stop::LeaseExpired);
            return Ok(());
        }
        let limit = CALL_LIMIT.min(expires - sent);
        let answer = tokio::select! {
            biased;
            () = stop.token().cancelled() => return Ok(()),
            answer = tokio::time::timeout(limit, orchestrator.heartbeat(request.clone())) => answer,
        };
        match answer {
            Ok(Ok(answer)) if answer.cancelled => {
                stop.stop(if answer.training_ended { Stop::TrainingEnded } else { Stop::JobCancelled });
                return Ok(());
            }
            Ok(Ok(answer)) => {
                stop.set_others_wait(answer.others_wait);
                if answer.lease.is_some() {
                    lease = duration(answer.lease);
                }
                expires = sent + lease;
                next = sent + lease / 3;
                backoff.reset();
            }
            Ok(Err(error)) if error.kind() == Kind::Fenced => {
                tracing::warn!("fenced: {}", error.chain());
                stop.stop(Stop::Fenced);
                return Ok(());
            }
            Ok(Err(error)) => {
                tracing::warn!(code = %error.code, "a heartbeat was not answered: {}", error.chain());
                next = Instant::now() + backoff.wait();
            }
            Err(_) => {
                tracing::warn!("a heartbeat was not answered within {limit:?}");
                next = Instant::now() + backoff.wait();
            }
        }
    }
}

/// A wire duration within [`LEASE_BOUNDS`]; a missing one is 15 seconds.
fn duration(lease: Option<prost_types::Duration>) -> Duration {
    let lease = lease.and_then(|lease| Duration::try_from(lease).ok()).unwrap_or(Duration::from_secs(15));
    lease.clamp(LEASE_BOUNDS.0, LEASE_BOUNDS.1)
}
