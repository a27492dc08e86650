//! Records on the wire: protobuf, with the schema's version in a header.

use prost::Message as _;
use rdkafka::message::{Header, Headers as _, OwnedHeaders};
use retort_core::{
    Code, Error, Result,
    id::{JobId, TaskId},
};
use retort_proto::{TaskMessage, WorkerEvent};

/// Largest record written or read, bytes. Bulk lies in the object store; records carry its keys.
pub const MAX_RECORD_BYTES: usize = 1 << 20;

/// `major.minor`. A reader refuses a newer major; a newer minor only adds fields.
const SCHEMA_MAJOR: u32 = 1;
const SCHEMA_VERSION: &str = "1.0";
const SCHEMA_HEADER: &str = "schema-version";

/// The headers of every record we send.
pub(crate) fn headers() -> OwnedHeaders {
    OwnedHeaders::new().insert(Header { key: SCHEMA_HEADER, value: Some(SCHEMA_VERSION) })
}

pub(crate) fn encode(message: &impl prost::Message, what: &str) -> Result<Vec<u8>> {
    let bytes = message.encoded_len();
    if bytes > MAX_RECORD_BYTES {
        return Err(Error::new(
            Code::BusMalformed,
            format!(
                "{what} takes {bytes} bytes, more than a record may have ({MAX_RECORD_BYTES}); put bulk in the object store"
            ),
        ));
    }
    Ok(message.encode_to_vec())
}

/// Reads a task record. Every refusal is [`Code::BusMalformed`] and says why.
pub(crate) fn decode_task(message: &impl rdkafka::Message) -> Result<TaskMessage> {
    let task = TaskMessage::decode(payload(message)?).map_err(|error| malformed(format!("no TaskMessage: {error}")))?;
    check_ids(&task.job_id, &task.task_id)?;
    Ok(task)
}

/// Reads an event record. Every refusal is [`Code::BusMalformed`] and says why.
pub(crate) fn decode_event(message: &impl rdkafka::Message) -> Result<WorkerEvent> {
    let event =
        WorkerEvent::decode(payload(message)?).map_err(|error| malformed(format!("no WorkerEvent: {error}")))?;
    check_ids(&event.job_id, &event.task_id)?;
    if event.event_id.is_empty() || event.event_id.len() > 128 {
        return Err(malformed(format!("an event id of {} bytes; it must have 1 to 128", event.event_id.len())));
    }
    if event.what.is_none() {
        return Err(malformed("an event that says nothing this version knows".to_owned()));
    }
    Ok(event)
}

fn payload<M: rdkafka::Message>(message: &M) -> Result<&[u8]> {
    let version = message
        .headers()
        .and_then(|headers| headers.iter().find(|header| header.key == SCHEMA_HEADER))
        .and_then(|header| header.value)
        .ok_or_else(|| malformed(format!("no {SCHEMA_HEADER} header: retort did not write it")))?;
    check_version(version)?;
    let payload = message.payload().ok_or_else(|| malformed("an empty record".to_owned()))?;
    if payload.len() > MAX_RECORD_BYTES {
        return Err(malformed(format!("{} bytes are more than a record may have ({MAX_RECORD_BYTES})", payload.len())));
    }
    Ok(payload)
}

fn check_version(header: &[u8]) -> Result<()> {
    let text: String = String::from_utf8_lossy(header).chars().take(20).collect();
    let major = text
        .split('.')
        .next()
        .and_then(|major| major.parse::<u32>().ok())
        .ok_or_else(|| malformed(format!("{SCHEMA_HEADER} {text:?} is no version")))?;
    if major > SCHEMA_MAJOR {
        return Err(malformed(format!(
            "schema version {text} is newer than this binary reads ({SCHEMA_VERSION}); upgrade it"
        )));
    }
    Ok(())
}

fn check_ids(job: &str, task: &str) -> Result<()> {
    let job = job.parse::<JobId>().map_err(|error| malformed(error.message))?;
    let task = task.parse::<TaskId>().map_err(|error| malformed(error.message))?;
    if task.as_str().split_once('/').is_none_or(|(of, _)| of != job.as_str()) {
        return Err(malformed(format!("task {task} is not of job {job}")));
    }
    Ok(())
}

fn malformed(message: String) -> Error {
    Error::new(Code::BusMalformed, message)
}

#[cfg(test)]
mod tests {
    use rdkafka::{Timestamp, message::OwnedMessage};

    use super::*;

    fn record(payload: Option<Vec<u8>>, headers: Option<OwnedHeaders>) -> OwnedMessage {
        OwnedMessage::new(payload, None, "t".into(), Timestamp::NotAvailable, 0, 7, headers)
    }

    fn task() -> TaskMessage {
        let job = JobId::generate();
        TaskMessage { task_id: TaskId::shard(&job, 3).to_string(), job_id: job.to_string(), kind: 1 }
    }

    #[test]
    fn a_task_comes_back_as_it_was() {
        let task = task();
        let bytes = encode(&task, "a task").unwrap();
        assert_eq!(decode_task(&record(Some(bytes), Some(headers()))).unwrap(), task);
    }

    #[track_caller]
    fn refused(message: OwnedMessage, reason: &str) {
        let error = decode_task(&message).unwrap_err();
        assert_eq!(error.code, Code::BusMalformed);
        assert!(error.message.contains(reason), "{}", error.message);
    }

    #[test]
    fn what_cannot_be_read_is_refused_with_its_reason() {
        let good = encode(&task(), "a task").unwrap();
        let version = |v: &str| Some(OwnedHeaders::new().insert(Header { key: SCHEMA_HEADER, value: Some(v) }));
        refused(record(Some(good.clone()), None), "no schema-version header");
        refused(record(Some(good.clone()), version("2.0")), "newer than this binary reads (1.0)");
        refused(record(Some(good.clone()), version("one")), "is no version");
        refused(record(None, Some(headers())), "empty record");
        refused(record(Some(b"not protobuf".to_vec()), Some(headers())), "no TaskMessage");
        refused(record(Some(vec![0; MAX_RECORD_BYTES + 1]), Some(headers())), "more than a record may have");
        let other = TaskMessage { job_id: JobId::generate().to_string(), ..task() };
        refused(record(Some(other.encode_to_vec()), Some(headers())), "is not of job");
        assert!(decode_task(&record(Some(good), version("1.9"))).is_ok(), "a newer minor only adds fields");
    }

    #[test]
    fn a_record_too_large_is_never_sent() {
        let task = TaskMessage { task_id: "x".repeat(MAX_RECORD_BYTES), ..task() };
        assert_eq!(encode(&task, "a task").unwrap_err().code, Code::BusMalformed);
    }
}
