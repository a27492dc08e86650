//! The object store: bytes under keys, each written once.
//!
//! A local folder for now, behind the same interface that S3, GCS and Azure have. An object
//! appears under its key whole or not at all: it is written beside it, flushed to the disk
//! together with the folder that names it, and linked into place only if nothing is there. So a
//! key that can be read survives a power cut, as far as the disk keeps its word; what a killed
//! writer leaves behind is never listed.
//!
//! A store may go away while it is used: a mount ends, a folder is moved. Before and after every
//! write, and before anything is said to be missing, its folder is asked whether it is still this
//! store: one that is away is `StoreUnavailable`, and nothing is made in its place.

mod fault;
mod identity;
mod transfer;

use std::{
    io::ErrorKind,
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
    /// None of a store that an older build made.
    id: Option<Arc<str>>,
}

/// One object of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub key: String,
    /// Bytes.
    pub size: u64,
}

impl Store {
    /// Opens a local folder, named by its path or a `file://` URL, and makes folder and store if
    /// need be.
    pub fn open(url_or_path: &str) -> Result<Self> {
        let root = local_root(url_or_path)?;
        std::fs::create_dir_all(&root).map_err(|error| match error.kind() {
            ErrorKind::AlreadyExists | ErrorKind::NotADirectory => unsupported(url_or_path, NO_FOLDER),
            _ => fault::io(&root, error),
        })?;
        let id = identity::make(&root)?;
        Self::at(&root, Some(id))
    }

    /// Opens a store that somebody else has made; nothing is written.
    ///
    /// Errors: `StoreUnavailable` when it is not there, which a folder without a store in it is too.
    pub fn open_existing(url_or_path: &str) -> Result<Self> {
        let root = local_root(url_or_path)?;
        let id = identity::find(&root)?;
        Self::at(&root, id)
    }

    /// Whether the address is one that this version can use; nothing is looked at.
    pub fn check_address(url_or_path: &str) -> Result<()> {
        local_root(url_or_path).map(drop)
    }

    fn at(root: &Path, id: Option<String>) -> Result<Self> {
        let root = root.canonicalize().map_err(|error| fault::io(root, error))?;
        let inner = LocalFileSystem::new_with_prefix(&root)
            .map_err(|error| fault::error(&root, "", error))?
            .with_automatic_cleanup(true)
            .with_fsync(true);
        Ok(Self { inner: Arc::new(inner), root: Arc::new(root), id: id.map(Arc::from) })
    }

    /// Where the store lies, for messages and for people.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Writes an object that must not exist yet: `ObjectExists` if it does, `DiskFull` if it does
    /// not fit; then nothing is at the key that was not there before.
    pub async fn put_new(&self, key: &str, bytes: Bytes) -> Result<()> {
        let at = self.key(key)?;
        self.check().await?;
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        let put = self.inner.put_opts(&at, PutPayload::from(bytes), options).await;
        self.told(key, put).await?;
        // Written while the store went away, it lies elsewhere.
        self.check().await
    }

    /// Reads a whole object. One larger than `max_bytes` is `ObjectTooLarge`, told from its size
    /// before any of it is read.
    pub async fn get(&self, key: &str, max_bytes: u64) -> Result<Bytes> {
        let found = self.told(key, self.inner.get(&self.key(key)?).await).await?;
        let size = found.meta.size;
        if size > max_bytes {
            return Err(Error::new(
                Code::ObjectTooLarge,
                format!("{}: it takes {size} bytes, at most {max_bytes} are read here", self.shown(key)),
            ));
        }
        self.told(key, found.bytes().await).await
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
        let listed: object_store::Result<Vec<Entry>> = self
            .inner
            .list(Some(&folder))
            .map_ok(|meta| Entry { key: meta.location.to_string(), size: meta.size })
            .try_collect()
            .await;
        let mut entries = self.told(prefix, listed).await?;
        self.check().await?;
        entries.retain(|entry| entry.key != identity::FILE);
        entries.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        Ok(entries)
    }

    pub async fn exists(&self, key: &str) -> Result<bool> {
        match self.inner.head(&self.key(key)?).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => self.check().await.map(|()| false),
            Err(error) => Err(self.fault(key, error).await),
        }
    }

    /// Removes an object; one that is not there is fine.
    pub async fn delete(&self, key: &str) -> Result<()> {
        match self.inner.delete(&self.key(key)?).await {
            Ok(()) => Ok(()),
            Err(object_store::Error::NotFound { .. }) => self.check().await,
            Err(error) => Err(self.fault(key, error).await),
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
            Err(error) if error.kind() != ErrorKind::NotFound => Err(fault::io(&folder, error)),
            _ => Ok(entries.len() as u64),
        }
    }

    /// A key as the store's own type; one with empty, `.` or `..` parts is refused, and so is the
    /// store's mark.
    fn key(&self, key: &str) -> Result<Key> {
        let refused = || {
            let shown: String = key.chars().take(200).collect();
            format!("{shown:?} is no key of the object store")
        };
        match Key::parse(key) {
            Ok(parsed) if parsed.as_ref() == identity::FILE => Err(Error::new(Code::RequestInvalid, refused())),
            Ok(parsed) => Ok(parsed),
            Err(error) => Err(Error::with_source(Code::RequestInvalid, refused(), error)),
        }
    }

    /// `StoreUnavailable` unless the store that was opened is still in its folder.
    async fn check(&self) -> Result<()> {
        let (root, id) = (Arc::clone(&self.root), self.id.clone());
        tokio::task::spawn_blocking(move || identity::check(&root, id.as_deref()))
            .await
            .map_err(|error| Error::internal(format!("looking at the object store stopped: {error}")))?
    }

    async fn told<T>(&self, key: &str, done: object_store::Result<T>) -> Result<T> {
        match done {
            Ok(done) => Ok(done),
            Err(error) => Err(self.fault(key, error).await),
        }
    }

    /// What a failure means. Nothing is missing in a store that is away.
    async fn fault(&self, key: &str, error: object_store::Error) -> Error {
        if fault::is_not_found(&error)
            && let Err(away) = self.check().await
        {
            return away;
        }
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

const NO_FOLDER: &str = "is no folder; give a path or a file:// URL";

fn unsupported(url_or_path: &str, why: &str) -> Error {
    let shown: String = url_or_path.chars().take(200).collect();
    Error::new(Code::StoreUnsupported, format!("the store {shown:?} {why}"))
}

fn local_root(url_or_path: &str) -> Result<PathBuf> {
    let unsupported = |why: &str| unsupported(url_or_path, why);
    if url_or_path.is_empty() {
        return Err(unsupported(NO_FOLDER));
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
