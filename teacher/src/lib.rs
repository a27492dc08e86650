//! The teacher worker: turns shards of a prompt set into completions with soft targets.
//!
//! A shard is a pure function of its rows, the teacher, the parameters and the seed: see
//! [`shard::capture`]. Around it, [`Teacher`] claims, publishes and reports through
//! [`retort_worker`].

pub mod capture;
mod cdf;
pub mod chat;
pub mod engine;
mod fingerprint;
pub mod group;
mod handler;
mod reading;
pub mod sampling;
pub mod shard;
pub mod stage;
pub mod text;
mod torch;
pub mod work;

pub use handler::Teacher;

#[cfg(test)]
mod tests;
