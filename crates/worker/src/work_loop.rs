//! One task after another, each from its record to its commit; what a task needs besides its handler goes
//! on beside the next.

use std::{sync::Arc, time::Duration};

use futures::future::BoxFuture;
use retort_artifact::Store;
use retort_core::{Code, Error, Kind, Result, id::WorkerId, task_group::TaskGroup, wire::error_to_proto};
use retort_proto::{self as proto, claim_task_response::Answer, worker_event::What};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use crate::{
    Attempt, Handler, Rest, Stop, StopSwitch, TaskContext,
    context::PromptSetCache,
    lease,
    ports::{Events, Orchestrator, Tasks},
    retry::{self, Backoff},
};

/// After being told to stop, the handler has this long; then its work is left where it is.
const HANDLER_GRACE: Duration = Duration::from_millis(2500);
/// While stopping, the last event may take this long, and so may the commit.
const GOODBYE: Duration = Duration::from_millis(1000);
/// A worker whose handler has come to its end waits this long for what is left of the task before.
const LAST_REST: Duration = Duration::from_secs(10);
/// While stopping, leaving the consumer group may take this long.
const LEAVING: Duration = Duration::from_millis(400);
/// A task that another worker keeps alive for longer than this is left to it: should that worker die
/// later, the orchestrator publishes the task again.
const PATIENCE: Duration = Duration::from_secs(60);
/// A record is worth any task of its topic: while another worker holds the one it names, others may be published.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// Waits after a failure of the surroundings (full disk, store away), so that a task's attempts are
/// not burnt within a second.
const COOL_OFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// Takes records, one at a time; what a task still needs once its handler is free goes on beside the next.
pub(crate) struct WorkLoop<T, H> {
    desk: Desk<T>,
    handler: H,
}

/// All that an attempt needs besides its handler.
struct Desk<T> {
    worker_id: WorkerId,
    tasks: T,
    orchestrator: Arc<dyn Orchestrator>,
    events: Arc<dyn Events>,
    store: Store,
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

/// What became of a record as far as the handler goes.
enum Begun<'a> {
    Over(Outcome),
    /// The handler is free; this is what is left.
    Later(BoxFuture<'a, Outcome>),
}

/// The record whose end is still to come while the next is worked on, if there is one.
struct Last<'a, D> {
    running: Option<BoxFuture<'a, (D, Outcome)>>,
    over: Option<(D, Outcome)>,
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
        let desk = Desk { worker_id, tasks, orchestrator, events, store, prompt_sets: PromptSetCache::default() };
        Self { desk, handler }
    }

    /// Until `shutdown`; `Err` only when the task topic can no longer be read, or the handler has come to
    /// its end.
    pub(crate) async fn run(self, shutdown: &CancellationToken) -> Result<()> {
        let Self { desk, mut handler } = self;
        let ended = desk.serve(&mut handler, shutdown).await;
        if tokio::time::timeout(LEAVING, desk.tasks.close()).await.is_err() {
            tracing::debug!("the broker did not answer; it will notice by itself that this worker is gone");
        }
        ended
    }
}

impl<T: Tasks> Desk<T> {
    async fn serve(&self, handler: &mut impl Handler, shutdown: &CancellationToken) -> Result<()> {
        let mut cool_off = Backoff::new(COOL_OFF.0, COOL_OFF.1);
        let mut intake = retry::network();
        let mut last = Last { running: None, over: None };
        let mut again = None;
        let mut ended = Ok(());
        'records: while !shutdown.is_cancelled() {
            let next = match again.take() {
                Some(delivery) => Ok(Some(delivery)),
                // It came to its end during a pause.
                None if last.over.is_some() => Ok(None),
                None => tokio::select! {
                    biased;
                    () = shutdown.cancelled() => break,
                    why = handler.defunct() => {
                        ended = Err(why);
                        break;
                    }
                    () = last.ended() => Ok(None),
                    next = self.tasks.next() => next.map(Some),
                },
            };
            let mine = match next {
                Ok(None) => None,
                Ok(Some(delivery)) => {
                    intake.reset();
                    let begun = last.beside(self.begin(&delivery, handler, shutdown)).await;
                    // Only one is on its way to its end.
                    last.end().await;
                    match begun {
                        Begun::Over(outcome) => {
                            self.commit(&delivery, &outcome, shutdown).await;
                            Some((delivery, outcome))
                        }
                        Begun::Later(rest) => {
                            last.running = Some(Box::pin(async move {
                                let outcome = rest.await;
                                self.commit(&delivery, &outcome, shutdown).await;
                                (delivery, outcome)
                            }));
                            None
                        }
                    }
                }
                Err(error) if error.kind() == Kind::Unavailable => {
                    tracing::warn!(code = %error.code, "no tasks can be read, trying again: {}", error.chain());
                    last.beside(pause(intake.wait(), shutdown)).await;
                    None
                }
                Err(error) => {
                    ended = Err(error);
                    break;
                }
            };
            for (delivery, outcome) in last.over.take().into_iter().chain(mine) {
                match outcome {
                    Outcome::Settled => cool_off.reset(),
                    Outcome::SettledBadly => tokio::select! {
                        () = last.beside(pause(cool_off.wait(), shutdown)) => {}
                        _ = handler.defunct() => {}
                    },
                    Outcome::Again => again = Some(delivery),
                    Outcome::Left => break 'records,
                }
            }
        }
        // Told to stop, it has its own time to come to an end; else this is it.
        if tokio::time::timeout(LAST_REST, last.end()).await.is_err() {
            tracing::warn!("a task was not reported in time; it is given again once its lease has run out");
        }
        ended
    }

    /// Claims with the record, and does what the claim gave, mostly another task than the record names, as
    /// far as it needs the handler.
    async fn begin<'a>(
        &'a self,
        delivery: &T::Delivery,
        handler: &mut impl Handler,
        shutdown: &'a CancellationToken,
    ) -> Begun<'a> {
        let message = self.tasks.message(delivery);
        let named = task_span(&message.job_id, &message.task_id);
        loop {
            let begun = match self.claim(&message.task_id, shutdown).instrument(named.clone()).await {
                Claim::Mine(claimed, at) => {
                    let span = task_span(&claimed.job_id, &claimed.task_id);
                    self.attempt(*claimed, at, handler, shutdown).instrument(span).await
                }
                Claim::Nothing => Begun::Over(Outcome::Settled),
                Claim::Stopping => Begun::Over(Outcome::Left),
            };
            if !matches!(begun, Begun::Over(Outcome::Again)) {
                return begun;
            }
        }
    }

    async fn attempt<'a>(
        &'a self,
        claimed: proto::Claimed,
        claimed_at: Instant,
        handler: &mut impl Handler,
        shutdown: &'a CancellationToken,
    ) -> Begun<'a> {
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
            Ok(attempt) => until_stopped(handler.run(attempt, &cx), &stop, shutdown).await,
            Err(error) => Err(error),
        };
        let held = Held { cx, stop, background };
        match result {
            Ok(Rest::After(rest)) => Begun::Later(Box::pin(
                async move {
                    let result = until_stopped(rest, &held.stop, shutdown).await;
                    self.settle(result, held, shutdown).await
                }
                .in_current_span(),
            )),
            Ok(Rest::Nothing) => Begun::Over(self.settle(Ok(()), held, shutdown).await),
            Err(error) => Begun::Over(self.settle(Err(error), held, shutdown).await),
        }
    }

    /// Reports what came of an attempt, and lets go of its lease.
    async fn settle(&self, result: Result<()>, held: Held, shutdown: &CancellationToken) -> Outcome {
        let outcome = self.report(result, &held.cx, &held.stop, shutdown).await;
        // The keeper ends with the switch; a result that was reported needs no lease any more.
        held.stop.token().cancel();
        if let Err(error) = held.background.join().await {
            tracing::error!("the heartbeat failed: {}", error.chain());
        }
        outcome
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
            (_, Some(why @ Stop::TrainingEnded)) => {
                tracing::info!("done: {}", why.error().message);
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
            Err(_) if matches!(stop.reason(), Some(Stop::Fenced | Stop::JobCancelled | Stop::TrainingEnded)) => {
                Outcome::Settled
            }
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
        let mut told = false;
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
                    let wait = Duration::try_from(wait).unwrap_or(ASK_AGAIN);
                    if !std::mem::replace(&mut told, true) {
                        tracing::info!("another attempt holds the lease for {wait:?} more; asking again until then");
                    }
                    wait.clamp(Duration::from_millis(50), ASK_AGAIN)
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
    async fn commit(&self, delivery: &T::Delivery, outcome: &Outcome, shutdown: &CancellationToken) {
        if matches!(outcome, Outcome::Again | Outcome::Left) {
            return;
        }
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

/// What an attempt has until it is over.
struct Held {
    cx: TaskContext,
    stop: StopSwitch,
    background: TaskGroup,
}

impl<D> Last<'_, D> {
    /// `work`, while the last record comes to its end beside it.
    async fn beside<R>(&mut self, work: impl Future<Output = R>) -> R {
        tokio::pin!(work);
        loop {
            tokio::select! {
                biased;
                done = &mut work => return done,
                () = self.ended() => {}
            }
        }
    }

    /// Until the last record has come to its end just now; for ever where there is none on its way.
    async fn ended(&mut self) {
        match &mut self.running {
            Some(running) => {
                self.over = Some(running.await);
                self.running = None;
            }
            None => std::future::pending().await,
        }
    }

    /// Until no record is on its way.
    async fn end(&mut self) {
        if self.running.is_some() {
            self.ended().await;
        }
    }
}

/// Waits for `work`; after `shutdown` it has [`HANDLER_GRACE`] to come to an end.
async fn until_stopped<R>(
    work: impl Future<Output = Result<R>>,
    stop: &StopSwitch,
    shutdown: &CancellationToken,
) -> Result<R> {
    tokio::pin!(work);
    tokio::select! {
        result = &mut work => return result,
        () = shutdown.cancelled() => stop.stop(Stop::WorkerStopping),
    }
    match tokio::time::timeout(HANDLER_GRACE, work).await {
        Ok(result) => result,
        Err(_) => Err(Stop::WorkerStopping.error()),
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
