use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use bytes::Bytes;
use retort_artifact::{
    Store, paths, sha256_hex,
    soft_targets::{self, Header, Position, Sequence},
};
use retort_core::{
    Result,
    id::WorkerId,
    random::{Counter, Purpose},
    spec::{self, Codec, JobSpec, SoftTargets},
    wire::job_spec_to_proto,
};
use retort_proto::{self as proto, PublishedShard, claimed::Task, worker_event::What};
use retort_worker::{
    Attempt, Handler as _, Stop, StopSwitch, TaskContext,
    ports::{Events, Orchestrator},
};
use tch::{Device, Kind};

use crate::{Peers, Settings, Student, Teacher, Threads, init::tests::tiny_teacher};

pub(crate) const JOB: &str = "0190a5b4c6d87e8fa0b1c2d3e4f50617";
pub(crate) const TRAIN_SHARDS: u32 = 3;
pub(crate) const HELD_OUT_SHARDS: u32 = 2;
const SHARD_ROWS: u64 = 4;
/// The last training shard is not full.
const TRAIN_ROWS: u64 = 11;
const VOCAB: u32 = 40;
const PASSES: u32 = 12;
const BATCH_ROWS: u32 = 3;
pub(crate) const STEPS: u32 = PASSES * 4;

/// A store, a teacher, and who stands in for orchestrator and broker.
pub(crate) struct World {
    pub(crate) store: Store,
    pub(crate) teacher: Teacher,
    /// Of the shards published from here on.
    pub(crate) header: Header,
    /// What the orchestrator has of them instead of the header's, if anything.
    pub(crate) published_teacher: Option<String>,
    /// They hold the rows that come this much later.
    pub(crate) shift: u64,
    /// Of the spec's section `train`.
    pub(crate) train: String,
    /// Types of GGUF files that the spec asks for, as YAML lists them.
    pub(crate) gguf: &'static str,
    /// More of the spec's `student`, such as `, lora: {rank: 4}`.
    pub(crate) student: &'static str,
    prompts: (String, String),
    folder: tempfile::TempDir,
    state: Arc<State>,
}

struct State {
    store: Store,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    published: BTreeMap<u32, PublishedShard>,
    /// Sound bytes of each shard ever published.
    bytes: BTreeMap<u32, Bytes>,
    always_damaged: BTreeSet<u32>,
    reused: bool,
    reported: Vec<(u32, u64)>,
    events: Vec<What>,
    stop: StopSwitch,
    stop_after: Option<(u32, Stop)>,
}

impl World {
    /// Nothing is published yet.
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let teacher = tiny_teacher(&folder.path().join("teacher"), 3, VOCAB.into());
        let store = Store::open(&folder.path().join("store").display().to_string()).unwrap();
        let rows = TRAIN_ROWS + u64::from(HELD_OUT_SHARDS) * SHARD_ROWS;
        let line = |row: u64| {
            let split = if row < TRAIN_ROWS { "train" } else { "held_out" };
            format!(
                r#"{{"id":"row-{row}","messages":[{{"role":"user","content":"question {row}"}}],"split":"{split}"}}"#
            ) + "\n"
        };
        let prompts: String = (0..rows).map(line).collect();
        let sha256 = sha256_hex(prompts.as_bytes());
        let header = Header {
            schema_version: soft_targets::SCHEMA_VERSION,
            job: JOB.to_owned(),
            shard: 0,
            epoch: 1,
            work_sha256: String::new(),
            split: String::new(),
            engine: "test".to_owned(),
            engine_version: "0".to_owned(),
            dtype: "f32".to_owned(),
            teacher_sha256: "0".to_owned(),
            tokenizer_sha256: teacher.tokenizer_sha256.clone(),
            chat_template_sha256: "0".to_owned(),
            vocab_size: VOCAB,
            soft_targets: SoftTargets::of(Codec::HeadDraws { head: 8, draws: 4 }),
            tail_logprobs: soft_targets::TailLogprobs::Stored,
            seed: 1,
            prompt_set_sha256: sha256.clone(),
            mode: "generate".to_owned(),
            sampling_json: "{}".to_owned(),
        };
        let path = store.root().join(paths::prompt_set(&sha256));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, &prompts).unwrap();
        let train = "learning_rate: 0.02".to_owned();
        let state = Arc::new(State { store: store.clone(), inner: Mutex::default() });
        Self {
            prompts: (paths::prompt_set(&sha256), sha256),
            store,
            teacher,
            header,
            published_teacher: None,
            shift: 0,
            train,
            gguf: "",
            student: "",
            folder,
            state,
        }
    }

    /// Every shard is published.
    pub(crate) async fn published() -> Self {
        let world = Self::new();
        for shard in 0..TRAIN_SHARDS + HELD_OUT_SHARDS {
            world.publish(shard, 1).await;
        }
        world
    }

    pub(crate) async fn publish(&self, shard: u32, epoch: u64) {
        let held_out = shard >= TRAIN_SHARDS;
        let split = if held_out { "held_out" } else { "train" };
        // Another job may have counted its shards otherwise.
        let index = if self.header.job == JOB { shard } else { shard + 5 };
        let header = Header { shard: index, epoch, split: split.to_owned(), ..self.header.clone() };
        let rows = match (held_out, shard) {
            (false, shard) => u64::from(shard) * SHARD_ROWS..TRAIN_ROWS.min(u64::from(shard + 1) * SHARD_ROWS),
            (true, shard) => {
                let first = TRAIN_ROWS + u64::from(shard - TRAIN_SHARDS) * SHARD_ROWS;
                first..first + SHARD_ROWS
            }
        };
        let sequences: Vec<Sequence> = rows.map(|row| sequence(row + self.shift)).collect();
        let encoded = soft_targets::encode(&header, &sequences).unwrap();
        let teacher = self.published_teacher.clone().unwrap_or(header.teacher_sha256);
        self.state.publish(shard, epoch, encoded.bytes, teacher).await;
    }

    /// What is published from here on was computed for another job.
    pub(crate) fn reuse(&mut self) {
        self.header.job = "0190a5b4c6d87e8fa0b1c2d3e4f5ffff".to_owned();
        self.state.inner.lock().unwrap().reused = true;
    }

    pub(crate) fn train_attempt(&self, epoch: u64) -> Attempt {
        self.attempt(epoch, "train", Self::train_task(STEPS))
    }

    pub(crate) fn train_task(steps: u32) -> Task {
        Task::Train(proto::TrainTask { shards: TRAIN_SHARDS, rows: TRAIN_ROWS, steps })
    }

    pub(crate) fn evaluate_attempt(&self, epoch: u64, initial_key: &str, checkpoint_key: &str) -> Attempt {
        let task = proto::EvaluateTask {
            shards: HELD_OUT_SHARDS,
            checkpoint_key: checkpoint_key.to_owned(),
            initial_key: initial_key.to_owned(),
            samples: 3,
        };
        self.attempt(epoch, "evaluate", Task::Evaluate(task))
    }

    pub(crate) fn replica_attempt(&self, number: u32, epoch: u64) -> Attempt {
        let train = proto::TrainTask { shards: TRAIN_SHARDS, rows: TRAIN_ROWS, steps: STEPS };
        let task = Task::Replica(proto::ReplicaTask { number, train: Some(train) });
        self.attempt(epoch, &format!("replica-{number:05}"), task)
    }

    fn attempt(&self, epoch: u64, task: &str, work: Task) -> Attempt {
        let claimed = proto::Claimed {
            task_id: format!("{JOB}/{task}"),
            job_id: JOB.to_owned(),
            epoch,
            lease: None,
            spec: Some(job_spec_to_proto(&self.spec())),
            prompt_set_key: self.prompts.0.clone(),
            prompt_set_sha256: self.prompts.1.clone(),
            task: Some(work),
        };
        Attempt::try_from(claimed).unwrap()
    }

    fn spec(&self) -> JobSpec {
        let yaml = format!(
            "name: t\nseed: 3\nprompts: {{path: p}}\nteacher: {{model: {:?}, sampling: {{max_new_tokens: 6}}}}\n\
             student: {{init: {{prune: {{layers: 2}}}}{}}}\n\
             train: {{passes: {PASSES}, batch_rows: {BATCH_ROWS}, checkpoint_steps: 7, {}}}\n\
             export: {{gguf: [{}]}}\n",
            self.teacher.folder.display().to_string(),
            self.student,
            self.train,
            self.gguf
        );
        spec::parse_yaml("spec.yaml", &yaml).unwrap()
    }

    /// One attempt as the worker loop would run it.
    pub(crate) async fn run(&self, attempt: &Attempt) -> Result<()> {
        let stop = {
            let mut inner = self.state.inner.lock().unwrap();
            inner.stop = StopSwitch::default();
            inner.stop.clone()
        };
        self.run_until(attempt, stop).await
    }

    /// With a switch of its own, so that several can run at once.
    pub(crate) async fn run_until(&self, attempt: &Attempt, stop: StopSwitch) -> Result<()> {
        let cx = self.context(attempt, stop);
        Student::new(self.settings()).run(attempt.clone(), &cx).await.map(drop)
    }

    pub(crate) fn context(&self, attempt: &Attempt, stop: StopSwitch) -> TaskContext {
        TaskContext::new(
            &attempt.claimed,
            WorkerId::generate("student"),
            self.store.clone(),
            self.state.clone(),
            self.state.clone(),
            stop,
        )
    }

    pub(crate) fn settings(&self) -> Settings {
        let threads = Threads { beside_teacher: None, alone: None };
        Settings { device: Device::Cpu, kind: Kind::Float, work_dir: self.work_dir(), threads, peers: Peers::default() }
    }

    pub(crate) fn work_dir(&self) -> PathBuf {
        self.folder.path().join("work")
    }

    pub(crate) fn events(&self) -> Vec<What> {
        self.state.inner.lock().unwrap().events.clone()
    }

    pub(crate) fn reported(&self) -> Vec<(u32, u64)> {
        self.state.inner.lock().unwrap().reported.clone()
    }

    pub(crate) fn stop(&self, why: Stop) {
        self.state.inner.lock().unwrap().stop.stop(why);
    }

    /// The attempt is stopped when this many of its checkpoints were written.
    pub(crate) fn stop_after_checkpoints(&self, count: u32, why: Stop) {
        self.state.inner.lock().unwrap().stop_after = Some((count, why));
    }

    pub(crate) fn never_stop(&self) {
        self.state.inner.lock().unwrap().stop_after = None;
    }

    /// Whatever is published for this shard is damaged at once.
    pub(crate) fn always_damage(&self, shard: u32) {
        self.state.inner.lock().unwrap().always_damaged.insert(shard);
    }

    pub(crate) fn object(&self, key: &str) -> PathBuf {
        self.store.root().join(key)
    }

    /// Flips one byte in the middle of an object.
    pub(crate) fn damage(&self, key: &str) {
        flip(&self.object(key));
    }
}

impl State {
    async fn publish(&self, shard: u32, epoch: u64, bytes: Bytes, teacher_sha256: String) {
        let key = paths::shard(JOB, shard, epoch);
        self.store.put_new(&key, bytes.clone()).await.unwrap();
        let mut inner = self.inner.lock().unwrap();
        if inner.always_damaged.contains(&shard) {
            flip(&self.store.root().join(&key));
        }
        let published = PublishedShard {
            shard,
            epoch,
            key,
            sha256: sha256_hex(&bytes),
            bytes: bytes.len() as u64,
            rows: soft_targets::decode(bytes.clone(), Default::default()).unwrap().sequences.len() as u64,
            target_tokens: 0,
            work_sha256: String::new(),
            reused: inner.reused,
            teacher_sha256,
        };
        inner.published.insert(shard, published);
        inner.bytes.insert(shard, bytes);
    }
}

#[async_trait]
impl Orchestrator for State {
    async fn claim(&self, _: proto::ClaimTaskRequest) -> Result<proto::ClaimTaskResponse> {
        unreachable!("handlers do not claim")
    }

    async fn heartbeat(&self, _: proto::HeartbeatRequest) -> Result<proto::HeartbeatResponse> {
        unreachable!("handlers do not keep leases")
    }

    async fn list_published_shards(
        &self,
        request: proto::ListPublishedShardsRequest,
    ) -> Result<proto::ListPublishedShardsResponse> {
        let range = match request.split() {
            proto::Split::Train => 0..TRAIN_SHARDS,
            _ => TRAIN_SHARDS..TRAIN_SHARDS + HELD_OUT_SHARDS,
        };
        let inner = self.inner.lock().unwrap();
        let from = request.from_shard.clamp(range.start, range.end);
        let shards: Vec<_> = (from..range.end).map_while(|shard| inner.published.get(&shard).cloned()).collect();
        let complete = from + shards.len() as u32 == range.end;
        Ok(proto::ListPublishedShardsResponse { shards, complete })
    }

    async fn find_shard(&self, _: proto::FindShardRequest) -> Result<proto::FindShardResponse> {
        unreachable!("students compute no shards")
    }

    async fn report_corrupt_shard(&self, request: proto::ReportCorruptShardRequest) -> Result<()> {
        let (bytes, withdrawn) = {
            let mut inner = self.inner.lock().unwrap();
            inner.reported.push((request.shard, request.epoch));
            let withdrawn = inner.published.remove(&request.shard);
            (inner.bytes[&request.shard].clone(), withdrawn.unwrap_or_default())
        };
        // A real teacher's second attempt differs in the header's epoch alone; the stand-in writes the same.
        self.publish(request.shard, request.epoch + 1, bytes, withdrawn.teacher_sha256).await;
        Ok(())
    }
}

#[async_trait]
impl Events for State {
    async fn send(&self, event: &proto::WorkerEvent) -> Result<()> {
        let what = event.what.clone().unwrap();
        let mut inner = self.inner.lock().unwrap();
        if matches!(what, What::CheckpointWritten(_))
            && let Some((count, why)) = inner.stop_after
        {
            inner.stop_after = Some((count.saturating_sub(1), why));
            if count <= 1 {
                inner.stop.stop(why);
            }
        }
        inner.events.push(what);
        Ok(())
    }
}

fn flip(path: &std::path::Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x40;
    fs::write(path, bytes).unwrap();
}

/// A row of a teacher whose next token depends on the last one alone, so that a student can learn it.
fn sequence(row: u64) -> Sequence {
    let prompt = 3 + row as usize % 3;
    // One row ends before it says anything.
    let completion = if row == 5 { 0 } else { 4 + row as usize % 7 };
    let mut random = Counter::new(9, Purpose::Sample, row, 0);
    let mut token_ids: Vec<u32> = (0..prompt).map(|_| 2 + random.below(u64::from(VOCAB) - 2) as u32).collect();
    let mut positions = Vec::new();
    for p in 0..completion {
        let logprobs = bigram(token_ids[token_ids.len() - 1]);
        let mut order: Vec<u32> = (0..VOCAB).collect();
        order.sort_by(|&a, &b| logprobs[b as usize].total_cmp(&logprobs[a as usize]));
        let (head, rest) = order.split_at(8);
        let label = head[random.below(3) as usize];
        let entry = |&id: &u32| (id, logprobs[id as usize]);
        let first = (row as usize + p) % (rest.len() - 1);
        positions.push(Position {
            head: head.iter().map(entry).collect(),
            tail: rest[first..first + 2].iter().map(|id| (*id, 2, logprobs[*id as usize])).collect(),
            label_logprob: logprobs[label as usize],
            log_sum_exps: vec![],
        });
        token_ids.push(label);
    }
    Sequence {
        row_id: format!("row-{row}"),
        row,
        tags: vec![if row.is_multiple_of(2) { "even" } else { "odd" }.to_owned()],
        target_mask: (0..token_ids.len()).map(|at| at >= prompt).collect(),
        token_ids,
        finish_reason: "stop".to_owned(),
        positions,
    }
}

/// Log-probabilities of what follows `token`.
fn bigram(token: u32) -> Vec<f32> {
    let mut random = Counter::new(17, Purpose::Init, token.into(), 0);
    let weights: Vec<f64> = (0..VOCAB).map(|_| (6.0 * random.next_f64()).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.iter().map(|weight| (weight / total).ln() as f32).collect()
}
