//! Objects too large for memory: between files and the store, and inside it.

use std::{
    fs::Metadata,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use futures::{TryStreamExt, stream::BoxStream};
use object_store::{CopyMode, CopyOptions, GetResult, ObjectStore, ObjectStoreExt, WriteMultipart};
use retort_core::{Code, Error, Result};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{Store, fault, hex};
use crate::paths;

/// Bytes read and sent at a time.
const PIECE: usize = 8 << 20;
/// Pieces on their way at once.
const IN_FLIGHT: usize = 2;

impl Store {
    /// Writes a file's content as an object that must not exist yet, without holding it in
    /// memory. Errors as [`Self::put_new`]; a file that cannot be read is named.
    pub async fn put_new_file(&self, key: &str, file: &Path) -> Result<()> {
        self.put_staged(key, file, false).await
    }

    /// [`Self::put_new_file`] of a file that nobody writes to again: where it lies on the store's own file system
    /// it becomes the object itself, and none of it is copied.
    pub async fn link_new_file(&self, key: &str, file: &Path) -> Result<()> {
        self.put_staged(key, file, true).await
    }

    async fn put_staged(&self, key: &str, file: &Path, may_link: bool) -> Result<()> {
        let to = self.key(key)?;
        // Spares a long upload that is sure to be refused; the copy below is what decides.
        if self.exists(key).await? {
            let exists = object_store::Error::AlreadyExists { path: key.to_owned(), source: "".into() };
            return Err(self.fault(key, exists).await);
        }
        let staged = self.key(&paths::staging(&unique()))?;
        let linked = if may_link { self.link(&staged, file).await } else { Ok(false) };
        let uploaded = match linked {
            Ok(false) => self.upload(key, &staged, file).await,
            linked => linked.map(drop),
        };
        let published = match uploaded {
            Ok(()) => {
                let create = CopyOptions { mode: CopyMode::Create, ..CopyOptions::default() };
                self.told(key, self.inner.copy_opts(&staged, &to, create).await).await
            }
            Err(error) => Err(error),
        };
        if let Err(error) = self.delete(staged.as_ref()).await {
            tracing::warn!(key = %staged, "a staged upload was left behind: {}", error.chain());
        }
        published?;
        // Written while the store went away, it lies elsewhere.
        self.check().await
    }

    /// Writes an object's content to a file, which appears whole or not at all; its size.
    pub async fn get_to_file(&self, key: &str, file: &Path) -> Result<u64> {
        Ok(self.download(key, file).await?.0)
    }

    /// [`Self::get_to_file`] that hashes what it writes: size and SHA-256.
    pub(crate) async fn download(&self, key: &str, file: &Path) -> Result<(u64, String)> {
        let found = self.told(key, self.inner.get(&self.key(key)?).await).await?;
        if let Some(folder) = file.parent() {
            tokio::fs::create_dir_all(folder).await.map_err(|error| Error::io(folder, error))?;
        }
        let part = beside(file);
        let written = async {
            let mut out = tokio::fs::File::create(&part).await.map_err(|error| Error::io(&part, error))?;
            let (size, sha256) = self.pour(key, found, &mut out, file).await?;
            out.sync_all().await.map_err(|error| Error::io(file, error))?;
            tokio::fs::rename(&part, file).await.map_err(|error| Error::io(file, error))?;
            Ok((size, sha256))
        }
        .await;
        if written.is_err() {
            // The first error is the one worth telling; the part file may not even exist.
            let _ = tokio::fs::remove_file(&part).await;
        }
        written
    }

    /// An object that was published with this size and SHA-256, in a file in `folder`; another one is
    /// `ShardCorrupt`. The file has no name: its space is free again once it is closed.
    pub async fn get_verified_file(&self, key: &str, sha256: &str, bytes: u64, folder: &Path) -> Result<std::fs::File> {
        let found = self.told(key, self.inner.get(&self.key(key)?).await).await?;
        let size = found.meta.size;
        if size != bytes {
            let message = format!("{}: it takes {size} bytes, {bytes} were published", self.shown(key));
            return Err(Error::new(Code::ShardCorrupt, message));
        }
        let file = tempfile::tempfile_in(folder).map_err(|error| Error::io(folder, error))?;
        let mut out = tokio::fs::File::from_std(file);
        let (_, hashed) = self.pour(key, found, &mut out, folder).await?;
        self.check_sha256(key, sha256, &hashed)?;
        Ok(out.into_std().await)
    }

    /// All of an object into `out`, which lies at `place`; its size and SHA-256.
    async fn pour(
        &self,
        key: &str,
        found: GetResult,
        out: &mut tokio::fs::File,
        place: &Path,
    ) -> Result<(u64, String)> {
        let size = found.meta.size;
        let (mut pieces, mut left, mut hasher) = (found.into_stream(), size, Sha256::new());
        while let Some(piece) = self.next_piece(key, &mut pieces, &mut left).await? {
            hasher.update(&piece);
            out.write_all(&piece).await.map_err(|error| Error::io(place, error))?;
        }
        out.flush().await.map_err(|error| Error::io(place, error))?;
        Ok((size, hex(&hasher.finalize())))
    }

    /// Copies every object below `from` to the same place below `to`; how many. Objects that are
    /// at their place already, with the same size, are left, so a broken copy can be finished.
    pub async fn copy_prefix(&self, from: &str, to: &str) -> Result<u64> {
        let (from, to) = (from.trim_end_matches('/'), to.trim_end_matches('/'));
        let entries = self.list(from).await?;
        if entries.is_empty() {
            return Err(Error::new(Code::ObjectNotFound, format!("{}: there is nothing to copy", self.shown(from))));
        }
        for entry in &entries {
            let key = format!("{to}{}", &entry.key[from.len()..]);
            let create = CopyOptions { mode: CopyMode::Create, ..CopyOptions::default() };
            match self.inner.copy_opts(&self.key(&entry.key)?, &self.key(&key)?, create).await {
                Ok(()) => {}
                Err(object_store::Error::AlreadyExists { .. }) if self.size(&key).await? == entry.size => {}
                Err(error) => return Err(self.fault(&key, error).await),
            }
        }
        Ok(entries.len() as u64)
    }

    /// Removes uploads that nobody has written to, or linked, for `idle`: their writers were killed. How many.
    pub async fn sweep_staging(&self, idle: Duration) -> Result<u64> {
        // What is half written has no key yet, so the folder itself is read.
        let folder = self.root().join(paths::staging(""));
        let mut entries = match tokio::fs::read_dir(&folder).await {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
            Err(error) => return Err(Error::io(&folder, error)),
        };
        let mut removed = 0;
        while let Some(entry) = entries.next_entry().await.map_err(|error| Error::io(&folder, error))? {
            // What vanishes meanwhile was finished by its writer.
            let Ok(metadata) = entry.metadata().await else { continue };
            let age = touched(&metadata).and_then(|at| at.elapsed().ok()).unwrap_or_default();
            if metadata.is_file() && age >= idle && tokio::fs::remove_file(entry.path()).await.is_ok() {
                removed += 1;
            }
        }
        Ok(removed)
    }

    pub(crate) async fn size(&self, key: &str) -> Result<u64> {
        Ok(self.told(key, self.inner.head(&self.key(key)?).await).await?.size)
    }

    /// SHA-256 of an object, read in pieces.
    pub(crate) async fn sha256(&self, key: &str) -> Result<String> {
        let found = self.told(key, self.inner.get(&self.key(key)?).await).await?;
        let mut left = found.meta.size;
        let (mut pieces, mut hasher) = (found.into_stream(), Sha256::new());
        while let Some(piece) = self.next_piece(key, &mut pieces, &mut left).await? {
            hasher.update(&piece);
        }
        Ok(hex(&hasher.finalize()))
    }

    /// The next bytes of an object of which `left` are to come; `None` after the last. The stream of a
    /// file that was cut short meanwhile never ends by itself.
    async fn next_piece(
        &self,
        key: &str,
        pieces: &mut BoxStream<'_, object_store::Result<Bytes>>,
        left: &mut u64,
    ) -> Result<Option<Bytes>> {
        if *left == 0 {
            return Ok(None);
        }
        let piece = self.told(key, pieces.try_next().await).await?.unwrap_or_default();
        if piece.is_empty() {
            let message = format!("{}: it ended {left} bytes early while it was read", self.shown(key));
            return Err(Error::new(Code::StoreUnavailable, message));
        }
        *left = left.saturating_sub(piece.len() as u64);
        Ok(Some(piece))
    }

    /// Gives a file a second name in the store, and flushes it to the disk; false where that cannot be done, on
    /// another file system or of what is no plain file.
    async fn link(&self, staged: &object_store::path::Path, file: &Path) -> Result<bool> {
        let metadata = tokio::fs::symlink_metadata(file).await.map_err(|error| Error::io(file, error))?;
        if !metadata.is_file() {
            return Ok(false);
        }
        let to = self.root().join(staged.as_ref());
        // One deep: a root that is gone is not made again. Where there is no folder then, the copy says why.
        if let Some(folder) = to.parent() {
            let _ = tokio::fs::create_dir(folder).await;
        }
        if tokio::fs::hard_link(file, &to).await.is_err() {
            return Ok(false);
        }
        let flushed = async { tokio::fs::File::open(&to).await?.sync_all().await };
        flushed.await.map_err(|error| fault::io(&to, error))?;
        Ok(true)
    }

    async fn upload(&self, key: &str, staged: &object_store::path::Path, file: &Path) -> Result<()> {
        let mut input = tokio::fs::File::open(file).await.map_err(|error| Error::io(file, error))?;
        self.check().await?;
        let upload = self.told(key, self.inner.put_multipart(staged).await).await?;
        let mut upload = WriteMultipart::new_with_chunk_size(upload, PIECE);
        let mut piece = vec![0u8; PIECE];
        loop {
            let read = match input.read(&mut piece).await {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) => return Err(aborted(upload, Error::io(file, error)).await),
            };
            upload.write(&piece[..read]);
            if let Err(error) = upload.wait_for_capacity(IN_FLIGHT).await {
                let error = self.fault(key, error).await;
                return Err(aborted(upload, error).await);
            }
        }
        self.told(key, upload.finish().await).await.map(drop)
    }
}

/// Takes back what an upload has stored so far; the error that ended it.
async fn aborted(upload: WriteMultipart, error: Error) -> Error {
    if let Err(abort) = upload.abort().await {
        tracing::warn!("an upload could not be taken back: {abort}");
    }
    error
}

/// When a file was last written to or given a name. A link leaves the time of writing as it was, maybe long ago, and
/// renews that of the last change, which the file system keeps by itself.
fn touched(file: &Metadata) -> Option<SystemTime> {
    let since = Duration::new(u64::try_from(file.ctime()).ok()?, u32::try_from(file.ctime_nsec()).ok()?);
    UNIX_EPOCH.checked_add(since).max(file.modified().ok())
}

/// A name that no other process, nor an earlier one of the same id, uses.
fn unique() -> String {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("{}-{}-{}", since.as_nanos(), std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

fn beside(file: &Path) -> PathBuf {
    let mut name = file.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.part", unique()));
    file.with_file_name(name)
}
