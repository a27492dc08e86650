//! A real broker process, raw clients to misbehave with, and messages.

use std::{
    future::Future,
    io::{BufRead as _, BufReader, Read as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    consumer::{Consumer as _, StreamConsumer},
    message::OwnedMessage,
    producer::FutureProducer,
};
use retort_core::id::{JobId, TaskId};
use retort_proto::{ShardProgress, TaskKind, TaskMessage, WorkerEvent, worker_event::What};

/// A test that waits longer than this for anything has failed.
pub const PATIENCE: Duration = Duration::from_secs(90);

pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("waited {PATIENCE:?} for {what}"))
}

/// A `retort-broker` process on a folder of its own; killed when dropped.
pub struct Broker {
    child: Child,
    pub address: String,
    pub data: PathBuf,
    _folder: Option<tempfile::TempDir>,
}

impl Broker {
    pub fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut broker = Self::start_on("127.0.0.1:0", &folder.path().join("data"));
        broker._folder = Some(folder);
        broker
    }

    pub fn start_on(listen: &str, data: &Path) -> Self {
        log();
        let mut child = command(listen, data).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let ready: serde_json::Value =
            serde_json::from_str(&line).unwrap_or_else(|_| panic!("no ready line: {line:?}"));
        assert_eq!(ready["ready"], "broker");
        Self { child, address: ready["listen"].as_str().unwrap().to_owned(), data: data.to_owned(), _folder: None }
    }

    /// `kill -9`, then the same broker again, on the same port.
    pub fn kill_and_restart(&mut self) {
        self.kill();
        let folder = self._folder.take();
        *self = Self::start_on(&self.address.clone(), &self.data.clone());
        self._folder = folder;
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM; returns how long it took and how it ended.
    pub fn terminate(&mut self) -> (Duration, std::process::ExitStatus) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let started = std::time::Instant::now();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let status = self.child.wait().unwrap();
        (started.elapsed(), status)
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the clients log, with `RETORT_LOG` as filter, when it is set.
fn log() {
    if let Ok(filter) = std::env::var("RETORT_LOG") {
        let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
    }
}

pub fn command(listen: &str, data: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_retort-broker"));
    command.args(["--listen", listen, "--die-with-parent", "--data"]).arg(data);
    command
}

/// Runs a broker that must refuse to start; returns its standard error.
pub fn refused(listen: &str, data: &Path) -> String {
    let mut child = command(listen, data).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stderr = String::new();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1), "{stderr}");
    stderr
}

/// The broker a test of the suite talks to.
pub struct Bus {
    pub brokers: String,
    _own: Option<Broker>,
}

impl Bus {
    pub fn get() -> Self {
        match std::env::var("RETORT_TEST_BROKERS") {
            Ok(brokers) => Self { brokers, _own: None },
            Err(_) => {
                let own = Broker::start();
                Self { brokers: own.address.clone(), _own: Some(own) }
            }
        }
    }
}

/// A pool no other test uses.
pub fn pool() -> String {
    JobId::generate().to_string()
}

pub fn tasks(count: u32) -> Vec<TaskMessage> {
    let job = JobId::generate();
    (0..count)
        .map(|shard| TaskMessage {
            task_id: TaskId::shard(&job, shard).to_string(),
            job_id: job.to_string(),
            kind: TaskKind::Shard.into(),
        })
        .collect()
}

pub fn events(count: u64) -> Vec<WorkerEvent> {
    let job = JobId::generate();
    (0..count)
        .map(|n| WorkerEvent {
            event_id: format!("{job}-{n}"),
            job_id: job.to_string(),
            task_id: TaskId::shard(&job, 0).to_string(),
            epoch: 1,
            worker_id: "teacher-test".to_owned(),
            what: Some(What::ShardProgress(ShardProgress { target_tokens: n, seconds: 0.5 })),
            ..WorkerEvent::default()
        })
        .collect()
}

pub fn raw_producer(brokers: &str) -> FutureProducer {
    ClientConfig::new().set("bootstrap.servers", brokers).create().unwrap()
}

/// The first `count` records of a topic's partition 0 that `wanted` accepts.
pub async fn read_raw(
    brokers: &str,
    topic: &str,
    count: usize,
    wanted: impl Fn(&OwnedMessage) -> bool,
) -> Vec<OwnedMessage> {
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", "raw")
        .set("enable.auto.commit", "false")
        .create()
        .unwrap();
    let mut assignment = TopicPartitionList::new();
    assignment.add_partition_offset(topic, 0, Offset::Beginning).unwrap();
    consumer.assign(&assignment).unwrap();
    let mut found = Vec::new();
    while found.len() < count {
        if let Ok(message) = soon("a raw record", consumer.recv()).await {
            let message = message.detach();
            if wanted(&message) {
                found.push(message);
            }
        }
    }
    found
}

pub fn header(message: &OwnedMessage, key: &str) -> String {
    use rdkafka::message::Headers as _;
    let headers = message.headers().unwrap();
    let value = headers.iter().find(|header| header.key == key).and_then(|header| header.value).unwrap();
    String::from_utf8(value.to_vec()).unwrap()
}
