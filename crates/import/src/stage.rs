//! All or nothing: files are written into `.{out}.partial` beside the target and published by one
//! rename. The receipt inside says which source the folder was made from.

use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use retort_core::{Code, Error, Result};
use serde::{Deserialize, Serialize};

use crate::digest::hex;

/// In every imported folder.
const RECEIPT: &str = "retort-import.json";
/// Held while a staging folder is being filled; never published.
const LOCK: &str = ".lock";
const RECEIPT_LIMIT: u64 = 1 << 20;

/// What an imported folder was made from, and of what it consists.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Receipt {
    /// Raised when the same source would come out differently.
    pub(crate) importer: u32,
    /// The file's or folder's own name, for people.
    pub(crate) source: String,
    pub(crate) source_format: String,
    pub(crate) source_sha256: String,
    pub(crate) architecture: String,
    pub(crate) parameters: u64,
    pub(crate) tensors: u64,
    pub(crate) files: Vec<Written>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Written {
    pub(crate) path: String,
    pub(crate) bytes: u64,
    pub(crate) sha256: String,
}

pub(crate) const IMPORTER: u32 = 1;

/// What `out` holds now.
pub(crate) enum Found {
    Nothing,
    /// The untouched result of importing these very bytes.
    Same(Receipt),
}

/// Looks at `out` before anything is written.
pub(crate) fn look(out: &Path, source_sha256: &str) -> Result<Found> {
    let metadata = match fs::metadata(out) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Found::Nothing),
        Err(error) => return Err(Error::io(out, error)),
        Ok(metadata) => metadata,
    };
    if !metadata.is_dir() {
        return Err(exists(out, "is a file"));
    }
    if fs::read_dir(out).map_err(|error| Error::io(out, error))?.next().is_none() {
        return Ok(Found::Nothing);
    }
    let path = out.join(RECEIPT);
    let small = fs::metadata(&path).is_ok_and(|metadata| metadata.len() <= RECEIPT_LIMIT);
    let receipt: Option<Receipt> =
        if small { fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok()) } else { None };
    let Some(receipt) = receipt else {
        return Err(exists(out, "already holds other files"));
    };
    if receipt.source_sha256 != source_sha256 {
        return Err(exists(out, &format!("already holds the import of another source, {}", receipt.source)));
    }
    if receipt.importer != IMPORTER {
        return Err(exists(out, "was imported by another version of retort"));
    }
    for file in &receipt.files {
        if fs::metadata(out.join(&file.path)).map_or(0, |metadata| metadata.len()) != file.bytes {
            return Err(exists(out, &format!("was changed after its import: {} is not as written", file.path)));
        }
    }
    Ok(Found::Same(receipt))
}

fn exists(out: &Path, what: &str) -> Error {
    Error::new(Code::ObjectExists, format!("{}: {what}; remove it, or choose another folder with --out", out.display()))
}

/// A folder being filled; dropped before [`Stage::publish`] it removes itself.
pub(crate) struct Stage {
    folder: PathBuf,
    out: PathBuf,
    written: Vec<Written>,
    published: bool,
    // Held, not read: the operating system frees it however the process ends.
    _lock: File,
}

impl Stage {
    /// `bytes` is about what will be written: refused at once when the disk has no room for it.
    pub(crate) fn begin(out: &Path, bytes: u64) -> Result<Self> {
        let Some(name) = out.file_name() else {
            return Err(Error::new(
                Code::RequestInvalid,
                format!("\"{}\" names no folder to import into; give one with --out", out.display()),
            ));
        };
        let parent = parent(out);
        fs::create_dir_all(parent).map_err(|error| Error::io(parent, error))?;
        let mut staging = OsString::from(".");
        staging.push(name);
        staging.push(".partial");
        let folder = parent.join(staging);
        fs::create_dir_all(&folder).map_err(|error| Error::io(&folder, error))?;
        let lock = lock(&folder, out)?;
        let stage = Self { folder, out: out.to_owned(), written: Vec::new(), published: false, _lock: lock };
        stage.clear()?;
        stage.check_room(bytes)?;
        Ok(stage)
    }

    /// Creates a file to stream into; [`Stage::record`] it when it is complete.
    pub(crate) fn create(&self, name: &str) -> Result<(File, PathBuf)> {
        let path = self.folder.join(name);
        let file = File::create_new(&path).map_err(|error| Error::io(&path, error))?;
        Ok((file, path))
    }

    /// Makes a streamed file durable and part of the result.
    pub(crate) fn record(&mut self, name: &str, file: File, bytes: u64, sha256: String) -> Result<()> {
        file.sync_all().map_err(|error| Error::io(self.folder.join(name), error))?;
        self.written.push(Written { path: name.to_owned(), bytes, sha256 });
        Ok(())
    }

    pub(crate) fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        use sha2::{Digest, Sha256};
        let (mut file, path) = self.create(name)?;
        file.write_all(bytes).map_err(|error| Error::io(&path, error))?;
        self.record(name, file, bytes.len() as u64, hex(&Sha256::digest(bytes)))
    }

    /// Adds the receipt and renames the folder into place; returns the receipt.
    pub(crate) fn publish(mut self, mut receipt: Receipt) -> Result<Receipt> {
        receipt.files = self.written.clone();
        let mut text = serde_json::to_string_pretty(&receipt)
            .map_err(|error| Error::internal(format!("an import's receipt cannot be written: {error}")))?;
        text.push('\n');
        self.write(RECEIPT, text.as_bytes())?;
        let lock = self.folder.join(LOCK);
        fs::remove_file(&lock).map_err(|error| Error::io(&lock, error))?;
        sync_folder(&self.folder)?;
        fs::rename(&self.folder, &self.out).map_err(|error| match error.kind() {
            ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists | ErrorKind::NotADirectory => {
                exists(&self.out, "came to hold other files during the import")
            }
            _ => Error::io(&self.out, error),
        })?;
        self.published = true;
        sync_folder(parent(&self.out))?;
        Ok(receipt)
    }

    /// Removes what an import that was killed has left.
    fn clear(&self) -> Result<()> {
        for entry in fs::read_dir(&self.folder).map_err(|error| Error::io(&self.folder, error))? {
            let entry = entry.map_err(|error| Error::io(&self.folder, error))?;
            if entry.file_name() != LOCK {
                fs::remove_file(entry.path()).map_err(|error| Error::io(entry.path(), error))?;
            }
        }
        Ok(())
    }

    fn check_room(&self, bytes: u64) -> Result<()> {
        // A file system that cannot say how much room it has is simply tried.
        let Ok(disk) = rustix::fs::statvfs(&self.folder) else { return Ok(()) };
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        if free < bytes {
            return Err(Error::new(
                Code::DiskFull,
                format!(
                    "{}: the model needs {bytes} bytes, but the disk has {free} free; free some space, or choose another disk with --out",
                    self.out.display()
                ),
            ));
        }
        Ok(())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if !self.published
            && let Err(error) = fs::remove_dir_all(&self.folder)
        {
            tracing::warn!(folder = %self.folder.display(), %error, "an unfinished import could not be removed");
        }
    }
}

fn lock(folder: &Path, out: &Path) -> Result<File> {
    let path = folder.join(LOCK);
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|error| Error::io(&path, error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::new(
            Code::AlreadyRunning,
            format!("{}: another import into this folder is at work; wait until it is done", out.display()),
        )),
        Err(TryLockError::Error(error)) => Err(Error::io(&path, error)),
    }
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn sync_folder(path: &Path) -> Result<()> {
    File::open(path).and_then(|folder| folder.sync_all()).map_err(|error| Error::io(path, error))
}
