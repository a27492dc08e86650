use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use rdkafka::{
    error::{KafkaError, RDKafkaErrorCode},
    message::OwnedHeaders,
    producer::{FutureProducer, FutureRecord},
};
use retort_core::{Code, Error, Result};
use retort_proto::{TaskMessage, WorkerEvent};

use crate::{
    client::{self, Quiet},
    record, topics,
};

/// Records of a task that is sent widely.
const COPIES: u32 = 8;
/// How long a record is offered before its sender is told that the bus is gone.
const DEADLINE: Duration = Duration::from_secs(120);
/// How long librdkafka tries on its own, before we look whether the topic is still there.
const ATTEMPT_MS: &str = "10000";

/// Sends tasks and events, and answers once every in-sync replica has them.
///
/// A send that fails is repeated until the deadline, so a record may arrive twice: events carry an
/// id, tasks are hints, and both are harmless twice. Kafka's idempotence is off on purpose: its
/// state dies with a broker that loses its data, and then fails the producer for good, where
/// sending again just works. Within one sender that awaits each send, order is kept.
#[derive(Clone)]
pub struct Producer {
    inner: Arc<Inner>,
}

struct Inner {
    kafka: FutureProducer<Quiet>,
    brokers: String,
    deadline: Duration,
    /// Topics known to exist.
    ensured: Mutex<HashSet<String>>,
}

impl Producer {
    /// Sets up a client; connects in the background. `brokers` is `host:port[,host:port]`.
    /// Must be called inside a tokio runtime.
    pub fn new(brokers: &str) -> Result<Self> {
        Self::with_deadline(brokers, DEADLINE)
    }

    /// As [`Producer::new`], giving up on a record after `deadline`.
    pub fn with_deadline(brokers: &str, deadline: Duration) -> Result<Self> {
        let kafka = client::config(brokers)
            .set("acks", "all")
            // One request in flight: a repeated batch cannot overtake the one after it.
            .set("max.in.flight.requests.per.connection", "1")
            .set("linger.ms", "2")
            .set("message.timeout.ms", ATTEMPT_MS)
            .set("request.timeout.ms", "5000")
            .set("retry.backoff.ms", "50")
            .set("retry.backoff.max.ms", "500")
            .set("topic.metadata.propagation.max.ms", "1000")
            // The record, its key and headers, and the batch around them.
            .set("message.max.bytes", (record::MAX_RECORD_BYTES + (1 << 16)).to_string())
            .create_with_context(Quiet::new(brokers))
            .map_err(|error| client::misconfigured(brokers, &error))?;
        Ok(Self { inner: Arc::new(Inner { kafka, brokers: brokers.to_owned(), deadline, ensured: Mutex::default() }) })
    }

    /// Publishes a task to a task topic, keyed by the task, so tasks spread over the partitions.
    pub async fn send_task(&self, topic: &str, task: &TaskMessage) -> Result<()> {
        let payload = record::encode(task, "a task")?;
        self.send(topic, task.task_id.as_bytes(), &payload, record::headers()).await
    }

    /// [`Producer::send_task`], and more records of the same task, keyed so that they lie in other partitions: one
    /// consumer's long work does not keep the task from the others. A record more than needed finds nothing to do.
    pub async fn send_task_widely(&self, topic: &str, task: &TaskMessage) -> Result<()> {
        let payload = record::encode(task, "a task")?;
        for copy in 0..COPIES {
            let key = format!("{}#{copy}", task.task_id);
            self.send(topic, key.as_bytes(), &payload, record::headers()).await?;
        }
        Ok(())
    }

    /// Publishes an event, keyed by its job.
    pub async fn send_event(&self, event: &WorkerEvent) -> Result<()> {
        let payload = record::encode(event, "an event")?;
        self.send(topics::EVENTS, event.job_id.as_bytes(), &payload, record::headers()).await
    }

    /// Offers the record until it is acknowledged or the deadline has passed.
    pub(crate) async fn send(&self, topic: &str, key: &[u8], payload: &[u8], headers: OwnedHeaders) -> Result<()> {
        let started = Instant::now();
        let mut backoff = Duration::from_millis(50);
        loop {
            let failure = match self.ensure(topic, started).await {
                Ok(()) => {
                    let record = FutureRecord::to(topic).key(key).payload(payload).headers(headers.clone());
                    match self.inner.kafka.send(record, Duration::from_secs(1)).await {
                        Ok(_) => return Ok(()),
                        Err((error, _)) if is_refusal(&error) => {
                            return Err(Error::new(
                                Code::BusMalformed,
                                format!("the broker refuses a record of {} bytes for {topic}: {error}", payload.len()),
                            ));
                        }
                        Err((error, _)) => {
                            if client::is_topic_missing(error.rdkafka_error_code()) {
                                self.forget(topic);
                            }
                            error.to_string()
                        }
                    }
                }
                Err(error) if started.elapsed() >= self.inner.deadline => return Err(error),
                Err(error) => error.message,
            };
            if started.elapsed() + backoff > self.inner.deadline {
                return Err(client::unavailable(&self.inner.brokers, started.elapsed(), &failure));
            }
            tracing::debug!(topic, "sending again: {failure}");
            tokio::time::sleep(backoff).await;
            backoff = (backoff * 2).min(Duration::from_secs(1));
        }
    }

    async fn ensure(&self, topic: &str, started: Instant) -> Result<()> {
        if self.ensured().contains(topic) {
            return Ok(());
        }
        let patience = self.inner.deadline.saturating_sub(started.elapsed());
        let wanted = [(topic.to_owned(), topics::partitions(topic))];
        topics::ensure_topics_within(&self.inner.brokers, &wanted, patience).await?;
        self.ensured().insert(topic.to_owned());
        Ok(())
    }

    /// The broker lost its data and this topic with it, and so perhaps the others.
    fn forget(&self, topic: &str) {
        tracing::warn!(topic, brokers = self.inner.brokers, "the broker has lost the topic; creating it again");
        self.ensured().clear();
    }

    fn ensured(&self) -> std::sync::MutexGuard<'_, HashSet<String>> {
        self.inner.ensured.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether sending the same bytes again must fail again.
fn is_refusal(error: &KafkaError) -> bool {
    matches!(
        error.rdkafka_error_code(),
        Some(
            RDKafkaErrorCode::MessageSizeTooLarge
                | RDKafkaErrorCode::InvalidMessageSize
                | RDKafkaErrorCode::InvalidRecord
                | RDKafkaErrorCode::TopicAuthorizationFailed
        )
    )
}
