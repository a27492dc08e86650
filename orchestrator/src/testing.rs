//! A world for this crate's tests: a database in a temporary folder, a clock that is turned by hand,
//! a store, a bus in memory, and workers' words in short form.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use retort_artifact::{Store, paths};
use retort_bus::EventRecord;
use retort_core::{
    Code, Error, Result,
    clock::ManualClock,
    id::{JobId, TaskId},
    spec::{Gates, Init, JobSpec, Prompts, Prune, Student, Teacher, Train},
    state::TaskState,
    wire::timestamp_to_proto,
};
use retort_proto::{self as proto, TaskMessage, WorkerEvent, worker_event::What};
use tempfile::TempDir;
use tokio::sync::Notify;

use crate::{
    Context, Settings,
    bus::{Bus, Events, topic},
    database::{
        Database, commit,
        jobs::{self, Job, NewJob},
        journal,
        tasks::{self, Task},
    },
    events::{self, Outcome},
    leases::{self, Claim},
    planner::{self, RowCounts},
};

pub const START_MS: i64 = 1_800_000_000_000;

pub struct World {
    pub context: Context,
    pub clock: ManualClock,
    pub bus: Arc<MemoryBus>,
    pub folder: TempDir,
    offset: AtomicI64,
}

impl World {
    pub async fn new() -> Self {
        Self::with(Settings { window: 4, max_attempts: 3, ..Settings::default() }).await
    }

    pub async fn with(settings: Settings) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let clock = ManualClock::at_ms(START_MS);
        let database = Database::open(&folder.path().join("retort.sqlite")).await.unwrap();
        let store = Store::open(folder.path().join("store").to_str().unwrap()).unwrap();
        let context = Context::new(database, store, Arc::new(clock.clone()), settings);
        Self { context, clock, bus: Arc::default(), folder, offset: AtomicI64::new(0) }
    }

    /// A job of 10 training rows in 3 shards and 6 held-out rows in 2, past admission.
    pub async fn job(&self) -> JobId {
        self.job_with(spec(Path::new("/nowhere"))).await
    }

    pub async fn job_with(&self, spec: JobSpec) -> JobId {
        self.job_of(spec, RowCounts::generated(10, 6, 8, 100)).await
    }

    pub async fn job_of(&self, spec: JobSpec, rows: RowCounts) -> JobId {
        let id = JobId::generate();
        let (plan, planned) = planner::plan(&spec, &rows, 1000, 100, 64).unwrap();
        let mut tx = self.context.database.begin().await.unwrap();
        let job = NewJob {
            id: &id,
            spec: &spec,
            spec_sha256: "0",
            request_id: None,
            plan: &plan,
            prompt_set_sha256: "ab",
            create_ms: self.context.now_ms(),
        };
        jobs::insert(&mut tx, &job).await.unwrap();
        tasks::insert_all(&mut tx, &id, &planned, |kind| topic(&spec, kind)).await.unwrap();
        commit(tx).await.unwrap();
        id
    }

    pub async fn read_job(&self, id: &JobId) -> Job {
        jobs::get(&mut self.context.database.read().await.unwrap(), id).await.unwrap()
    }

    pub async fn read_task(&self, id: &TaskId) -> Task {
        tasks::find(&mut self.context.database.read().await.unwrap(), id).await.unwrap().unwrap()
    }

    pub async fn task_state(&self, id: &TaskId) -> TaskState {
        self.read_task(id).await.state
    }

    /// Takes the lease; its epoch.
    pub async fn claim(&self, task: &TaskId, worker: &str) -> u64 {
        match leases::claim(&self.context, task, worker).await.unwrap() {
            Claim::Claimed(lease) => {
                assert_eq!(&lease.task.id, task, "another published task came first");
                lease.task.epoch
            }
            other => panic!("{task} could not be claimed: {other:?}"),
        }
    }

    pub fn event(&self, task: &TaskId, epoch: u64, what: What) -> WorkerEvent {
        let job = task.as_str().split_once('/').unwrap().0;
        WorkerEvent {
            event_id: uuid::Uuid::now_v7().to_string(),
            time: Some(timestamp_to_proto(self.context.now_ms())),
            job_id: job.to_owned(),
            task_id: task.as_str().to_owned(),
            epoch,
            worker_id: "worker-1".to_owned(),
            what: Some(what),
        }
    }

    pub async fn apply(&self, event: WorkerEvent) -> Outcome {
        let offset = self.offset.fetch_add(1, Ordering::SeqCst);
        events::apply(&self.context, &EventRecord { partition: 0, offset, event: Ok(event) }).await.unwrap()
    }

    pub async fn emit(&self, task: &TaskId, epoch: u64, what: What) -> Outcome {
        self.apply(self.event(task, epoch, what)).await
    }

    /// Claims a shard and publishes it, object and all; its epoch.
    pub async fn publish(&self, job: &JobId, shard: u32) -> u64 {
        let task = TaskId::shard(job, shard);
        let epoch = self.claim(&task, "teacher-1").await;
        let key = paths::shard(job.as_str(), shard, epoch);
        self.context.store.put_new(&key, Bytes::from_static(b"soft targets")).await.unwrap();
        assert_eq!(self.emit(&task, epoch, shard_ready(job, shard, epoch)).await, Outcome::Applied);
        epoch
    }

    /// As [`World::publish`], with the name of its work.
    pub async fn publish_work(&self, job: &JobId, shard: u32, work: &str) -> u64 {
        let task = TaskId::shard(job, shard);
        let epoch = self.claim(&task, "teacher-1").await;
        let key = paths::shard(job.as_str(), shard, epoch);
        self.context.store.put_new(&key, Bytes::from_static(b"soft targets")).await.unwrap();
        let What::ShardReady(ready) = shard_ready(job, shard, epoch) else { unreachable!() };
        let ready = proto::ShardReady { work_sha256: work.to_owned(), ..ready };
        assert_eq!(self.emit(&task, epoch, What::ShardReady(ready)).await, Outcome::Applied);
        epoch
    }

    /// Claims a shard and reports the one at `key` as its own; its epoch.
    pub async fn reuse(&self, job: &JobId, shard: u32, work: &str, key: &str) -> u64 {
        let task = TaskId::shard(job, shard);
        let epoch = self.claim(&task, "teacher-1").await;
        assert_eq!(self.emit(&task, epoch, shard_reused(job, shard, work, key)).await, Outcome::Applied);
        epoch
    }

    /// Trains and leaves a candidate's folder in the store.
    pub async fn train(&self, job: &JobId) {
        let task = TaskId::train(job);
        let epoch = self.claim(&task, "student-1").await;
        let finished = train_finished(job, epoch);
        for prefix in [&finished.checkpoint_key, &finished.initial_key] {
            let key = format!("{}config.json", paths::model_prefix(prefix));
            self.context.store.put_new(&key, Bytes::from_static(b"{}")).await.unwrap();
        }
        assert_eq!(self.emit(&task, epoch, What::TrainFinished(finished)).await, Outcome::Applied);
    }

    pub async fn evaluate(&self, job: &JobId, kl: f64) {
        let task = TaskId::evaluate(job);
        let epoch = self.claim(&task, "student-1").await;
        assert_eq!(self.emit(&task, epoch, evaluation(kl)).await, Outcome::Applied);
    }

    /// Everything up to the judgement.
    pub async fn complete(&self, job: &JobId, kl: f64) {
        for shard in 0..self.read_job(job).await.plan.shards() {
            self.publish(job, shard).await;
        }
        self.train(job).await;
        self.evaluate(job, kl).await;
    }

    pub async fn journal(&self, job: &JobId) -> Vec<proto::JobEvent> {
        journal::list(&mut self.context.database.read().await.unwrap(), job, 0, 10_000).await.unwrap()
    }
}

/// 4 rows a shard; promotes at a KL of at most 0.5.
pub fn spec(folder: &Path) -> JobSpec {
    JobSpec {
        name: "support".to_owned(),
        seed: 7,
        prompts: Prompts {
            path: folder.join("prompts.jsonl").display().to_string(),
            held_out_fraction: 0.25,
            shard_rows: 4,
        },
        teacher: Teacher {
            model: folder.join("teacher").display().to_string(),
            pool: "default".to_owned(),
            mode: Default::default(),
            sampling: retort_core::spec::Sampling { max_new_tokens: 8, ..Default::default() },
            soft_targets: Default::default(),
        },
        student: Student { pool: "default".to_owned(), init: Init::Prune(Prune::to_layers(1)), lora: None },
        train: Train { passes: 2, batch_rows: 4, ..Train::default() },
        gates: Gates { max_kl: Some(0.5), ..Gates::default() },
        export: Default::default(),
    }
}

pub fn shard_ready(job: &JobId, shard: u32, epoch: u64) -> What {
    What::ShardReady(proto::ShardReady {
        key: paths::shard(job.as_str(), shard, epoch),
        sha256: "a".repeat(64),
        bytes: 1000,
        rows: 4,
        target_tokens: 20,
        seconds: 2.0,
        fidelity: Some(proto::Fidelity { head_mass: 0.9, mean_abs_error: 0.01, argmax_agreement: 1.0, kl: 0.002 }),
        work_sha256: String::new(),
        reused: false,
        teacher_sha256: "e".repeat(64),
    })
}

/// The shard at `key` again, reported by a job that did not compute it.
pub fn shard_reused(job: &JobId, shard: u32, work: &str, key: &str) -> What {
    let What::ShardReady(ready) = shard_ready(job, shard, 1) else { unreachable!() };
    let (key, work_sha256) = (key.to_owned(), work.to_owned());
    What::ShardReady(proto::ShardReady { key, work_sha256, reused: true, seconds: 0.1, ..ready })
}

pub fn train_progress(step: u32, loss: f64) -> What {
    What::TrainProgress(proto::TrainProgress {
        step,
        loss,
        tokens_per_second: 100.0,
        processed_tokens: u64::from(step) * 10,
        held_out_kl: Some(loss / 2.0),
    })
}

pub fn train_finished(job: &JobId, epoch: u64) -> proto::TrainFinished {
    proto::TrainFinished {
        steps: 6,
        checkpoint_key: paths::checkpoint(job.as_str(), 6, epoch),
        initial_key: paths::initial(job.as_str(), epoch),
        processed_tokens: 120,
        target_tokens: 70,
        trained_parameters: 90,
        workers: 2,
        left_out_steps: 3,
        seconds: 3.0,
        tokens_per_second: 40.0,
        final_loss: 0.5,
        pruning: Some(proto::Pruning { calibration_rows: 9, ..Default::default() }),
        curve: Vec::new(),
    }
}

pub fn evaluation(kl: f64) -> What {
    let quality = |kl, perplexity| proto::Quality {
        kl,
        top1_agreement: 0.8,
        student_perplexity: perplexity,
        teacher_perplexity: 4.0,
        tokens: 40,
        calibration_error: Some(0.1),
        teacher_calibration_error: Some(0.05),
    };
    What::EvaluationReady(proto::EvaluationReady {
        before: Some(quality(2.0, 50.0)),
        after: Some(quality(kl, 5.0)),
        before_by_tag: [("billing".to_owned(), quality(2.0, 50.0))].into(),
        after_by_tag: [("billing".to_owned(), quality(kl, 5.0))].into(),
        samples: vec![proto::Sample {
            row_id: "row-1".to_owned(),
            prompt: "hello".to_owned(),
            teacher: "hi".to_owned(),
            student_before: "??".to_owned(),
            student_after: "hi".to_owned(),
        }],
    })
}

pub fn task_failed(code: Code, retryable: bool) -> What {
    let error = proto::ErrorDetail { code: code.as_str().to_owned(), message: "it broke".to_owned() };
    What::TaskFailed(proto::TaskFailed { error: Some(error), retryable })
}

/// Keeps what was sent and what workers wrote; can be told to fail.
#[derive(Default)]
pub struct MemoryBus {
    pub sent: Mutex<Vec<(String, TaskMessage)>>,
    /// Sends fail after the record was kept: the acknowledgement is lost.
    pub lose_acknowledgements: AtomicBool,
    log: Mutex<Vec<WorkerEvent>>,
    written: Notify,
}

impl MemoryBus {
    pub fn write(&self, event: WorkerEvent) {
        self.log.lock().unwrap().push(event);
        self.written.notify_waiters();
    }

    /// Tasks sent so far, within their job.
    pub fn tasks(&self) -> Vec<String> {
        let short = |id: &str| id.split_once('/').unwrap().1.to_owned();
        self.sent.lock().unwrap().iter().map(|(_, message)| short(&message.task_id)).collect()
    }
}

#[async_trait]
impl Bus for MemoryBus {
    async fn send_task(&self, topic: &str, message: &TaskMessage) -> Result<()> {
        self.sent.lock().unwrap().push((topic.to_owned(), message.clone()));
        if self.lose_acknowledgements.load(Ordering::SeqCst) {
            return Err(Error::new(Code::BusUnavailable, "the broker went away"));
        }
        Ok(())
    }

    async fn events(&self, _: &[(i32, i64)]) -> Result<Box<dyn Events>> {
        Err(Error::internal("read a shared bus instead"))
    }
}

/// The same bus, readable.
pub struct SharedBus(pub Arc<MemoryBus>);

#[async_trait]
impl Bus for SharedBus {
    async fn send_task(&self, topic: &str, message: &TaskMessage) -> Result<()> {
        self.0.send_task(topic, message).await
    }

    async fn events(&self, starts: &[(i32, i64)]) -> Result<Box<dyn Events>> {
        let next = starts.first().map_or(0, |(_, offset)| *offset);
        Ok(Box::new(Reader { bus: Arc::clone(&self.0), next }))
    }
}

struct Reader {
    bus: Arc<MemoryBus>,
    next: i64,
}

#[async_trait]
impl Events for Reader {
    async fn next(&mut self) -> Result<EventRecord> {
        loop {
            let written = self.bus.written.notified();
            let event = self.bus.log.lock().unwrap().get(self.next as usize).cloned();
            if let Some(event) = event {
                self.next += 1;
                return Ok(EventRecord { partition: 0, offset: self.next - 1, event: Ok(event) });
            }
            // A write between the look and the wait is heard at the next look.
            let _ = tokio::time::timeout(Duration::from_millis(20), written).await;
        }
    }
}

/// A prompt file of 12 rows and a tiny teacher's folder.
pub fn write_inputs(folder: &Path) {
    std::fs::write(folder.join("prompts.jsonl"), prompts(12)).unwrap();
    write_model(&folder.join("teacher"), &config(16), 2);
}

pub fn prompts(rows: usize) -> String {
    (0..rows)
        .map(|row| format!("{{\"messages\": [{{\"role\": \"user\", \"content\": \"question number {row}\"}}]}}\n"))
        .collect()
}

pub fn config(vocab_size: u64) -> serde_json::Value {
    serde_json::json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": vocab_size,
        "max_position_embeddings": 32,
        "tie_word_embeddings": true,
    })
}

/// A folder with config, a tokenizer of `words` words and the unknown one, and weights of zeros.
pub fn write_model(folder: &Path, config: &serde_json::Value, words: usize) -> PathBuf {
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let mut vocab = serde_json::Map::from_iter([("<unk>".to_owned(), 0.into())]);
    for word in 1..=words {
        vocab.insert(format!("word{word}"), word.into());
    }
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    });
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(folder.join("chat_template.jinja"), "{{ messages[0].content }}").unwrap();
    // A config that is refused has no tensors.
    let table = retort_model::Config::from_dir(folder).map_or_else(|_| Vec::new(), |config| config.tensors());
    let zeros = vec![0u8; 4 * table.iter().map(|(_, shape)| numbers(shape)).max().unwrap_or(0)];
    let tensors = table.iter().map(|(name, shape)| {
        let sizes = shape.iter().map(|&size| size as usize).collect();
        let bytes = &zeros[..4 * numbers(shape)];
        (name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, sizes, bytes).unwrap())
    });
    std::fs::write(folder.join("model.safetensors"), safetensors::serialize(tensors, None).unwrap()).unwrap();
    folder.to_owned()
}

fn numbers(shape: &[i64]) -> usize {
    shape.iter().product::<i64>() as usize
}
