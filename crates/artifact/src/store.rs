//! The object store: bytes under keys, each written once.
//!
//! A local folder for now, behind the same interface that S3, GCS and Azure have. An object
//! appears under its key whole or not at all: it is written beside it, flushed to the disk
//! together with the folder that names it, and linked into place only if nothing is there. So a
//! key that can be read survives a power cut, as far as the disk keeps its word; what a killed
//! writer leaves behind is never listed.

mod fault;
mod transfer;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::{
    ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload, local::LocalFileSystem, path::Path as Key,
};
use retort_core::{Code, Error, Result};

use crate::{hash::hex, sha256_hex};

/// Objects of the store at `root`. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    inner: Arc<dyn ObjectStore>,
    root: Arc<PathBuf>,
}

/// One object of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub key: String,
    /// Bytes.
    pub size: u64,
}

impl Store {
    /// Opens a local folder, named by its path or a `file://` URL, and creates it if need be.
    pub fn open(url_or_path: &str) -> Result<Self> {
        let root = local_root(url_or_path)?;
        std::fs::create_dir_all(&root).map_err(|error| Error::io(&root, error))?;
        let root = root.canonicalize().map_err(|error| Error::io(&root, error))?;
        let inner = LocalFileSystem::new_with_prefix(&root)
            .map_err(|error| fault::error(&root, "", error))?
            .with_automatic_cleanup(true)
            .with_fsync(true);
        Ok(Self { inner: Arc::new(inner), root: Arc::new(root) })
    }

    /// Where the store lies, for messages and for people.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Writes an object that must not exist yet: `ObjectExists` if it does, `DiskFull` if it does
    /// not fit. After an error nothing is at the key that was not there before.
    pub async fn put_new(&self, key: &str, bytes: Bytes) -> Result<()> {
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        self.inner
            .put_opts(&self.key(key)?, PutPayload::from(bytes), options)
            .await
            .map_err(|error| self.fault(key, error))?;
        Ok(())
    }

    /// Reads a whole object. One larger than `max_bytes` is `ObjectTooLarge`, told from its size
    /// before any of it is read.
    pub async fn get(&self, key: &str, max_bytes: u64) -> Result<Bytes> {
        let found = self.inner.get(&self.key(key)?).await.map_err(|error| self.fault(key, error))?;
        let size = found.meta.size;
        if size > max_bytes {
            return Err(Error::new(
                Code::ObjectTooLarge,
                format!("{}: it takes {size} bytes, at most {max_bytes} are read here", self.shown(key)),
            ));
        }
        found.bytes().await.map_err(|error| self.fault(key, error))
    }

    /// [`Self::get`], refusing bytes of another SHA-256 with `ShardCorrupt`.
    pub async fn get_verified(&self, key: &str, sha256: &str, max_bytes: u64) -> Result<Bytes> {
        let bytes = self.get(key, max_bytes).await?;
        self.check_sha256(key, sha256, &sha256_hex(&bytes))?;
        Ok(bytes)
    }

    fn check_sha256(&self, key: &str, published: &str, found: &str) -> Result<()> {
        if found == published {
            return Ok(());
        }
        let message = format!("{}: it has sha256 {found}, {published} was published", self.shown(key));
        Err(Error::new(Code::ShardCorrupt, message))
    }

    /// Every object below `prefix`, by key. A prefix ends at a folder's boundary.
    pub async fn list(&self, prefix: &str) -> Result<Vec<Entry>> {
        let folder = self.key(prefix.trim_end_matches('/'))?;
        let mut entries: Vec<Entry> = self
            .inner
            .list(Some(&folder))
            .map_ok(|meta| Entry { key: meta.location.to_string(), size: meta.size })
            .try_collect()
            .await
            .map_err(|error| self.fault(prefix, error))?;
        entries.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        Ok(entries)
    }

    pub async fn exists(&self, key: &str) -> Result<bool> {
        match self.inner.head(&self.key(key)?).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(self.fault(key, error)),
        }
    }

    /// Removes an object; one that is not there is fine.
    pub async fn delete(&self, key: &str) -> Result<()> {
        match self.inner.delete(&self.key(key)?).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.fault(key, error)),
        }
    }

    /// Removes every object below `prefix`, and what killed writers left there; how many objects
    /// there were. Nobody may still be writing below it. The empty prefix is refused.
    pub async fn delete_prefix(&self, prefix: &str) -> Result<u64> {
        if prefix.trim_matches('/').is_empty() {
            return Err(Error::new(Code::RequestInvalid, "the whole object store is not to be deleted; name a prefix"));
        }
        let entries = self.list(prefix).await?;
        for entry in &entries {
            self.delete(&entry.key).await?;
        }
        let folder = self.root.join(self.key(prefix.trim_end_matches('/'))?.as_ref());
        match tokio::fs::remove_dir_all(&folder).await {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io(&folder, error)),
            _ => Ok(entries.len() as u64),
        }
    }

    /// A key as the store's own type; one with empty, `.` or `..` parts is refused.
    fn key(&self, key: &str) -> Result<Key> {
        Key::parse(key).map_err(|error| {
            let shown: String = key.chars().take(200).collect();
            Error::with_source(Code::RequestInvalid, format!("{shown:?} is no key of the object store"), error)
        })
    }

    fn fault(&self, key: &str, error: object_store::Error) -> Error {
        fault::error(&self.root, key, error)
    }

    fn shown(&self, key: &str) -> String {
        self.root.join(key).display().to_string()
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Store({})", self.root.display())
    }
}

fn local_root(url_or_path: &str) -> Result<PathBuf> {
    let unsupported = |why: &str| {
        let shown: String = url_or_path.chars().take(200).collect();
        Error::new(Code::StoreUnsupported, format!("the store {shown:?} {why}"))
    };
    if url_or_path.is_empty() {
        return Err(unsupported("is no folder; give a path or a file:// URL"));
    }
    let Some((scheme, _)) = url_or_path.split_once("://") else {
        return Ok(PathBuf::from(url_or_path));
    };
    match scheme {
        "file" => url::Url::parse(url_or_path)
            .ok()
            .and_then(|url| url.to_file_path().ok())
            .ok_or_else(|| unsupported("is no file:// URL of a folder here; write file:///path/to/folder")),
        "s3" | "s3a" | "gs" | "az" | "azure" | "abfs" | "abfss" | "http" | "https" => Err(unsupported(
            "is in the cloud; this version keeps objects in a local folder (a path or file:// URL), buckets are supported in a later one",
        )),
        _ => Err(unsupported("has an unknown scheme; give a path or a file:// URL")),
    }
}

#[cfg(test)]
mod tests;
