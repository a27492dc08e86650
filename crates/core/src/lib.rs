//! The words of retort: ids, states, errors, the job spec, clock, counter-based randomness and
//! task groups. No file, socket or database is touched here.

pub mod clock;
pub mod error;
pub mod id;
pub mod pruning;
pub mod random;
pub mod spec;
pub mod state;
pub mod task_group;
pub mod wire;

pub use error::{Code, Error, Kind, Result};
