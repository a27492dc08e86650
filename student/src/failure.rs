//! Errors of the libraries below, in retort's words.

use std::io::ErrorKind::{QuotaExceeded, StorageFull};

use retort_core::{Code, Error};
use tch::TchError;

/// What libtorch refused, and while doing what. Its C++ stack is left out.
pub(crate) fn torch(what: &'static str) -> impl Fn(TchError) -> Error {
    move |error| {
        if let TchError::Io(io) = &error
            && matches!(io.kind(), StorageFull | QuotaExceeded)
        {
            return Error::new(Code::DiskFull, format!("{what}: the disk is full; free some space"));
        }
        Error::internal(format!("{what}: {}", first_line(&error)))
    }
}

/// Without the stack that libtorch writes below.
pub(crate) fn first_line(error: &TchError) -> String {
    error.to_string().lines().next().unwrap_or("libtorch gave no reason").to_owned()
}

/// What became of a model or tokenizer folder.
pub(crate) fn llama(error: impl Into<retort_llama::Error>) -> Error {
    use retort_llama::Error as Llama;
    let error = error.into();
    let code = match &error {
        Llama::Folder(error) => error.code,
        Llama::NotFound { .. } => Code::FileNotFound,
        Llama::Io { .. } if error.is_disk_full() => Code::DiskFull,
        Llama::Io { .. } => Code::FileUnreadable,
        Llama::Malformed { .. } => Code::ModelMalformed,
        Llama::Unsupported { .. } => Code::ModelUnsupported,
        Llama::TooLong(_) => Code::PromptTooLong,
        Llama::Device(_) => Code::DeviceUnavailable,
        _ => Code::Internal,
    };
    let way_out = if code == Code::DiskFull { "; free some space: finished work is kept" } else { "" };
    Error::new(code, format!("{error}{way_out}"))
}
