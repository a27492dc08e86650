//! What lies in the object store: its keys, soft-target shards, prompt sets and checkpoints.
//!
//! Every object is written once under a key that no other attempt uses, so nothing here locks:
//! create-if-absent is the only coordination, and a manifest or pointer comes after the bytes it
//! names.

pub mod checkpoint;
pub mod hash;
pub mod paths;
pub mod prompts;
pub mod soft_targets;
pub mod store;

pub use hash::{sha256_file, sha256_hex};
pub use store::{Entry, Store};
