//! What a student process computes with, from its flags.

use std::path::PathBuf;

use retort_core::Result;
use tch::{Device, Kind};

use crate::{batch, failure::llama};

#[derive(Clone, Debug)]
pub struct Settings {
    pub device: Device,
    pub kind: Kind,
    /// Holds rows and checkpoints on their way; emptied after each attempt.
    pub work_dir: PathBuf,
}

impl Settings {
    /// Reads `auto`, `cpu` or `cuda:N`, and `auto`, `f32` or `bf16`.
    pub fn new(device: &str, dtype: &str, work_dir: PathBuf) -> Result<Self> {
        let device = retort_llama::device_from_flag(device).map_err(llama)?;
        let kind = retort_llama::dtype_from_flag(dtype, device).map_err(llama)?;
        Ok(Self { device, kind, work_dir })
    }

    pub fn limits(&self) -> batch::Limits {
        batch::Limits::for_device(self.device)
    }
}
