//! What a student process computes with, from its flags.

use std::path::PathBuf;

use retort_core::{Result, spec::Train};
use tch::{Device, Kind};

use crate::{batch, failure::llama, parallel::sync::Peers};

#[derive(Clone, Debug)]
pub struct Settings {
    pub device: Device,
    pub kind: Kind,
    /// Holds rows and checkpoints on their way; emptied after each attempt.
    pub work_dir: PathBuf,
    pub threads: Threads,
    /// How it is reached by those that train with it.
    pub peers: Peers,
}

/// Cores for arithmetic; `None` leaves libtorch its own choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Threads {
    /// While the job's teacher may still be working.
    pub beside_teacher: Option<u16>,
    /// From the second pass on, and in the evaluation: every shard was published by then.
    pub alone: Option<u16>,
}

impl Threads {
    /// For the calling thread: libtorch keeps the number per thread. Decided by the step alone, so
    /// that two runs of a job compute alike.
    pub(crate) fn enter(self, teacher_done: bool) {
        let threads = if teacher_done { self.alone } else { self.beside_teacher };
        if let Some(threads) = threads {
            tch::set_num_threads(threads.into());
        }
    }
}

impl Settings {
    /// Reads `auto`, `cpu` or `cuda:N`, and `auto`, `f32` or `bf16`.
    pub fn new(device: &str, dtype: &str, work_dir: PathBuf, threads: Threads) -> Result<Self> {
        let device = retort_llama::device_from_flag(device).map_err(llama)?;
        let kind = retort_llama::dtype_from_flag(dtype, device).map_err(llama)?;
        Ok(Self { device, kind, work_dir, threads, peers: Peers::default() })
    }

    /// Of a job's micro-batches, in training and in judging.
    pub fn limits(&self, train: &Train) -> batch::Limits {
        batch::Limits::of(train, self.device)
    }
}
