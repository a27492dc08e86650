//! One task after another, each from its record to its commit.

use std::{sync::Arc, time::Duration};

use retort_artifact::Store;
use retort_core::{Code, Error, Kind, Result, id::WorkerId, task_group::TaskGroup, wire::error_to_proto};
use retort_proto::{self as proto, claim_task_response::Answer, worker_event::What};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use crate::{
    Attempt, Handler, Stop, StopSwitch, TaskContext,
    context::PromptSetCache,
    lease,
    ports::{Events, Orchestrator, Tasks},
    retry::{self, Backoff},
};

/// After being told to stop, the handler has this long; then its work is left where it is.
const HANDLER_GRACE: Duration = Duration::from_millis(2500);
/// While stopping, the last event may take this long, and so may the commit.
const GOODBYE: Duration = Duration::from_millis(1000);
/// While stopping, leaving the consumer group may take this long.
const LEAVING: Duration = Duration::from_millis(400);
/// A task that another worker keeps alive for longer than this is left to it: should that worker die
/// later, the orchestrator publishes the task again.
const PATIENCE: Duration = Duration::from_secs(60);
/// Waits after a failure of the surroundings (full disk, store away), so that a task's attempts are
/// not burnt within a second.
const COOL_OFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

pub(crate) struct WorkLoop<T, H> {
    worker_id: WorkerId,
    tasks: T,
    orchestrator: Arc<dyn Orchestrator>,
    events: Arc<dyn Events>,
    store: Store,
    handler: H,
    prompt_sets: PromptSetCache,
}

/// What became of a record.
enum Outcome {
    /// Nothing of it is left to do here: commit.
    Settled,
    /// Settled, but the surroundings are at fault: wait before the next.
    SettledBadly,
    /// The lease was lost without anybody else in sight: claim again.
    Again,
    /// Stopping, and the record must be delivered again.
    Left,
}

impl<T: Tasks, H: Handler> WorkLoop<T, H> {
    pub(crate) fn new(
        worker_id: WorkerId,
        tasks: T,
        orchestrator: Arc<dyn Orchestrator>,
        events: Arc<dyn Events>,
        store: Store,
        handler: H,
    ) -> Self {
        Self { worker_id, tasks, orchestrator, events, store, handler, prompt_sets: PromptSetCache::default() }
    }

    /// Until `shutdown`; `Err` only when the task topic can no longer be read, or the handler has come to
    /// its end.
    pub(crate) async fn run(mut self, shutdown: &CancellationToken) -> Result<()> {
        let mut cool_off = Backoff::new(COOL_OFF.0, COOL_OFF.1);
        let mut intake = retry::network();
        let mut ended = Ok(());
        while !shutdown.is_cancelled() {
            let next = tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                why = self.handler.defunct() => {
                    ended = Err(why);
                    break;
                }
                next = self.tasks.next() => next,
            };
            let delivery = match next {
                Ok(delivery) => delivery,
                Err(error) if error.kind() == Kind::Unavailable => {
                    tracing::warn!(code = %error.code, "no tasks can be read, trying again: {}", error.chain());
                    pause(intake.wait(), shutdown).await;
                    continue;
                }
                Err(error) => return Err(error),
            };
            intake.reset();
            let message = self.tasks.message(&delivery).clone();
            let span = task_span(&message.job_id, &message.task_id);
            let outcome = loop {
                match self.settle(&message, shutdown).await {
                    Outcome::Again => {}
                    other => break other,
                }
            };
            if matches!(outcome, Outcome::Left) {
                break;
            }
            self.commit(&delivery, shutdown).instrument(span).await;
            match outcome {
                Outcome::SettledBadly => tokio::select! {
                    () = pause(cool_off.wait(), shutdown) => {}
                    _ = self.handler.defunct() => {}
                },
                _ => cool_off.reset(),
            }
        }
        if tokio::time::timeout(LEAVING, self.tasks.close()).await.is_err() {
            tracing::debug!("the broker did not answer; it will notice by itself that this worker is gone");
        }
        ended
    }

    /// Claims with the record, and does what the claim gave: mostly another task than the record names.
    async fn settle(&mut self, message: &proto::TaskMessage, shutdown: &CancellationToken) -> Outcome {
        let named = task_span(&message.job_id, &message.task_id);
        match self.claim(&message.task_id, shutdown).instrument(named).await {
            Claim::Mine(claimed, at) => {
                let span = task_span(&claimed.job_id, &claimed.task_id);
                self.attempt(*claimed, at, shutdown).instrument(span).await
            }
            Claim::Nothing => Outcome::Settled,
            Claim::Stopping => Outcome::Left,
        }
    }

    async fn attempt(&mut self, claimed: proto::Claimed, claimed_at: Instant, shutdown: &CancellationToken) -> Outcome {
        let stop = StopSwitch::default();
        let cx = TaskContext::new(
            &claimed,
            self.worker_id.clone(),
            self.store.clone(),
            Arc::clone(&self.orchestrator),
            Arc::clone(&self.events),
            stop.clone(),
        )
        .with_prompt_sets(Arc::clone(&self.prompt_sets));
        tracing::info!(epoch = claimed.epoch, "claimed");

        let mut background = TaskGroup::new(CancellationToken::new());
        let heartbeat = proto::HeartbeatRequest {
            task_id: claimed.task_id.clone(),
            epoch: claimed.epoch,
            worker_id: self.worker_id.as_str().to_owned(),
        };
        let keeper = lease::keep(Arc::clone(&self.orchestrator), heartbeat, claimed.lease, claimed_at, stop.clone());
        background.spawn("heartbeat", keeper.in_current_span());

        let result = match Attempt::try_from(claimed) {
            Ok(attempt) => self.work(attempt, &cx, &stop, shutdown).await,
            Err(error) => Err(error),
        };
        let outcome = self.report(result, &cx, &stop, shutdown).await;
        // The keeper ends with the switch; a result that was reported needs no lease any more.
        stop.token().cancel();
        if let Err(error) = background.join().await {
            tracing::error!("the heartbeat failed: {}", error.chain());
        }
        outcome
    }

    /// Runs the handler; after `shutdown` it has [`HANDLER_GRACE`] to come to an end.
    async fn work(
        &mut self,
        attempt: Attempt,
        cx: &TaskContext,
        stop: &StopSwitch,
        shutdown: &CancellationToken,
    ) -> Result<()> {
        let handler = self.handler.run(attempt, cx);
        tokio::pin!(handler);
        tokio::select! {
            result = &mut handler => return result,
            () = shutdown.cancelled() => stop.stop(Stop::WorkerStopping),
        }
        match tokio::time::timeout(HANDLER_GRACE, handler).await {
            Ok(result) => result,
            Err(_) => Err(Stop::WorkerStopping.error()),
        }
    }

    /// Emits what must be known of `result` and says what to do with the record.
    async fn report(
        &self,
        result: Result<()>,
        cx: &TaskContext,
        stop: &StopSwitch,
        shutdown: &CancellationToken,
    ) -> Outcome {
        let error = match (result, stop.reason()) {
            // The result event is acknowledged, so it counts even if a stop came in between.
            (Ok(()), None | Some(Stop::WorkerStopping)) => {
                tracing::info!("done");
                return Outcome::Settled;
            }
            (_, Some(why @ (Stop::Fenced | Stop::JobCancelled))) => {
                tracing::info!("left: {}", why.error().message);
                return Outcome::Settled;
            }
            (_, Some(Stop::LeaseExpired)) => return Outcome::Again,
            (Err(_), Some(Stop::WorkerStopping)) => Stop::WorkerStopping.error(),
            (Err(error), None) => error,
        };
        if matches!(error.kind(), Kind::Fenced | Kind::Cancelled) {
            tracing::info!("left: {}", error.chain());
            return Outcome::Settled;
        }
        if error.code == Code::WorkerStopped {
            tracing::info!("stopping; the task is handed back");
        } else if error.code == Code::AttemptYielded {
            tracing::info!("handed back: {}", error.message);
        } else {
            tracing::error!(code = %error.code, "failed: {}", error.chain());
        }
        let what = What::TaskFailed(proto::TaskFailed {
            error: Some(error_to_proto(&error)),
            retryable: error.is_retryable(),
        });
        let sent = if stop.reason() == Some(Stop::WorkerStopping) {
            self.say_goodbye(cx, what).await
        } else {
            tokio::select! {
                biased;
                sent = cx.emit(what.clone()) => sent,
                () = shutdown.cancelled() => self.say_goodbye(cx, what).await,
            }
        };
        match sent {
            Ok(()) if error.code == Code::AttemptYielded => Outcome::Settled,
            Ok(()) if matches!(error.kind(), Kind::Unavailable | Kind::Exhausted | Kind::Internal) => {
                Outcome::SettledBadly
            }
            Ok(()) => Outcome::Settled,
            // Fenced or cancelled while reporting: nothing to say any more.
            Err(_) if matches!(stop.reason(), Some(Stop::Fenced | Stop::JobCancelled)) => Outcome::Settled,
            Err(_) if stop.reason() == Some(Stop::LeaseExpired) => Outcome::Again,
            Err(error) => {
                tracing::warn!("the failure could not be reported: {}", error.chain());
                // Uncommitted: the record comes again after a restart, and the lease runs out by itself.
                if shutdown.is_cancelled() { Outcome::Left } else { Outcome::Again }
            }
        }
    }

    /// One try within [`GOODBYE`], past the stopped switch.
    async fn say_goodbye(&self, cx: &TaskContext, what: What) -> Result<()> {
        let event = cx.event(what);
        match tokio::time::timeout(GOODBYE, self.events.send(&event)).await {
            Ok(sent) => sent,
            Err(_) => Err(Stop::WorkerStopping.error()),
        }
    }

    async fn claim(&self, task_id: &str, shutdown: &CancellationToken) -> Claim {
        let request =
            proto::ClaimTaskRequest { task_id: task_id.to_owned(), worker_id: self.worker_id.as_str().to_owned() };
        let mut backoff = retry::network();
        let asked_first = Instant::now();
        loop {
            let sent = Instant::now();
            let answer = tokio::select! {
                biased;
                () = shutdown.cancelled() => return Claim::Stopping,
                answer = self.orchestrator.claim(request.clone()) => answer,
            };
            let wait = match answer.map(|answer| answer.answer) {
                Ok(Some(Answer::Claimed(claimed))) => return Claim::Mine(Box::new(claimed), sent),
                Ok(Some(Answer::NotClaimable(why))) => {
                    let reason = proto::not_claimable::Reason::try_from(why.reason).unwrap_or_default();
                    tracing::info!(reason = reason.as_str_name(), "nothing to do");
                    return Claim::Nothing;
                }
                Ok(Some(Answer::RetryAfter(wait))) => {
                    if asked_first.elapsed() > PATIENCE {
                        tracing::info!("another worker keeps this task alive; leaving it");
                        return Claim::Nothing;
                    }
                    let wait = Duration::try_from(wait).unwrap_or(Duration::from_secs(1));
                    tracing::info!("another attempt holds the lease; asking again in {wait:?}");
                    wait.clamp(Duration::from_millis(50), Duration::from_secs(30))
                }
                Ok(None) => {
                    tracing::error!(
                        "the orchestrator's answer to a claim is unknown here; is this worker older than it?"
                    );
                    return Claim::Nothing;
                }
                Err(error) if error.kind() == Kind::Invalid || error.kind() == Kind::NotFound => {
                    tracing::error!(code = %error.code, "the claim was refused: {}", error.chain());
                    return Claim::Nothing;
                }
                Err(error) => {
                    tracing::warn!(code = %error.code, "the claim was not answered, asking again: {}", error.chain());
                    backoff.wait()
                }
            };
            pause(wait, shutdown).await;
        }
    }

    /// Tries for a while; a record whose commit is lost is delivered again, and its claim then
    /// answers that there is nothing to do.
    async fn commit(&self, delivery: &T::Delivery, shutdown: &CancellationToken) {
        let mut backoff = retry::network();
        for _ in 0..8 {
            let limit = if shutdown.is_cancelled() { GOODBYE } else { Duration::from_secs(10) };
            let error = match tokio::time::timeout(limit, self.tasks.commit(delivery)).await {
                Ok(Ok(())) => return,
                Ok(Err(error)) => error,
                Err(_) => Error::new(Code::BusUnavailable, format!("no answer within {limit:?}")),
            };
            tracing::warn!(code = %error.code, "the record could not be committed: {}", error.chain());
            if shutdown.is_cancelled() || error.kind() != Kind::Unavailable {
                return;
            }
            pause(backoff.wait(), shutdown).await;
        }
    }
}

fn task_span(job_id: &str, task_id: &str) -> tracing::Span {
    let short = task_id.split_once('/').map_or(task_id, |(_, short)| short);
    tracing::info_span!("task", job = %job_id, task = %short)
}

enum Claim {
    Mine(Box<proto::Claimed>, Instant),
    Nothing,
    Stopping,
}

async fn pause(wait: Duration, shutdown: &CancellationToken) {
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = tokio::time::sleep(wait) => {}
    }
}
