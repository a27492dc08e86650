use std::{
    ops::RangeInclusive,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use rdkafka::{
    Message as _, Offset, TopicPartitionList,
    client::ClientContext,
    config::RDKafkaLogLevel,
    consumer::{BaseConsumer, CommitMode, Consumer as _, ConsumerContext, Rebalance, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode},
};
use retort_core::{Code, Error, Result};
use retort_proto::TaskMessage;
use tokio::{
    sync::{mpsc, mpsc::error::TrySendError},
    task::JoinSet,
};

use crate::{
    client::{self, Quiet},
    dead_letter,
    offsets::{Arrival, InFlight},
    producer::Producer,
    record, topics,
};

/// A member that has gone silent is buried after this long; its partitions move then.
const SESSION_TIMEOUT_MS: &str = "8000";
const HEARTBEAT_MS: &str = "2000";
/// How long a rebalance waits for a live member, ms. The pump polls all the time.
const MAX_POLL_INTERVAL_MS: &str = "60000";
/// A caller that has taken no task for this long is computing: fetching stops.
const BUSY_AFTER: Duration = Duration::from_millis(200);
/// Longest that polling waits for a commit.
const IN_PASSING: Duration = Duration::from_secs(1);
/// How long a member without partitions waits before it joins anew, at first and at most.
const STRANDED: RangeInclusive<Duration> = Duration::from_secs(4)..=Duration::from_secs(300);
/// How long a commit is repeated while the broker is away.
const COMMIT_DEADLINE: Duration = Duration::from_secs(60);

/// A member of a consumer group on one task topic.
///
/// A task in the background keeps polling Kafka, so the group keeps this member however long the
/// caller computes; it holds one task ready and stops fetching more. Commits are manual and
/// cover only a contiguous prefix of finished tasks: what was delivered and not committed comes
/// again, to this or another member, when this one dies.
///
/// A task can therefore be delivered twice; claiming it tells.
pub struct TaskConsumer {
    consumer: Arc<Member>,
    ready: tokio::sync::Mutex<mpsc::Receiver<Delivery>>,
    brokers: String,
    topic: String,
    /// The pump; dropped with the consumer.
    tasks: JoinSet<()>,
}

/// A task record handed to the caller. Commit it when the task is finished, for good or ill.
#[derive(Debug)]
pub struct Delivery {
    pub message: TaskMessage,
    pub partition: i32,
    pub offset: i64,
    _open: Open,
}

/// Tells when a delivery was dropped, finished or not.
#[derive(Debug)]
struct Open {
    in_flight: Arc<Mutex<InFlight>>,
    partition: i32,
    offset: i64,
}

impl Drop for Open {
    fn drop(&mut self) {
        lock(&self.in_flight).abandoned(self.partition, self.offset);
    }
}

type Member = StreamConsumer<Group>;

impl TaskConsumer {
    /// Joins `group` on `topic` (see [`topics::group`]); connects in the background and creates
    /// the topic if it is missing. Must be called inside a tokio runtime.
    pub fn new(brokers: &str, topic: &str, group: &str) -> Result<Self> {
        let context = Group {
            quiet: Quiet::new(brokers),
            topic: topic.to_owned(),
            in_flight: Arc::default(),
            commits: tokio::sync::Mutex::default(),
            paused: AtomicBool::new(false),
        };
        let consumer: Member = client::config(brokers)
            .set("group.id", group)
            .set("partition.assignment.strategy", "cooperative-sticky")
            .set("session.timeout.ms", SESSION_TIMEOUT_MS)
            .set("heartbeat.interval.ms", HEARTBEAT_MS)
            .set("max.poll.interval.ms", MAX_POLL_INTERVAL_MS)
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("auto.offset.reset", "earliest")
            .set("allow.auto.create.topics", "false")
            .set("queued.max.messages.kbytes", "4096")
            .set("fetch.queue.backoff.ms", "50")
            .set("fetch.wait.max.ms", "500")
            .set("fetch.error.backoff.ms", "200")
            .set("fetch.message.max.bytes", (record::MAX_RECORD_BYTES + (1 << 16)).to_string())
            .create_with_context(context)
            .map_err(|error| client::misconfigured(brokers, &error))?;
        consumer.subscribe(&[topic]).map_err(|error| client::misconfigured(brokers, &error))?;
        let consumer = Arc::new(consumer);
        let (sender, ready) = mpsc::channel(1);
        let mut tasks = JoinSet::new();
        let pump = Pump {
            consumer: consumer.clone(),
            producer: Producer::new(brokers)?,
            brokers: brokers.to_owned(),
            topic: topic.to_owned(),
            stranded: Mutex::new(Stranded { since: None, patience: *STRANDED.start() }),
        };
        tasks.spawn(pump.run(sender));
        Ok(Self {
            consumer,
            ready: tokio::sync::Mutex::new(ready),
            brokers: brokers.to_owned(),
            topic: topic.to_owned(),
            tasks,
        })
    }

    /// The next task. Waits as long as there is none, over broker restarts too; may be cancelled
    /// without losing a task. Unreadable records are set aside and never seen here.
    pub async fn next(&self) -> Result<Delivery> {
        let mut ready = self.ready.lock().await;
        loop {
            let delivery = ready.recv().await.ok_or_else(|| {
                Error::new(
                    Code::BusUnavailable,
                    format!("the consumer of {} at {} has stopped; the log says why", self.topic, self.brokers),
                )
            })?;
            if self.consumer.context().in_flight().holds(delivery.partition, delivery.offset) {
                return Ok(delivery);
            }
            tracing::debug!(task = delivery.message.task_id, "the task's partition has moved to another worker");
        }
    }

    /// Says that the task is finished. Commits up to the first delivery still open; when the
    /// partition has moved to another worker there is nothing to commit: it will be told that the
    /// task is done. Repeated while the broker is away, up to a minute.
    pub async fn commit(&self, delivery: &Delivery) -> Result<()> {
        commit(&self.consumer, &self.topic, &self.brokers, delivery.partition, delivery.offset).await
    }

    /// Leaves the group, so that the others get this member's partitions at once.
    pub async fn close(mut self) {
        self.tasks.shutdown().await;
        // Leaving waits for the broker.
        let consumer = self.consumer;
        if let Err(error) = tokio::task::spawn_blocking(move || drop(consumer)).await {
            tracing::warn!("leaving the consumer group: {error}");
        }
    }
}

struct Pump {
    consumer: Arc<Member>,
    producer: Producer,
    brokers: String,
    topic: String,
    stranded: Mutex<Stranded>,
}

/// Since when this member has had no partition.
struct Stranded {
    since: Option<Instant>,
    patience: Duration,
}

impl Pump {
    async fn run(self, ready: mpsc::Sender<Delivery>) {
        if let Err(error) = self.deliver(&ready).await {
            tracing::error!(topic = self.topic, code = %error.code, "consuming tasks has stopped: {}", error.chain());
        }
    }

    async fn deliver(&self, ready: &mpsc::Sender<Delivery>) -> Result<()> {
        let mut waiting = std::collections::VecDeque::new();
        loop {
            let next = match waiting.pop_front() {
                Some(next) => next,
                None => match self.receive().await? {
                    Some(next) => next,
                    None => continue,
                },
            };
            let next = match ready.try_send(next) {
                Ok(()) => continue,
                Err(TrySendError::Closed(_)) => return Ok(()),
                Err(TrySendError::Full(next)) => next,
            };
            let room = match tokio::time::timeout(BUSY_AFTER, ready.reserve()).await {
                Ok(room) => room,
                Err(_) => {
                    self.consumer.context().pause_all(&self.consumer);
                    let room = self.serve_group_until(ready, &mut waiting).await?;
                    self.consumer.context().resume_all(&self.consumer);
                    Ok(room)
                }
            };
            match room {
                Ok(room) => room.send(next),
                Err(_) => return Ok(()),
            }
        }
    }

    /// Polls, so that the group keeps us, until the caller wants another task. A record that was
    /// on its way when fetching was paused waits its turn.
    async fn serve_group_until<'a>(
        &self,
        ready: &'a mpsc::Sender<Delivery>,
        waiting: &mut std::collections::VecDeque<Delivery>,
    ) -> Result<mpsc::Permit<'a, Delivery>> {
        let closed = || Error::new(Code::BusUnavailable, "the consumer was closed");
        loop {
            tokio::select! {
                room = ready.reserve() => return room.map_err(|_| closed()),
                received = self.receive() => waiting.extend(received?),
            }
        }
    }

    /// Polls once: a task, or `None` when it was anything else.
    async fn receive(&self) -> Result<Option<Delivery>> {
        self.join_anew_if_stranded();
        // The timeout lets the check above run while nothing arrives.
        let message = match tokio::time::timeout(Duration::from_secs(1), self.consumer.recv()).await {
            Err(_) => return Ok(None),
            Ok(Ok(message)) => message,
            Ok(Err(error)) => {
                self.survive(&error).await?;
                return Ok(None);
            }
        };
        let (partition, offset) = (message.partition(), message.offset());
        let arrival = self.consumer.context().in_flight().arrived(partition, offset);
        let reason = match (arrival, record::decode_task(&message)) {
            (Arrival::New, Ok(task)) => {
                let open = Open { in_flight: self.consumer.context().in_flight.clone(), partition, offset };
                return Ok(Some(Delivery { message: task, partition, offset, _open: open }));
            }
            (Arrival::Open, Ok(_)) => return Ok(None),
            (Arrival::Finished, Ok(_)) => None,
            (_, Err(reason)) => Some(reason),
        };
        let buried = match &reason {
            Some(reason) => dead_letter::bury(&self.producer, &message, reason).await,
            None => Ok(()),
        };
        let committed = match buried {
            Ok(()) => self.commit_in_passing(partition, offset).await,
            Err(error) => Err(error),
        };
        if let Err(error) = committed {
            tracing::warn!(partition, offset, "a record will come again: {}", error.chain());
        }
        Ok(None)
    }

    /// Commits a record that nobody is handed, without waiting for long: a commit may need the group to
    /// come together again, and the group the next poll. What is not committed now is with the next
    /// commit behind it.
    async fn commit_in_passing(&self, partition: i32, offset: i64) -> Result<()> {
        let committed = commit(&self.consumer, &self.topic, &self.brokers, partition, offset);
        tokio::time::timeout(IN_PASSING, committed).await.unwrap_or(Ok(()))
    }

    /// A topic that was lost and created again between two looks of librdkafka leaves the group
    /// with an assignment of nothing, and nothing tells it to make another. A member that has had
    /// no partition for some time therefore joins anew, less and less often: it may also be one
    /// worker more than there are partitions, and then that is how it stays.
    fn join_anew_if_stranded(&self) {
        let mut stranded = self.stranded.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.consumer.context().in_flight().owns_nothing() {
            *stranded = Stranded { since: None, patience: *STRANDED.start() };
            return;
        }
        let patience = stranded.patience;
        if stranded.since.get_or_insert_with(Instant::now).elapsed() < patience {
            return;
        }
        tracing::debug!(topic = self.topic, "no partition for {patience:?}: joining the group anew");
        self.consumer.unsubscribe();
        if let Err(error) = self.consumer.subscribe(&[&self.topic]) {
            tracing::warn!(topic = self.topic, "joining the group anew: {error}");
        }
        *stranded = Stranded { since: Some(Instant::now()), patience: (patience * 2).min(*STRANDED.end()) };
    }

    /// Errors while polling are told and waited out by librdkafka; only a fatal one ends the pump.
    async fn survive(&self, error: &KafkaError) -> Result<()> {
        let code = error.rdkafka_error_code();
        if code == Some(RDKafkaErrorCode::Fatal) || matches!(error, KafkaError::MessageConsumptionFatal(_)) {
            return Err(client::unavailable(&self.brokers, Duration::ZERO, &error.to_string()));
        }
        tracing::debug!(topic = self.topic, "reading tasks: {error}");
        if client::is_topic_missing(code) {
            topics::ensure_topics(&self.brokers, &[(self.topic.clone(), topics::partitions(&self.topic))]).await?;
        }
        Ok(())
    }
}

/// Marks the delivery finished and commits the prefix, when it grew.
async fn commit(consumer: &Arc<Member>, topic: &str, brokers: &str, partition: i32, offset: i64) -> Result<()> {
    let context = consumer.context();
    context.in_flight().finished(partition, offset);
    let _one_at_a_time = context.commits.lock().await;
    let Some(next) = context.in_flight().finished(partition, offset) else {
        return Ok(());
    };
    let started = Instant::now();
    let mut backoff = Duration::from_millis(100);
    loop {
        let mut position = TopicPartitionList::with_capacity(1);
        position
            .add_partition_offset(topic, partition, Offset::Offset(next))
            .map_err(|error| Error::internal(format!("offset {next} of {topic}: {error}")))?;
        let member = consumer.clone();
        let outcome = tokio::task::spawn_blocking(move || member.commit(&position, CommitMode::Sync))
            .await
            .map_err(|error| Error::internal(format!("committing offset {next} of {topic}: {error}")))?;
        let Err(error) = outcome else {
            context.in_flight().committed(partition, next);
            return Ok(());
        };
        if !context.in_flight().owns(partition) {
            tracing::debug!(topic, partition, next, "not committed, the partition has moved to another worker");
            return Ok(());
        }
        if started.elapsed() + backoff > COMMIT_DEADLINE {
            return Err(client::unavailable(brokers, started.elapsed(), &format!("committing offset {next}: {error}")));
        }
        tracing::debug!(topic, partition, next, "committing again: {error}");
        tokio::time::sleep(backoff).await;
        backoff = (backoff * 2).min(Duration::from_secs(1));
    }
}

fn lock(in_flight: &Mutex<InFlight>) -> MutexGuard<'_, InFlight> {
    in_flight.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Follows the group's assignments.
struct Group {
    quiet: Quiet,
    topic: String,
    in_flight: Arc<Mutex<InFlight>>,
    /// One commit at a time, so that none overtakes another.
    commits: tokio::sync::Mutex<()>,
    /// The caller is computing: what is assigned meanwhile is not fetched either.
    paused: AtomicBool,
}

impl Group {
    fn in_flight(&self) -> MutexGuard<'_, InFlight> {
        lock(&self.in_flight)
    }

    fn pause_all(&self, consumer: &Member) {
        self.paused.store(true, Ordering::SeqCst);
        let paused = consumer.assignment().and_then(|assignment| consumer.pause(&assignment));
        if let Err(error) = paused {
            tracing::debug!(topic = self.topic, "pausing: {error}");
        }
    }

    fn resume_all(&self, consumer: &Member) {
        self.paused.store(false, Ordering::SeqCst);
        let resumed = consumer.assignment().and_then(|assignment| consumer.resume(&assignment));
        if let Err(error) = resumed {
            tracing::debug!(topic = self.topic, "resuming: {error}");
        }
    }
}

impl ClientContext for Group {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        self.quiet.log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.quiet.error(error, reason);
    }
}

impl ConsumerContext for Group {
    fn pre_rebalance(&self, _: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        match rebalance {
            Rebalance::Revoke(partitions) => {
                let mut in_flight = self.in_flight();
                for element in partitions.elements() {
                    in_flight.revoke(element.partition());
                }
                tracing::debug!(topic = self.topic, "gave up {} partitions", partitions.count());
            }
            Rebalance::Assign(partitions) => {
                let mut in_flight = self.in_flight();
                for element in partitions.elements() {
                    in_flight.assign(element.partition());
                }
                tracing::debug!(topic = self.topic, "got {} partitions", partitions.count());
            }
            Rebalance::Error(error) => tracing::debug!(topic = self.topic, "rebalance: {error}"),
        }
    }

    fn post_rebalance(&self, consumer: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        let Rebalance::Assign(partitions) = rebalance else { return };
        // librdkafka remembers a pause over the loss of a partition: one that was paused when the
        // broker went, and resumed while it was nobody's, would come back paused for ever.
        let set = match self.paused.load(Ordering::SeqCst) {
            true => consumer.pause(partitions),
            false => consumer.resume(partitions),
        };
        if let Err(error) = set {
            tracing::debug!(topic = self.topic, "pausing or resuming new partitions: {error}");
        }
    }
}
