//! Settings and habits that every Kafka client of ours shares.

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

use rdkafka::{
    ClientConfig,
    client::ClientContext,
    config::RDKafkaLogLevel,
    error::{KafkaError, RDKafkaErrorCode},
};
use retort_core::{Code, Error};

/// A lost broker is told once in this long, not once a connection attempt.
const COMPLAIN_EVERY: Duration = Duration::from_secs(30);

/// What producers, consumers and admin clients agree on. `brokers` is `host:port[,host:port]`.
pub(crate) fn config(brokers: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", brokers)
        .set("client.id", "retort")
        // A restarted broker is found again within a second.
        .set("reconnect.backoff.ms", "50")
        .set("reconnect.backoff.max.ms", "1000")
        .set("socket.connection.setup.timeout.ms", "5000")
        .set("socket.keepalive.enable", "true")
        // A topic that was lost and created again is seen within seconds (default: five minutes).
        .set("topic.metadata.refresh.interval.ms", "3000")
        .set("metadata.max.age.ms", "9000")
        .set("log.connection.close", "false");
    config
}

pub(crate) fn misconfigured(brokers: &str, error: &KafkaError) -> Error {
    Error::new(
        Code::RequestInvalid,
        format!("cannot set up a Kafka client for {brokers:?}: {error}; brokers are given as host:port"),
    )
}

pub(crate) fn unavailable(brokers: &str, after: Duration, cause: &str) -> Error {
    Error::new(
        Code::BusUnavailable,
        format!("the broker at {brokers} gave no answer for {} s: {cause}; is it running?", after.as_secs()),
    )
}

/// Whether a topic or partition is simply not there, as after a broker lost its data.
pub(crate) fn is_topic_missing(code: Option<RDKafkaErrorCode>) -> bool {
    matches!(
        code,
        Some(
            RDKafkaErrorCode::UnknownTopicOrPartition
                | RDKafkaErrorCode::UnknownTopic
                | RDKafkaErrorCode::UnknownPartition
                | RDKafkaErrorCode::UnknownTopicId
        )
    )
}

/// Forwards librdkafka's log to tracing, without its noise about connections that come and go.
pub(crate) struct Quiet {
    brokers: String,
    complained: Mutex<Option<Instant>>,
}

impl Quiet {
    pub(crate) fn new(brokers: &str) -> Self {
        Self { brokers: brokers.to_owned(), complained: Mutex::new(None) }
    }

    fn may_complain(&self) -> bool {
        let mut last = self.complained.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let due = last.is_none_or(|at| at.elapsed() >= COMPLAIN_EVERY);
        if due {
            *last = Some(Instant::now());
        }
        due
    }
}

impl ClientContext for Quiet {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        match level {
            // Connections are told by `error`, and what they break by whoever waits for an answer.
            _ if matches!(facility, "FAIL" | "ERROR" | "FETCH" | "OFFSET" | "GETSUBSCRIPTIONS") => {
                tracing::debug!(target: "retort_bus::librdkafka", facility, "{message}");
            }
            RDKafkaLogLevel::Emerg
            | RDKafkaLogLevel::Alert
            | RDKafkaLogLevel::Critical
            | RDKafkaLogLevel::Error
            | RDKafkaLogLevel::Warning => {
                tracing::warn!(target: "retort_bus::librdkafka", facility, "{message}");
            }
            _ => tracing::debug!(target: "retort_bus::librdkafka", facility, "{message}"),
        }
    }

    fn error(&self, error: KafkaError, reason: &str) {
        let lost = matches!(
            error.rdkafka_error_code(),
            Some(
                RDKafkaErrorCode::BrokerTransportFailure
                    | RDKafkaErrorCode::AllBrokersDown
                    | RDKafkaErrorCode::OperationTimedOut
                    | RDKafkaErrorCode::Resolve
            )
        );
        if lost && self.may_complain() {
            tracing::warn!(brokers = self.brokers, "no connection to the broker, trying again: {reason}");
        } else {
            tracing::debug!(brokers = self.brokers, "{error}: {reason}");
        }
    }
}
