//! Paths of a spec, and the prompt file at one of them.

use std::{
    io::Read as _,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use retort_artifact::{Store, prompts::MAX_FILE_BYTES};
use retort_core::{Code, Error, Result};
use retort_model::open_regular;

use super::PromptFile;

/// An absolute path, or a `file://` URL.
pub fn local(field: &str, text: &str) -> Result<PathBuf> {
    let path = if text.starts_with("file://") {
        url::Url::parse(text).ok().and_then(|url| url.to_file_path().ok()).ok_or_else(|| {
            Error::new(Code::SpecInvalid, format!("{field} is {:?}, no file:// URL of this machine", shown(text)))
        })?
    } else {
        PathBuf::from(text)
    };
    if path.is_absolute() {
        Ok(path)
    } else {
        Err(Error::new(
            Code::SpecInvalid,
            format!("{field} is {:?}; write an absolute path or a file:// URL", shown(text)),
        ))
    }
}

/// The bytes of a prompt file: a local one, or `store://key`, one in the object store.
pub async fn read_prompts(store: &Store, text: &str) -> Result<PromptFile> {
    if let Some(key) = text.strip_prefix("store://") {
        return Ok(PromptFile { name: text.to_owned(), text: store.get(key, MAX_FILE_BYTES).await? });
    }
    let path = local("prompts.path", text)?;
    let read = tokio::task::spawn_blocking(move || read(&path)).await;
    let read = read.map_err(|error| Error::internal(format!("reading the prompt file failed: {error}")))?;
    Ok(PromptFile { name: text.to_owned(), text: read? })
}

/// Blocks.
fn read(path: &Path) -> Result<Bytes> {
    let failed = |error| Error::io(path, error);
    let file = open_regular(path)?;
    let mut text = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut text).map_err(failed)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(Error::new(
            Code::PromptMalformed,
            format!("{}: it takes more than {MAX_FILE_BYTES} bytes; split it into several jobs", path.display()),
        ));
    }
    Ok(Bytes::from(text))
}

fn shown(text: &str) -> String {
    text.chars().take(200).collect()
}
