//! What goes wrong here, split by what the caller does next.

use std::path::Path;

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error("{path}: no such file or folder")]
    NotFound { path: String },
    #[error("{path}: {source}")]
    Io { path: String, source: std::io::Error },
    /// The file is not what it claims to be.
    #[error("{place}: {reason}")]
    Malformed { place: String, reason: String },
    /// A sound model that this code does not compute; computing it anyway would be wrong.
    #[error("{place}: {reason}")]
    Unsupported { place: String, reason: String },
    /// More positions than the model or the cache has.
    #[error("{0}")]
    TooLong(String),
    /// An argument of the call does not fit the model.
    #[error("{0}")]
    Invalid(String),
    #[error("{0}")]
    Device(String),
    /// A folder's config, tokenizer, chat template or weights' headers: the code says what is wrong with it.
    #[error(transparent)]
    Folder(#[from] retort_core::Error),
    /// libtorch refused, most often for want of memory.
    #[error("libtorch: {}", first_line(.0))]
    Torch(#[from] tch::TchError),
}

impl Error {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        let path = path.display().to_string();
        match source.kind() {
            std::io::ErrorKind::NotFound => Self::NotFound { path },
            _ => Self::Io { path, source },
        }
    }

    pub(crate) fn malformed(place: impl std::fmt::Display, reason: impl Into<String>) -> Self {
        Self::Malformed { place: place.to_string(), reason: reason.into() }
    }

    pub(crate) fn unsupported(place: impl std::fmt::Display, reason: impl Into<String>) -> Self {
        Self::Unsupported { place: place.to_string(), reason: reason.into() }
    }

    /// Whether room on a disk is what is missing; the same call may succeed later.
    pub fn is_disk_full(&self) -> bool {
        use std::io::ErrorKind::{QuotaExceeded, StorageFull};
        match self {
            Self::Io { source, .. } => matches!(source.kind(), StorageFull | QuotaExceeded),
            Self::Folder(error) => error.code == retort_core::Code::DiskFull,
            _ => false,
        }
    }
}

/// libtorch appends a C++ stack to its messages; the first line says what happened.
fn first_line(error: &tch::TchError) -> String {
    let text = error.to_string();
    text.lines().next().unwrap_or_default().to_owned()
}
