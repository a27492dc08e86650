//! What a failure of the object store means to the caller.

use std::{
    error::Error as StdError,
    io::{self, ErrorKind},
    path::Path,
};

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
        Some(cause) => io(&root.join(key), copy(cause)),
        None => Error::with_source(Code::StoreUnavailable, format!("{place}: the object store failed"), error),
    }
}

/// The system's word on a path of the store. All but a full disk is the fault of what the store lies on (a mount that
/// turned read-only, a server that is away) and not of the work, which waits until somebody has mended it.
pub(super) fn io(path: &Path, error: io::Error) -> Error {
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Error::io(path, error),
        _ => Error::new(
            Code::StoreUnavailable,
            format!(
                "{}: the object store cannot be used: {error}; check its disk, its mount and its permissions",
                path.display()
            ),
        ),
    }
}

/// Whether it says that something is not there, which is also so of a store that is away.
pub(super) fn is_not_found(error: &object_store::Error) -> bool {
    matches!(error, object_store::Error::NotFound { .. })
        || io_cause(error).is_some_and(|cause| cause.kind() == ErrorKind::NotFound)
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
