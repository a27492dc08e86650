use std::collections::HashMap;

use rdkafka::{
    Message as _, Offset, TopicPartitionList,
    consumer::{Consumer as _, ConsumerContext, StreamConsumer},
    error::RDKafkaErrorCode,
};
use retort_core::{Error, Result};
use retort_proto::WorkerEvent;
use tokio::sync::Mutex;

use crate::{
    client::{self, Quiet},
    dead_letter,
    producer::Producer,
    record, topics,
};

impl ConsumerContext for Quiet {}

/// Reads every event of [`topics::EVENTS`], from offsets that the caller keeps: the orchestrator
/// stores `offset + 1` in the transaction that holds the event's effects.
///
/// A start beyond the log's end, or before its beginning, says that the broker lost or shortened
/// its log: reading starts again at the earliest record, with a warning. Events already applied
/// come again then, which changes nothing.
pub struct EventReader {
    consumer: StreamConsumer<Quiet>,
    producer: Producer,
    brokers: String,
    /// Partition -> the offset expected next.
    expected: Mutex<HashMap<i32, i64>>,
}

/// One record of the event topic.
#[derive(Debug)]
pub struct EventRecord {
    pub partition: i32,
    pub offset: i64,
    /// An error says that the record could not be read ([`retort_core::Code::BusMalformed`]); it
    /// is in the dead letters already: store its offset and go on.
    pub event: Result<WorkerEvent, Error>,
}

impl EventReader {
    /// Reads all partitions: those of `starts`, `(partition, next offset)`, from there, others
    /// from their beginning. Must be called inside a tokio runtime; connects in the background.
    pub fn new(brokers: &str, starts: &[(i32, i64)]) -> Result<Self> {
        let consumer: StreamConsumer<Quiet> = client::config(brokers)
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("auto.offset.reset", "earliest")
            .set("fetch.wait.max.ms", "500")
            .set("fetch.error.backoff.ms", "200")
            .set("fetch.message.max.bytes", (record::MAX_RECORD_BYTES + (1 << 16)).to_string())
            .set("queued.max.messages.kbytes", "16384")
            .set("fetch.queue.backoff.ms", "50")
            // Without a group nothing is committed; librdkafka wants the name all the same.
            .set("group.id", "retort-events")
            .create_with_context(Quiet::new(brokers))
            .map_err(|error| client::misconfigured(brokers, &error))?;
        let starts: HashMap<i32, i64> = starts.iter().copied().collect();
        let mut assignment = TopicPartitionList::new();
        for partition in 0..topics::EVENT_PARTITIONS {
            let offset = starts.get(&partition).map_or(Offset::Beginning, |next| Offset::Offset((*next).max(0)));
            assignment
                .add_partition_offset(topics::EVENTS, partition, offset)
                .map_err(|error| client::misconfigured(brokers, &error))?;
        }
        consumer.assign(&assignment).map_err(|error| client::misconfigured(brokers, &error))?;
        Ok(Self {
            consumer,
            producer: Producer::new(brokers)?,
            brokers: brokers.to_owned(),
            expected: Mutex::new(starts),
        })
    }

    /// The next event. Waits as long as there is none, over broker restarts too; may be cancelled
    /// without losing a record.
    pub async fn next(&self) -> Result<EventRecord> {
        let mut expected = self.expected.lock().await;
        loop {
            let message = match self.consumer.recv().await {
                Ok(message) => message,
                Err(error) => {
                    let code = error.rdkafka_error_code();
                    if code == Some(RDKafkaErrorCode::Fatal) {
                        return Err(client::unavailable(&self.brokers, std::time::Duration::ZERO, &error.to_string()));
                    }
                    tracing::debug!("reading events: {error}");
                    if client::is_topic_missing(code) {
                        let wanted = [(topics::EVENTS.to_owned(), topics::EVENT_PARTITIONS)];
                        topics::ensure_topics(&self.brokers, &wanted).await?;
                    }
                    continue;
                }
            };
            let (partition, offset) = (message.partition(), message.offset());
            if let Some(awaited) = expected.get(&partition).filter(|awaited| offset < **awaited) {
                tracing::warn!(
                    partition,
                    awaited,
                    offset,
                    "the event log ends before the offset we had reached: the broker lost it; reading it from its beginning"
                );
            }
            let event = match record::decode_event(&message) {
                Ok(event) => Ok(event),
                Err(reason) => {
                    dead_letter::bury(&self.producer, &message, &reason).await?;
                    Err(reason)
                }
            };
            expected.insert(partition, offset + 1);
            return Ok(EventRecord { partition, offset, event });
        }
    }
}
