//! What retort asks of a broker, and of its own clients against it.
//!
//! `suite` runs against any Kafka: the embedded broker, or the one `RETORT_TEST_BROKERS` names
//! (`host:port`). `process` is about the `retort-broker` process itself: kills, lost data, stops,
//! and input that no client of ours would send.

#![allow(clippy::unwrap_used)]

mod process;
mod suite;
mod support;
