//! The student worker: trains a small model on a teacher's published soft targets while the teacher
//! still works, and judges it on prompts neither of them was trained on.
//!
//! What holds:
//!
//! - The order of the rows is a pure function of the spec; the optimiser's step alone says which rows
//!   come next. So an attempt that goes on from a checkpoint ends, on a CPU, the same machine and number of
//!   threads, with the same bytes as one that was never stopped. On a GPU nothing of the kind is claimed: the
//!   backward pass of attention sums in no fixed order there.
//! - Nothing of size positions x vocabulary lives longer than one chunk of the loss.
//! - A checkpoint exists once its manifest does; its `model/` is a Hugging Face folder.
//! - A shard that is not what was published is never trained on: it is reported and waited for.
//! - A loss that is not finite stops the attempt before the optimiser steps.

pub mod batch;
mod calibration;
mod checkpoints;
pub mod cli;
mod curve;
mod data;
mod evaluate;
pub mod example;
mod failure;
pub mod generate;
pub mod guard;
mod handler;
mod held_out;
mod init;
pub mod loss;
pub mod measure;
pub mod optimizer;
mod parallel;
pub mod prune;
pub mod resume;
pub mod schedule;
mod settings;
mod shards;
mod spill;
mod train;
pub mod trainer;
mod weights;
mod workspace;

pub use handler::Student;
pub use init::Teacher;
pub use parallel::sync::{PeerArgs, Peers};
pub use prune::kept_layers;
pub use settings::{Settings, Threads};

#[cfg(test)]
mod attempt_tests;
