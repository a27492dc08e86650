//! Where records go that nobody can read.

use rdkafka::message::{Header, OwnedHeaders};
use retort_core::{Error, Result};

use crate::{producer::Producer, record::MAX_RECORD_BYTES, topics};

/// Copies an unreadable record to [`topics::DEAD_LETTERS`] with the reason and where it came
/// from, and warns. A payload over the limit is cut.
pub(crate) async fn bury<M: rdkafka::Message>(producer: &Producer, message: &M, reason: &Error) -> Result<()> {
    let (topic, partition, offset) = (message.topic(), message.partition(), message.offset());
    tracing::warn!(topic, partition, offset, code = %reason.code, "unreadable record set aside: {}", reason.message);
    let payload = message.payload().unwrap_or_default();
    let headers = OwnedHeaders::new()
        .insert(Header { key: "reason", value: Some(reason.message.as_str()) })
        .insert(Header { key: "code", value: Some(reason.code.as_str()) })
        .insert(Header { key: "topic", value: Some(topic) })
        .insert(Header { key: "partition", value: Some(partition.to_string().as_str()) })
        .insert(Header { key: "offset", value: Some(offset.to_string().as_str()) });
    let key = message.key().filter(|key| key.len() <= 1024).unwrap_or_default();
    producer.send(topics::DEAD_LETTERS, key, &payload[..payload.len().min(MAX_RECORD_BYTES)], headers).await
}
