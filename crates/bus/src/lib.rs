//! The bus: task hints for workers and events back from them, over Kafka's protocol.
//!
//! Kafka carries hints and reports, never truth: the database is the truth, so every record may
//! be lost with the broker or arrive twice, and nothing is lost or done twice in effect.
//!
//! - [`Producer`] waits for every replica's acknowledgement and sends again, creating topics that
//!   are missing, until its deadline: it survives a broker that restarts, even one that lost its
//!   data.
//! - [`TaskConsumer`] shares a task topic with the other members of its group. It keeps its
//!   membership while a task is computed, however long that takes, and commits only a contiguous
//!   prefix of finished tasks, so a task whose worker died is delivered again.
//! - [`EventReader`] reads every event from offsets the caller keeps beside the effects.
//!
//! A record that cannot be read never stops a reader: it goes to [`topics::DEAD_LETTERS`] with
//! the reason, and is passed over. Topic layout and why: `docs/decisions/002-embedded-broker.md`.

mod client;
mod dead_letter;
mod event_reader;
mod offsets;
mod producer;
mod record;
mod task_consumer;
pub mod topics;

pub use event_reader::{EventReader, EventRecord};
pub use producer::Producer;
pub use record::MAX_RECORD_BYTES;
pub use task_consumer::{Delivery, TaskConsumer};
pub use topics::ensure_topics;
