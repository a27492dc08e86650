use std::sync::{
    Arc, Mutex, OnceLock, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use retort_artifact::{Store, prompts};
use retort_core::{
    Code, Error, Kind, Result,
    clock::{Clock as _, SystemClock},
    id::WorkerId,
    state::Split,
    wire::{split_to_proto, timestamp_to_proto},
};
use retort_proto as proto;
use tokio_util::sync::CancellationToken;

use crate::{
    Attempt,
    ports::{Events, Orchestrator},
    retry,
};

/// Largest prompt set a worker reads, bytes.
const MAX_PROMPT_SET_BYTES: u64 = 1 << 30;

/// Why an attempt was told to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    JobCancelled,
    /// The training that the attempt helped with is done.
    TrainingEnded,
    /// Another attempt has taken over.
    Fenced,
    /// No heartbeat got through for a whole lease, so another attempt may have taken over.
    LeaseExpired,
    /// This process was asked to stop.
    WorkerStopping,
}

impl Stop {
    pub fn error(self) -> Error {
        match self {
            Self::JobCancelled => Error::new(Code::JobCancelled, "the job was cancelled"),
            Self::TrainingEnded => Error::new(Code::TrainingEnded, "the training has ended"),
            Self::Fenced => Error::new(Code::AttemptFenced, "another attempt has taken over this task"),
            Self::LeaseExpired => Error::new(
                Code::AttemptFenced,
                "the lease ran out before the orchestrator could be reached, so another attempt may have taken over",
            ),
            Self::WorkerStopping => Error::new(Code::WorkerStopped, "the worker was stopped"),
        }
    }
}

/// Tells an attempt to stop, and why; the first reason stays.
#[derive(Clone, Debug, Default)]
pub struct StopSwitch {
    token: CancellationToken,
    reason: Arc<OnceLock<Stop>>,
    others_wait: Arc<AtomicBool>,
}

impl StopSwitch {
    pub fn stop(&self, why: Stop) {
        let _ = self.reason.set(why);
        self.token.cancel();
    }

    pub fn reason(&self) -> Option<Stop> {
        self.reason.get().copied()
    }

    pub fn token(&self) -> &CancellationToken {
        &self.token
    }

    /// Whether another task waits for this worker, as the last heartbeat said.
    pub fn set_others_wait(&self, others_wait: bool) {
        self.others_wait.store(others_wait, Ordering::Relaxed);
    }
}

/// The last prompt set read, by hash.
pub(crate) type PromptSetCache = Arc<Mutex<Option<(String, Arc<Vec<prompts::Row>>)>>>;

/// What a handler may touch while it works on one attempt.
#[derive(Clone)]
pub struct TaskContext {
    pub store: Store,
    pub worker_id: WorkerId,
    /// Fires when the attempt must stop; [`TaskContext::check`] says why.
    pub cancelled: CancellationToken,
    stop: StopSwitch,
    job_id: String,
    task_id: String,
    epoch: u64,
    orchestrator: Arc<dyn Orchestrator>,
    events: Arc<dyn Events>,
    prompt_sets: PromptSetCache,
}

impl TaskContext {
    /// The loop makes one an attempt; handlers' tests make their own, around stand-ins.
    pub fn new(
        claimed: &proto::Claimed,
        worker_id: WorkerId,
        store: Store,
        orchestrator: Arc<dyn Orchestrator>,
        events: Arc<dyn Events>,
        stop: StopSwitch,
    ) -> Self {
        Self {
            store,
            worker_id,
            cancelled: stop.token().clone(),
            stop,
            job_id: claimed.job_id.clone(),
            task_id: claimed.task_id.clone(),
            epoch: claimed.epoch,
            orchestrator,
            events,
            prompt_sets: PromptSetCache::default(),
        }
    }

    pub(crate) fn with_prompt_sets(mut self, cache: PromptSetCache) -> Self {
        self.prompt_sets = cache;
        self
    }

    /// `Err` (job-cancelled, training-ended, attempt-fenced or worker-stopped) once the attempt must stop. Cheap
    /// enough to ask between decode steps, from any thread.
    pub fn check(&self) -> Result<()> {
        match self.stop.reason() {
            Some(why) => Err(why.error()),
            None => Ok(()),
        }
    }

    /// Whether another task waits for this worker: an attempt that waits itself should make room, with
    /// `attempt-yielded`.
    pub fn others_wait(&self) -> bool {
        self.stop.others_wait.load(Ordering::Relaxed)
    }

    /// Sends an event of this attempt and waits until the broker has acknowledged it, for as long as
    /// the attempt lives: a broker that restarts meanwhile costs only time.
    pub async fn emit(&self, what: proto::worker_event::What) -> Result<()> {
        let event = self.event(what);
        let mut backoff = retry::network();
        loop {
            self.check()?;
            let sent = tokio::select! {
                biased;
                () = self.cancelled.cancelled() => continue,
                sent = self.events.send(&event) => sent,
            };
            match sent {
                Err(error) if error.kind() == Kind::Unavailable => {
                    tracing::warn!(code = %error.code, "an event could not be sent, trying again: {}", error.chain());
                    self.pause(backoff.wait()).await;
                }
                other => return other,
            }
        }
    }

    /// Sends an event that may be lost, such as progress: one try, for two seconds at most.
    pub async fn emit_lossy(&self, what: proto::worker_event::What) {
        let event = self.event(what);
        if self.check().is_err() {
            return;
        }
        let sent = tokio::time::timeout(std::time::Duration::from_secs(2), self.events.send(&event)).await;
        match sent {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!("progress was not sent: {}", error.chain()),
            Err(_) => tracing::debug!("progress was not sent: the broker took longer than two seconds"),
        }
    }

    /// Published shards of the attempt's job from index `from_shard` on; asks again while the
    /// orchestrator is away.
    pub async fn list_published_shards(
        &self,
        split: Split,
        from_shard: u32,
    ) -> Result<proto::ListPublishedShardsResponse> {
        let request = proto::ListPublishedShardsRequest {
            job_id: self.job_id.clone(),
            split: split_to_proto(split) as i32,
            from_shard,
        };
        self.ask(|| self.orchestrator.list_published_shards(request.clone())).await
    }

    /// A published shard of any job with the content that `work_sha256` names; asks again while the
    /// orchestrator is away.
    pub async fn find_shard(&self, work_sha256: &str) -> Result<proto::FindShardResponse> {
        let request = proto::FindShardRequest {
            job_id: self.job_id.clone(),
            task_id: self.task_id.clone(),
            epoch: self.epoch,
            work_sha256: work_sha256.to_owned(),
        };
        self.ask(|| self.orchestrator.find_shard(request.clone())).await
    }

    /// Has a published shard withdrawn and computed again; asks again while the orchestrator is away.
    pub async fn report_corrupt_shard(&self, shard: u32, epoch: u64, reason: &str) -> Result<()> {
        let request = proto::ReportCorruptShardRequest {
            job_id: self.job_id.clone(),
            shard,
            epoch,
            worker_id: self.worker_id.as_str().to_owned(),
            reason: reason.chars().take(1000).collect(),
        };
        self.ask(|| self.orchestrator.report_corrupt_shard(request.clone())).await
    }

    /// The job's rows in the order of the stored prompt set, verified against its hash. The last
    /// set read is kept, so shards of one job read it once.
    pub async fn prompt_set(&self, attempt: &Attempt) -> Result<Arc<Vec<prompts::Row>>> {
        let claimed = &attempt.claimed;
        {
            let cache = self.prompt_sets.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((sha256, rows)) = cache.as_ref()
                && *sha256 == claimed.prompt_set_sha256
            {
                return Ok(Arc::clone(rows));
            }
        }
        let bytes =
            self.store.get_verified(&claimed.prompt_set_key, &claimed.prompt_set_sha256, MAX_PROMPT_SET_BYTES).await?;
        let rows = Arc::new(prompts::parse(&claimed.prompt_set_key, &bytes)?);
        let mut cache = self.prompt_sets.lock().unwrap_or_else(PoisonError::into_inner);
        *cache = Some((claimed.prompt_set_sha256.clone(), Arc::clone(&rows)));
        Ok(rows)
    }

    pub(crate) fn event(&self, what: proto::worker_event::What) -> proto::WorkerEvent {
        proto::WorkerEvent {
            event_id: uuid::Uuid::now_v7().simple().to_string(),
            time: Some(timestamp_to_proto(SystemClock.now_ms())),
            job_id: self.job_id.clone(),
            task_id: self.task_id.clone(),
            epoch: self.epoch,
            worker_id: self.worker_id.as_str().to_owned(),
            what: Some(what),
        }
    }

    async fn ask<T, F: Future<Output = Result<T>>>(&self, call: impl Fn() -> F) -> Result<T> {
        let mut backoff = retry::network();
        loop {
            self.check()?;
            let answer = tokio::select! {
                biased;
                () = self.cancelled.cancelled() => continue,
                answer = call() => answer,
            };
            match answer {
                Err(error) if error.kind() == Kind::Unavailable => {
                    tracing::debug!("the orchestrator does not answer, asking again: {}", error.chain());
                    self.pause(backoff.wait()).await;
                }
                other => return other,
            }
        }
    }

    async fn pause(&self, wait: std::time::Duration) {
        tokio::select! {
            () = self.cancelled.cancelled() => {}
            () = tokio::time::sleep(wait) => {}
        }
    }
}
