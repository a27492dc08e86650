//! Where the weights of a Hugging Face folder lie, every tensor checked against the configuration before a byte of it
//! is read.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use retort_core::{Code, Error, Result};
use retort_model::{Config, WeightFolder};

use crate::folder::CONFIG;
use crate::layout::Layout;
use crate::weights::{Dtype, Entry};

/// Every tensor that a folder's configuration asks for, and no other.
#[derive(Debug)]
pub struct FolderWeights {
    pub(crate) layout: Layout,
    /// In the order of the layers.
    pub tensors: Vec<LocatedTensor>,
}

/// A tensor and where its bytes are.
#[derive(Debug)]
pub struct LocatedTensor {
    pub entry: Entry,
    path: PathBuf,
    /// From the start of the file, in bytes.
    offset: u64,
}

impl FolderWeights {
    /// Reads the headers of the folder's weight files.
    ///
    /// # Errors
    /// `FileNotFound` without weights, `WeightsTruncated`, `ModelMalformed` naming the tensor that is missing or of
    /// another shape, `ModelUnsupported` for one of a type that is not read or that no such model has.
    pub fn open(source: &Path, config: &Config) -> Result<Self> {
        Self::locate(source, config, &WeightFolder::open(source)?)
    }

    /// In these files of the folder `source`.
    pub(crate) fn locate(source: &Path, config: &Config, files: &WeightFolder) -> Result<Self> {
        let layout = Layout::from_config(config, &source.join(CONFIG).display().to_string())?;
        files.require_model(config)?;
        let mut tensors = Vec::new();
        for expected in layout.tensors() {
            let name = &expected.name;
            let absent = || Error::internal(format!("{}: no place for tensor \"{name}\"", files.place()));
            let (stored, at) = files.get(name).ok_or_else(absent)?;
            let file = &files.files()[at];
            let dtype = Dtype::parse(stored.dtype.name()).ok_or_else(|| {
                let is = stored.dtype.name();
                let message =
                    format!("{}: tensor \"{name}\" is {is}; import and export read F32, F16 and BF16", file.place());
                Error::new(Code::ModelUnsupported, message)
            })?;
            let entry = Entry::new(expected.name, dtype, expected.shape)?;
            tensors.push(LocatedTensor { entry, path: file.path().to_owned(), offset: stored.offset });
        }
        Ok(Self { layout, tensors })
    }
}

impl LocatedTensor {
    /// Fills `bytes` from `from` bytes into the tensor on.
    pub fn read_at(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        let failed = |error| Error::io(&self.path, error);
        File::open(&self.path).map_err(failed)?.read_exact_at(bytes, self.offset + from).map_err(failed)
    }
}
