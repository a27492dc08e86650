//! Shards on a disk: found, read, and told by name when they are wrong.

use std::path::{Path, PathBuf};

use retort_artifact::soft_targets::{self, Limits, Reader, Shard, Source};
use retort_core::{Code, Error, Result};

use crate::text::bytes;

/// Folders inside folders that are looked into.
const MAX_DEPTH: usize = 16;

/// The files named, and below a folder named every `*.parquet`, in order.
pub fn find(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in paths {
        let before = files.len();
        if path.is_dir() {
            walk(path, MAX_DEPTH, &mut files)?;
            if files.len() == before {
                return Err(Error::new(Code::FileNotFound, format!("{}: no *.parquet lies below it", path.display())));
            }
            files[before..].sort();
        } else {
            files.push(path.clone());
        }
    }
    Ok(files)
}

fn walk(folder: &Path, depth: usize, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(folder).map_err(|error| Error::io(folder, error))? {
        let entry = entry.map_err(|error| Error::io(folder, error))?;
        let (path, kind) = (entry.path(), entry.file_type().map_err(|error| Error::io(entry.path(), error))?);
        if kind.is_dir() && depth > 0 {
            walk(&path, depth - 1, files)?;
        } else if kind.is_file() && path.extension().is_some_and(|extension| extension == "parquet") {
            files.push(path);
        }
    }
    Ok(())
}

/// A regular file no larger than a shard may be, to be read piece by piece.
pub fn open(path: &Path) -> Result<Source> {
    let max_bytes = Limits::default().max_bytes;
    // Asked before it is opened: opening a pipe waits for its other end.
    let metadata = std::fs::metadata(path).map_err(|error| Error::io(path, error))?;
    if !metadata.is_file() {
        return Err(Error::new(Code::FileUnreadable, format!("{}: a shard is a regular file", path.display())));
    }
    let size = metadata.len();
    if size > max_bytes {
        let message =
            format!("{}: {} are more than a shard may have ({})", path.display(), bytes(size), bytes(max_bytes));
        return Err(Error::new(Code::FileUnreadable, message));
    }
    Source::open(path)
}

/// A file's rows, row group by row group.
pub fn reader(path: &Path) -> Result<Reader> {
    Reader::open(open(path)?, Limits::default()).map_err(|error| named(path, &error))
}

/// The whole shard.
pub fn decode(path: &Path) -> Result<Shard> {
    soft_targets::decode(open(path)?, Limits::default()).map_err(|error| named(path, &error))
}

/// The error with the file's name before it.
pub fn named(path: &Path, error: &Error) -> Error {
    Error::new(error.code, format!("{}: {}", path.display(), error.chain()))
}
