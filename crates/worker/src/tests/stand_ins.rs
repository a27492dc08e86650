//! An orchestrator, a broker and a task topic in memory, which can be away for a while.

use std::{
    collections::{HashSet, VecDeque},
    ops::Range,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use retort_artifact::Store;
use retort_core::{Code, Error, Result, id::WorkerId, spec, wire};
use retort_proto::{self as proto, claim_task_response::Answer, worker_event::What};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    Handler, StopSwitch, TaskContext,
    ports::{Events, Orchestrator, Tasks},
    work_loop::WorkLoop,
};

const JOB: &str = "0190a5b4c6d87e8fa0b1c2d3e4f50617";

pub(super) struct Bench {
    world: Arc<World>,
    shutdown: CancellationToken,
    folder: tempfile::TempDir,
}

struct World {
    started: Instant,
    state: Mutex<State>,
    shutdown: CancellationToken,
    work: tokio::sync::Notify,
}

#[derive(Default)]
struct State {
    log: Vec<String>,
    claims: VecDeque<Answer>,
    heartbeats: VecDeque<Result<proto::HeartbeatResponse, Code>>,
    heartbeats_seen: u32,
    events: Vec<proto::WorkerEvent>,
    tries: u32,
    ids_tried: HashSet<String>,
    deliveries: VecDeque<u64>,
    stop_after_commits: Option<usize>,
    commits: usize,
    orchestrator_away: Range<Duration>,
    broker_away: Range<Duration>,
}

impl Bench {
    pub(super) fn new() -> Self {
        let shutdown = CancellationToken::new();
        let world = World {
            started: Instant::now(),
            state: Mutex::default(),
            shutdown: shutdown.clone(),
            work: tokio::sync::Notify::new(),
        };
        Self { world: Arc::new(world), shutdown, folder: tempfile::tempdir().unwrap() }
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.world.state.lock().unwrap());
    }

    pub(super) fn answer_claims(&self, answers: impl IntoIterator<Item = Answer>) {
        self.set(|state| state.claims.extend(answers));
    }

    /// `Ok(cancelled)` or an error; beyond the list every heartbeat is fine.
    pub(super) fn answer_heartbeats(&self, answers: impl IntoIterator<Item = Result<proto::HeartbeatResponse, Code>>) {
        self.set(|state| state.heartbeats.extend(answers));
    }

    pub(super) fn deliver(&self, records: u64) {
        self.set(|state| state.deliveries.extend(0..records));
    }

    pub(super) fn deliver_and_stop_when_done(&self, records: u64) {
        self.deliver(records);
        self.set(|state| state.stop_after_commits = Some(records as usize));
    }

    pub(super) fn stop_after(&self, time: Duration) {
        let shutdown = self.shutdown.clone();
        tokio::spawn(async move {
            tokio::time::sleep(time).await;
            shutdown.cancel();
        });
    }

    pub(super) fn orchestrator_away_for(&self, time: Duration) {
        self.orchestrator_away_between(Duration::ZERO, time);
    }

    pub(super) fn orchestrator_away_between(&self, from: Duration, to: Duration) {
        self.set(|state| state.orchestrator_away = from..to);
    }

    pub(super) fn broker_away_between(&self, from: Duration, to: Duration) {
        self.set(|state| state.broker_away = from..to);
    }

    pub(super) async fn run(&self, handler: impl Handler) -> Result<()> {
        let world = Arc::clone(&self.world);
        let events: Arc<dyn Events> = world.clone();
        WorkLoop::new(worker_id(), Topic(world.clone()), world, events, self.store(), handler).run(&self.shutdown).await
    }

    pub(super) fn context(&self, claim: &proto::Claimed) -> TaskContext {
        let world = Arc::clone(&self.world);
        let events: Arc<dyn Events> = world.clone();
        TaskContext::new(claim, worker_id(), self.store(), world, events, StopSwitch::default())
    }

    fn store(&self) -> Store {
        Store::open(self.folder.path().to_str().unwrap()).unwrap()
    }

    pub(super) fn log(&self) -> Vec<String> {
        self.world.state.lock().unwrap().log.clone()
    }

    pub(super) fn events(&self) -> Vec<proto::WorkerEvent> {
        self.world.state.lock().unwrap().events.clone()
    }

    pub(super) fn heartbeats(&self) -> u32 {
        self.world.state.lock().unwrap().heartbeats_seen
    }

    pub(super) fn tries(&self) -> u32 {
        self.world.state.lock().unwrap().tries
    }

    pub(super) fn event_ids_tried(&self) -> usize {
        self.world.state.lock().unwrap().ids_tried.len()
    }
}

fn worker_id() -> WorkerId {
    WorkerId::from("teacher-test".to_owned())
}

impl World {
    fn orchestrator(&self) -> Result<std::sync::MutexGuard<'_, State>> {
        let state = self.state.lock().unwrap();
        if state.orchestrator_away.contains(&self.started.elapsed()) {
            return Err(Error::new(Code::OrchestratorUnavailable, "away"));
        }
        Ok(state)
    }

    fn broker(&self) -> Result<std::sync::MutexGuard<'_, State>> {
        let state = self.state.lock().unwrap();
        if state.broker_away.contains(&self.started.elapsed()) {
            return Err(Error::new(Code::BusUnavailable, "away"));
        }
        Ok(state)
    }
}

#[async_trait]
impl Orchestrator for World {
    async fn claim(&self, request: proto::ClaimTaskRequest) -> Result<proto::ClaimTaskResponse> {
        assert_eq!(request.worker_id, "teacher-test");
        let mut state = self.orchestrator()?;
        state.log.push("claim".to_owned());
        let answer = state.claims.pop_front().expect("one claim more than the test foresees");
        Ok(proto::ClaimTaskResponse { answer: Some(answer) })
    }

    async fn heartbeat(&self, _: proto::HeartbeatRequest) -> Result<proto::HeartbeatResponse> {
        let mut state = self.orchestrator()?;
        state.heartbeats_seen += 1;
        let answer = state.heartbeats.pop_front().unwrap_or_else(|| Ok(proto::HeartbeatResponse::default()));
        answer.map_err(|code| Error::new(code, "the test wants it so"))
    }

    async fn list_published_shards(
        &self,
        request: proto::ListPublishedShardsRequest,
    ) -> Result<proto::ListPublishedShardsResponse> {
        assert_eq!((request.job_id.as_str(), request.from_shard), (JOB, 3));
        let _here = self.orchestrator()?;
        Ok(proto::ListPublishedShardsResponse { shards: vec![], complete: true })
    }

    async fn find_shard(&self, request: proto::FindShardRequest) -> Result<proto::FindShardResponse> {
        assert_eq!((request.job_id.as_str(), request.task_id), (JOB, task()));
        let _here = self.orchestrator()?;
        Ok(proto::FindShardResponse::default())
    }

    async fn report_corrupt_shard(&self, _: proto::ReportCorruptShardRequest) -> Result<()> {
        self.orchestrator().map(|_| ())
    }
}

#[async_trait]
impl Events for World {
    async fn send(&self, event: &proto::WorkerEvent) -> Result<()> {
        {
            let mut state = self.state.lock().unwrap();
            state.tries += 1;
            state.ids_tried.insert(event.event_id.clone());
        }
        let mut state = self.broker()?;
        let what = match event.what.as_ref().unwrap() {
            What::TaskFailed(_) => "task_failed",
            What::ShardProgress(_) => "shard_progress",
            _ => "other",
        };
        assert_eq!(event.job_id, JOB);
        state.log.push(format!("event {what} epoch {}", event.epoch));
        state.events.push(event.clone());
        Ok(())
    }
}

struct Topic(Arc<World>);

pub(super) struct Record {
    message: proto::TaskMessage,
    offset: u64,
}

#[async_trait]
impl Tasks for Topic {
    type Delivery = Record;

    fn message<'a>(&self, record: &'a Record) -> &'a proto::TaskMessage {
        &record.message
    }

    async fn next(&self) -> Result<Record> {
        loop {
            let offset = self.0.state.lock().unwrap().deliveries.pop_front();
            if let Some(offset) = offset {
                let message =
                    proto::TaskMessage { task_id: task(), job_id: JOB.to_owned(), kind: proto::TaskKind::Shard as i32 };
                return Ok(Record { message, offset });
            }
            self.0.work.notified().await;
        }
    }

    async fn commit(&self, record: &Record) -> Result<()> {
        let mut state = self.0.broker()?;
        state.log.push(format!("commit {}", record.offset));
        state.commits += 1;
        if state.stop_after_commits == Some(state.commits) {
            self.0.shutdown.cancel();
        }
        Ok(())
    }

    async fn close(self) {}
}

fn task() -> String {
    format!("{JOB}/shard-00002")
}

pub(super) fn claimed(epoch: u64, lease_seconds: f64) -> Answer {
    let spec = spec::parse_yaml(
        "spec.yaml",
        "name: test\nprompts: {path: p.jsonl}\nteacher: {model: /teacher}\nstudent: {init: {prune: {layers: 2}}}\n",
    )
    .unwrap();
    Answer::Claimed(proto::Claimed {
        task_id: task(),
        job_id: JOB.to_owned(),
        epoch,
        lease: Some(duration(lease_seconds)),
        spec: Some(wire::job_spec_to_proto(&spec)),
        prompt_set_key: "prompts/x.jsonl".to_owned(),
        prompt_set_sha256: "x".to_owned(),
        task: Some(proto::claimed::Task::Shard(proto::ShardTask {
            shard: 2,
            split: proto::Split::Train as i32,
            first_row: 0,
            rows: 4,
        })),
    })
}

pub(super) fn not_claimable() -> Answer {
    Answer::NotClaimable(proto::NotClaimable { reason: proto::not_claimable::Reason::Done as i32 })
}

pub(super) fn retry_after(seconds: f64) -> Answer {
    Answer::RetryAfter(duration(seconds))
}

pub(super) fn progress(target_tokens: u64) -> What {
    What::ShardProgress(proto::ShardProgress { target_tokens, seconds: 1.0 })
}

fn duration(seconds: f64) -> prost_types::Duration {
    wire::duration_to_proto(Duration::from_secs_f64(seconds))
}
