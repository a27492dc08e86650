//! Imports of small models, right and wrong, seen from outside.

#![allow(clippy::unwrap_used)] // helpers of tests unwrap as tests do

mod folder;
mod fuzz;
mod gguf;
mod models;
mod refusals;
mod tokenizers;
mod writer;

use std::path::{Path, PathBuf};

use retort_core::Result;
use retort_import::Imported;

/// A folder with room for a source and what it becomes.
struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn out(&self) -> PathBuf {
        self.path("out")
    }

    /// Imports `bytes` as a GGUF file into [`Self::out`].
    fn import(&self, bytes: &[u8]) -> Result<Imported> {
        let source = self.path("model.gguf");
        std::fs::write(&source, bytes).unwrap();
        self.import_from(&source)
    }

    fn import_from(&self, source: &Path) -> Result<Imported> {
        retort_import::import(source, &self.out(), &mut |_| {})
    }

    /// Everything that lies beside the source, hidden files too.
    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path()).unwrap();
        let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn json(&self, name: &str) -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(self.out().join(name)).unwrap()).unwrap()
    }
}

/// A tensor of an imported folder: its type's name, shape and bytes.
fn tensor(out: &Path, name: &str) -> (String, Vec<usize>, Vec<u8>) {
    let bytes = std::fs::read(out.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let view = file.tensor(name).unwrap();
    (format!("{:?}", view.dtype()), view.shape().to_vec(), view.data().to_vec())
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}
