//! Brings a model in: a Hugging Face folder or a GGUF file becomes one checked Hugging Face folder
//! (`config.json`, `model.safetensors`, `tokenizer.json`, `tokenizer_config.json`, chat template)
//! that retort, transformers and `tokenizers` read alike.
//!
//! The path of an import: the source's structure is read and checked whole (every count, size and
//! offset before memory is taken for it), its SHA-256 is taken, files are written into a staging
//! folder beside the target, and one rename publishes them. Whatever fails before that rename
//! leaves nothing behind. The receipt `retort-import.json` makes a second import of the same source
//! a no-op, and an import of another source over it an error.
//!
//! Weights stream tensor by tensor, so memory stays at a few megabytes whatever the model's size.
//! Quantised tensors come out as f32; F32, F16 and BF16 keep their type bit for bit.
//!
//! What the way out needs too is public: a folder's weights located and checked, and GGUF's words in [`gguf`].

mod digest;
mod folder;
mod folder_weights;
pub mod gguf;
mod layout;
mod outcome;
mod stage;
mod weights;

use std::path::Path;

use retort_core::{Error, Result};

pub use folder_weights::{FolderWeights, LocatedTensor};
pub use outcome::{Format, Imported, Phase, Progress};
pub use weights::{Dtype, Entry};

/// Imports `source`, a GGUF file or a Hugging Face folder, into the folder `out`.
///
/// All or nothing: `out` appears complete or not at all. When `out` already holds the import of the
/// same bytes nothing is written and [`Imported::unchanged`] is set.
///
/// # Errors
/// `FileNotFound`; `GgufMalformed` or `GgufTruncated`; `ModelMalformed` or `WeightsTruncated`;
/// `ModelUnsupported` for an architecture, a quantisation or a tokenizer that retort does not read;
/// `ObjectExists` when `out` holds something else; `AlreadyRunning` when another import into `out`
/// is at work; `DiskFull`.
pub fn import(source: &Path, out: &Path, progress: &mut dyn FnMut(Progress)) -> Result<Imported> {
    let metadata = std::fs::metadata(source).map_err(|error| Error::io(source, error))?;
    if metadata.is_dir() { folder::import(source, out, progress) } else { gguf::import(source, out, progress) }
}
