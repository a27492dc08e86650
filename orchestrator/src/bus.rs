//! What the orchestrator needs of the bus, so that tests can stand in for Kafka.

use async_trait::async_trait;
use retort_bus::{EventReader, EventRecord, Producer, topics};
use retort_core::{Result, spec::JobSpec, state::TaskKind};
use retort_proto::TaskMessage;

/// Tasks out, events in.
#[async_trait]
pub trait Bus: Send + Sync + 'static {
    /// Answers once the broker has acknowledged the record; makes the topic when it is missing.
    async fn send_task(&self, topic: &str, message: &TaskMessage) -> Result<()>;
    /// Every event from `starts`, `(partition, next offset)`; partitions not named, from their beginning.
    async fn events(&self, starts: &[(i32, i64)]) -> Result<Box<dyn Events>>;
}

#[async_trait]
pub trait Events: Send {
    /// Waits as long as there is none; may be cancelled without losing a record.
    async fn next(&mut self) -> Result<EventRecord>;
}

/// The topic whose consumers can do this.
pub fn topic(spec: &JobSpec, kind: TaskKind) -> String {
    match kind {
        TaskKind::Shard => topics::teacher_tasks(&spec.teacher.pool),
        TaskKind::Train | TaskKind::Replica | TaskKind::Evaluate => topics::student_tasks(&spec.student.pool),
    }
}

pub struct Kafka {
    brokers: String,
    producer: Producer,
}

impl Kafka {
    /// Connects in the background; must be called inside a tokio runtime.
    pub fn new(brokers: &str) -> Result<Self> {
        Ok(Self { brokers: brokers.to_owned(), producer: Producer::new(brokers)? })
    }
}

#[async_trait]
impl Bus for Kafka {
    async fn send_task(&self, topic: &str, message: &TaskMessage) -> Result<()> {
        // A replica is of use only while its lead works, and that keeps the lead's partitions busy.
        if message.kind() == retort_proto::TaskKind::Replica {
            return self.producer.send_task_widely(topic, message).await;
        }
        self.producer.send_task(topic, message).await
    }

    async fn events(&self, starts: &[(i32, i64)]) -> Result<Box<dyn Events>> {
        retort_bus::ensure_topics(&self.brokers, &[(topics::EVENTS.to_owned(), topics::EVENT_PARTITIONS)]).await?;
        Ok(Box::new(EventReader::new(&self.brokers, starts)?))
    }
}

#[async_trait]
impl Events for EventReader {
    async fn next(&mut self) -> Result<EventRecord> {
        EventReader::next(self).await
    }
}
