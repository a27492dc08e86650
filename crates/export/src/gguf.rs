//! One GGUF file, planned whole and then written.

use std::{
    io::{BufWriter, Write},
    path::Path,
};

use retort_core::{Code, Error, Result, spec::GgufType};
use retort_import::FolderWeights;
use retort_model::{Architecture, Config, Tokenizer};

use crate::{header, metadata, tensors::Planned, tokenizer, unfinished::Unfinished};

/// How far an export has come, told after every few megabytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes written.
    pub done: u64,
    /// Bytes of the whole file.
    pub total: u64,
}

/// A file that can be written: all that stands before the weights, and where each tensor comes from.
#[derive(Debug)]
pub struct Gguf {
    pub architecture: Architecture,
    /// Weights, a tied head counted once.
    pub parameters: u64,
    header: Vec<u8>,
    tensors: Vec<Planned>,
}

/// `support-Q8_0.gguf`.
pub fn file_name(name: &str, kind: GgufType) -> String {
    format!("{name}-{}.gguf", kind.name())
}

/// Whether a model of this configuration, with the tokenizer of `folder`, can be exported: what needs no weights.
///
/// # Errors
/// As [`Gguf::plan`].
pub fn check(config: &Config, folder: &Path) -> Result<()> {
    metadata::check(config, folder)?;
    tokenizer::keys(&Tokenizer::from_dir(folder)?, config, folder).map(drop)
}

impl Gguf {
    /// Reads and checks the folder, the weights' headers alone of its weights. `name` is the model's, for people.
    ///
    /// # Errors
    /// `FileNotFound` without configuration, tokenizer or weights; `ModelMalformed` and `WeightsTruncated` for what is
    /// broken; `ModelUnsupported` for an architecture or a tokenizer that GGUF or retort has no words for.
    pub fn plan(folder: &Path, name: &str, kind: GgufType) -> Result<Self> {
        let config = Config::from_dir(folder)?;
        metadata::check(&config, folder)?;
        let tokenizer = Tokenizer::from_dir(folder)?;
        let mut keys = metadata::keys(&config, name, kind);
        keys.extend(tokenizer::keys(&tokenizer, &config, folder)?);
        let tensors = Planned::all(FolderWeights::open(folder, &config)?, &config, kind)?;
        let header = header::encode(&keys, &tensors);
        Ok(Self { architecture: config.architecture, parameters: config.parameters(), header, tensors })
    }

    /// Of the file.
    pub fn bytes(&self) -> u64 {
        self.header.len() as u64 + self.tensors.iter().map(Planned::padded_bytes).sum::<u64>()
    }

    /// In the file: those of the folder, and the divisors of scaled rotary frequencies.
    pub fn tensors(&self) -> usize {
        self.tensors.len()
    }

    /// Writes the file to `out`, whole or not at all; `force` replaces one that is there. An error of `progress`
    /// ends the export and comes back.
    ///
    /// # Errors
    /// `ObjectExists`; `DiskFull`, at once where the disk says that it lacks the room; `ModelMalformed` naming a
    /// tensor with a value that is not finite; `ModelUnsupported` for one that the type cannot hold.
    pub fn export(&self, out: &Path, force: bool, progress: &mut dyn FnMut(Progress) -> Result<()>) -> Result<()> {
        let unfinished = Unfinished::beside(out, force, &[])?;
        self.check_room(unfinished.file(), out)?;
        let mut file = BufWriter::with_capacity(1 << 20, unfinished.file());
        self.write(&mut file, out, progress)?;
        file.flush().map_err(|error| Error::io(out, error))?;
        drop(file);
        unfinished.publish().map(drop)
    }

    /// As [`Self::export`], to a stream that errors call `place`.
    pub fn write(
        &self,
        out: &mut dyn Write,
        place: &Path,
        progress: &mut dyn FnMut(Progress) -> Result<()>,
    ) -> Result<()> {
        let total = self.bytes();
        let mut done = 0;
        let mut put = |bytes: &[u8]| {
            out.write_all(bytes).map_err(|error| Error::io(place, error))?;
            done += bytes.len() as u64;
            progress(Progress { done, total })
        };
        put(&self.header)?;
        for tensor in &self.tensors {
            tensor.write(&mut put)?;
        }
        if done == total { Ok(()) } else { Err(Error::internal(format!("wrote {done} bytes of {total}"))) }
    }

    fn check_room(&self, file: &std::fs::File, out: &Path) -> Result<()> {
        // A file system that cannot say how much room it has is simply tried.
        let Ok(disk) = rustix::fs::fstatvfs(file) else { return Ok(()) };
        let (bytes, free) = (self.bytes(), disk.f_bavail.saturating_mul(disk.f_frsize));
        if bytes <= free {
            return Ok(());
        }
        Err(Error::new(
            Code::DiskFull,
            format!(
                "{}: the file needs {bytes} bytes, but the disk has {free} free; free some space, or write to another disk",
                out.display()
            ),
        ))
    }
}
