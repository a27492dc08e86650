//! The hash of a model's weights, computed once a process for as long as the files stay as they are.

use std::{
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::SystemTime,
};

use retort_core::{Error, Result};

use crate::{reading, torch::model};

/// Name, size and time of change of every file in a model's folder. Two equal fingerprints mean
/// that nothing was replaced meanwhile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fingerprint {
    dir: PathBuf,
    files: Vec<(String, u64, Option<SystemTime>)>,
}

impl Fingerprint {
    pub fn of(dir: &Path) -> Result<Self> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(dir).map_err(|error| Error::io(dir, error))? {
            let entry = entry.map_err(|error| Error::io(dir, error))?;
            // Follows links: model folders are often links into a cache.
            let about = std::fs::metadata(entry.path()).map_err(|error| Error::io(entry.path(), error))?;
            if about.is_file() {
                files.push((entry.file_name().to_string_lossy().into_owned(), about.len(), about.modified().ok()));
            }
        }
        files.sort();
        Ok(Self { dir: dir.to_owned(), files })
    }

    /// SHA-256 over the folder's weights; reads them all the first time.
    pub fn weights_sha256(&self) -> Result<String> {
        static KNOWN: Mutex<Vec<(Fingerprint, String)>> = Mutex::new(Vec::new());
        let known = || KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, sha256)) = known().iter().find(|(fingerprint, _)| fingerprint == self) {
            return Ok(sha256.clone());
        }
        let sha256 = retort_llama::folder_sha256(&self.dir, reading::progress(&self.dir)).map_err(model)?;
        let mut known = known();
        known.retain(|(fingerprint, _)| fingerprint.dir != self.dir);
        // A process serves few teachers; the bound keeps a strange one from growing without end.
        if known.len() >= 64 {
            known.remove(0);
        }
        known.push((self.clone(), sha256.clone()));
        Ok(sha256)
    }
}
