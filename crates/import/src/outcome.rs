//! What an import says while it runs and when it is done.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::stage::Receipt;

const WEIGHTS: &str = "model.safetensors";

/// How far an import has come; sent after every chunk of at most a few megabytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    pub phase: Phase,
    /// Bytes done of this phase.
    pub done: u64,
    /// Bytes of this phase.
    pub total: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Reading the source once for its SHA-256.
    Hashing,
    /// Writing the weights, in bytes of the written file.
    Writing,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Phase::Hashing => "hashing",
            Phase::Writing => "writing",
        })
    }
}

/// What the source was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Gguf { version: u32 },
    HuggingFace { weight_files: u32 },
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Format::Gguf { version } => write!(f, "GGUF v{version}"),
            Format::HuggingFace { weight_files: 1 } => f.write_str("Hugging Face folder"),
            Format::HuggingFace { weight_files } => write!(f, "Hugging Face folder of {weight_files} weight files"),
        }
    }
}

/// A model that now lies in a Hugging Face folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Imported {
    pub folder: PathBuf,
    /// As `config.json` names it: `LlamaForCausalLM`, `MistralForCausalLM` or `Qwen2ForCausalLM`.
    pub architecture: String,
    /// Weights, a tied head counted once.
    pub parameters: u64,
    /// Tensors in `model.safetensors`.
    pub tensors: u64,
    pub source_format: Format,
    /// Of the GGUF file; for a folder, of the list of its files' names and SHA-256s.
    pub source_sha256: String,
    /// Of the written `model.safetensors`.
    pub sha256: String,
    /// Over all files of the folder; 0 when nothing had to be written.
    pub bytes_written: u64,
    /// The folder already held this import: nothing was written.
    pub unchanged: bool,
}

impl Imported {
    pub(crate) fn new(folder: &Path, source_format: Format, receipt: Receipt, unchanged: bool) -> Self {
        let sha256 = receipt.files.iter().find(|file| file.path == WEIGHTS).map(|file| file.sha256.clone());
        Self {
            folder: folder.to_owned(),
            architecture: receipt.architecture,
            parameters: receipt.parameters,
            tensors: receipt.tensors,
            source_format,
            source_sha256: receipt.source_sha256,
            sha256: sha256.unwrap_or_default(),
            bytes_written: if unchanged { 0 } else { receipt.files.iter().map(|file| file.bytes).sum() },
            unchanged,
        }
    }
}
