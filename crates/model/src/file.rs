//! The small files of a model's folder, read with a bound on their size.

use std::{fs::File, io::Read as _, path::Path};

use retort_core::{Code, Error, Result};
use serde_json::Value;

/// Opens a regular file. Anything else is refused before it is opened: to open a pipe waits for its other end.
///
/// # Errors
/// `file-not-found`, or `file-unreadable` for a folder, a pipe, a device or what may not be read.
pub fn open_regular(path: &Path) -> Result<File> {
    let failed = |error| Error::io(path, error);
    if !std::fs::metadata(path).map_err(failed)?.is_file() {
        return Err(Error::new(Code::FileUnreadable, format!("{}: it is no regular file", path.display())));
    }
    File::open(path).map_err(failed)
}

/// A whole file of at most `most` bytes.
pub(crate) fn read(path: &Path, most: u64) -> Result<Vec<u8>> {
    let failed = |error| Error::io(path, error);
    let mut bytes = Vec::new();
    open_regular(path)?.take(most + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > most {
        return Err(malformed(path.display(), format!("is larger than {most} bytes, which no such file is")));
    }
    Ok(bytes)
}

/// A JSON file of at most `most` bytes.
pub(crate) fn read_json(path: &Path, most: u64) -> Result<Value> {
    serde_json::from_slice(&read(path, most)?).map_err(|error| malformed(path.display(), error.to_string()))
}

/// As [`read_json`]; null where there is no file.
pub(crate) fn read_json_if_there(path: &Path, most: u64) -> Result<Value> {
    if path.exists() { read_json(path, most) } else { Ok(Value::Null) }
}

pub(crate) fn malformed(place: impl std::fmt::Display, reason: impl std::fmt::Display) -> Error {
    Error::new(Code::ModelMalformed, format!("{place}: {reason}"))
}

pub(crate) fn unsupported(place: impl std::fmt::Display, reason: impl std::fmt::Display) -> Error {
    Error::new(Code::ModelUnsupported, format!("{place}: {reason}"))
}
