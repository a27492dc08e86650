//! What a failure of the object store means to the caller.

use std::{error::Error as StdError, io, path::Path};

use retort_core::{Code, Error};

/// The failure of an operation on `key`, with the place in full.
pub(super) fn error(root: &Path, key: &str, error: object_store::Error) -> Error {
    let place = root.join(key);
    let place = place.display();
    match &error {
        object_store::Error::NotFound { .. } => {
            return Error::new(Code::ObjectNotFound, format!("{place}: no such object"));
        }
        object_store::Error::AlreadyExists { .. } => {
            return Error::new(
                Code::ObjectExists,
                format!("{place}: it exists already; objects are written once and never changed"),
            );
        }
        _ => {}
    }
    match io_cause(&error) {
        Some(cause) => Error::io(root.join(key), copy(cause)),
        None => Error::with_source(Code::StoreUnavailable, format!("{place}: the object store failed"), error),
    }
}

/// The operating system's word, if one is among the causes.
fn io_cause(error: &object_store::Error) -> Option<&io::Error> {
    let mut cause: Option<&(dyn StdError + 'static)> = error.source();
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return Some(io);
        }
        cause = error.source();
    }
    None
}

fn copy(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(code) => io::Error::from_raw_os_error(code),
        None => io::Error::new(error.kind(), error.to_string()),
    }
}
