//! Checkpoints: a folder of files in the store, made real by a manifest that is written last.
//!
//! Files go up first, each under its own key, each create-if-absent. A prefix without a manifest
//! is therefore an upload that is still going on or was given up, and nothing reads it.

mod retention;

use std::{
    collections::BTreeSet,
    path::{Component, Path, PathBuf},
};

use bytes::Bytes;
use retort_core::{Code, Error, Result};
use serde::{Deserialize, Serialize};

pub use self::retention::{HELD_OUT, HeldOut, best, prune};
use crate::{Store, paths, sha256_file};

/// Version of the manifest that this build writes, and the newest it reads. Version 1 calls the target tokens
/// `trained_tokens`.
pub const SCHEMA_VERSION: u32 = 2;

const MAX_MANIFEST_BYTES: u64 = 16 << 20;
const MAX_FILES: usize = 10_000;

/// What a checkpoint holds. Stored as `{prefix}manifest.json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub schema_version: u32,
    pub job: String,
    /// Optimiser steps taken; 0 before training.
    pub step: u32,
    /// Fencing number of the attempt that wrote it.
    pub epoch: u64,
    /// In order of path; [`publish`] fills it.
    #[serde(default)]
    pub files: Vec<File>,
    /// Of the job's spec in canonical form: a checkpoint resumes only the job it is of.
    pub spec_sha256: String,
    /// Target tokens that the optimiser has seen, each as often as it came.
    #[serde(alias = "trained_tokens")]
    pub target_tokens: u64,
    /// Whatever else the trainer wants back.
    #[serde(flatten)]
    pub extra: serde_json::Map<String, serde_json::Value>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// Relative to the checkpoint's prefix, `/`-separated, such as `model/config.json`.
    pub path: String,
    pub bytes: u64,
    pub sha256: String,
}

/// Uploads every file below `dir`, then the manifest; the manifest as written.
///
/// A file that an earlier try of the same attempt has uploaded already is kept if it is the same.
/// `ObjectExists` if the manifest is there, or another file is.
pub async fn publish(store: &Store, prefix: &str, dir: &Path, manifest: Manifest) -> Result<Manifest> {
    put(store, prefix, dir, manifest, false).await
}

/// [`publish`] of a folder that is given up, and is gone once this succeeded. Where it lies on the store's own file
/// system its files become the objects, and none is copied.
pub async fn hand_over(store: &Store, prefix: &str, dir: &Path, manifest: Manifest) -> Result<Manifest> {
    let manifest = put(store, prefix, dir, manifest, true).await?;
    tokio::fs::remove_dir_all(dir).await.map_err(|error| Error::io(dir, error))?;
    Ok(manifest)
}

async fn put(store: &Store, prefix: &str, dir: &Path, mut manifest: Manifest, may_link: bool) -> Result<Manifest> {
    let root = dir.to_owned();
    manifest.files = blocking(move || hash_folder(&root)).await?;
    manifest.schema_version = SCHEMA_VERSION;
    let bytes = serde_json::to_vec_pretty(&manifest)
        .map_err(|error| Error::internal(format!("the manifest of {prefix} has no JSON form: {error}")))?;
    for file in &manifest.files {
        let key = format!("{prefix}{}", file.path);
        let from = dir.join(&file.path);
        let done =
            if may_link { store.link_new_file(&key, &from).await } else { store.put_new_file(&key, &from).await };
        match done {
            Err(error) if error.code == Code::ObjectExists && is_same(store, &key, file).await? => {}
            outcome => outcome?,
        }
    }
    store.put_new(&paths::manifest(prefix), Bytes::from(bytes)).await?;
    Ok(manifest)
}

/// Downloads a checkpoint into the folder `into` and verifies every file.
///
/// `ObjectNotFound` without a manifest; `CheckpointCorrupt` naming the file that is missing or is
/// not what the manifest says. Files that are there already are replaced.
pub async fn fetch(store: &Store, prefix: &str, into: &Path) -> Result<Manifest> {
    fetch_below(store, prefix, "", into).await
}

/// [`fetch`] of the files whose path begins with `below` alone, such as `model/`.
pub async fn fetch_below(store: &Store, prefix: &str, below: &str, into: &Path) -> Result<Manifest> {
    let manifest = manifest(store, prefix).await?;
    for file in manifest.files.iter().filter(|file| file.path.starts_with(below)) {
        let key = format!("{prefix}{}", file.path);
        let target = into.join(&file.path);
        // The size is looked at first, so that a file grown large does not fill the disk.
        check_size(store, &key, file).await?;
        let (_, sha256) = store.download(&key, &target).await.map_err(|error| missing(&key, error))?;
        if let Err(error) = check_sha256(&key, &sha256, file) {
            // What is wrong must not lie where a loader would find it.
            let _ = tokio::fs::remove_file(&target).await;
            return Err(error);
        }
    }
    Ok(manifest)
}

/// Reads the files whose path begins with `below`, and keeps nothing: `CheckpointCorrupt` naming the first that is
/// missing or is not what the manifest says.
pub async fn verify(store: &Store, prefix: &str, manifest: &Manifest, below: &str) -> Result<()> {
    for file in manifest.files.iter().filter(|file| file.path.starts_with(below)) {
        let key = format!("{prefix}{}", file.path);
        check_size(store, &key, file).await?;
        let sha256 = store.sha256(&key).await.map_err(|error| missing(&key, error))?;
        check_sha256(&key, &sha256, file)?;
    }
    Ok(())
}

async fn check_size(store: &Store, key: &str, file: &File) -> Result<()> {
    match store.size(key).await.map_err(|error| missing(key, error))? {
        size if size == file.bytes => Ok(()),
        size => Err(corrupt(key, format!("it takes {size} bytes, the manifest says {}", file.bytes))),
    }
}

fn check_sha256(key: &str, sha256: &str, file: &File) -> Result<()> {
    if sha256 == file.sha256 {
        return Ok(());
    }
    Err(corrupt(key, format!("it has sha256 {sha256}, the manifest says {:.64}", file.sha256)))
}

/// Reads and checks the manifest at `prefix`; `CheckpointMismatch` if it is newer than this build.
pub async fn manifest(store: &Store, prefix: &str) -> Result<Manifest> {
    let key = paths::manifest(prefix);
    let bytes = store.get(&key, MAX_MANIFEST_BYTES).await?;
    let manifest: Manifest =
        serde_json::from_slice(&bytes).map_err(|error| corrupt(&key, format!("it is no manifest: {error}")))?;
    if manifest.schema_version > SCHEMA_VERSION {
        return Err(Error::new(
            Code::CheckpointMismatch,
            format!(
                "{key}: it has schema version {}, this build reads up to {SCHEMA_VERSION}; use a newer retort",
                manifest.schema_version
            ),
        ));
    }
    if manifest.files.len() > MAX_FILES {
        return Err(corrupt(&key, format!("it lists {} files, at most {MAX_FILES}", manifest.files.len())));
    }
    let mut seen = BTreeSet::new();
    for file in &manifest.files {
        if !is_plain(&file.path) || !seen.insert(&file.path) {
            return Err(corrupt(
                &key,
                format!("it lists {:.200?}, which is no path of its own inside the checkpoint", file.path),
            ));
        }
    }
    Ok(manifest)
}

/// The job's newest checkpoint: highest step, then highest epoch. Uploads without a manifest do
/// not count; a checkpoint whose manifest is damaged is passed over with a warning.
pub async fn latest(store: &Store, job: &str) -> Result<Option<(String, Manifest)>> {
    for (step, epoch) in complete(store, job).await?.into_iter().rev() {
        let prefix = paths::checkpoint(job, step, epoch);
        match manifest(store, &prefix).await {
            Ok(manifest) => return Ok(Some((prefix, manifest))),
            Err(error) if matches!(error.code, Code::CheckpointCorrupt | Code::ObjectNotFound) => {
                tracing::warn!(job, code = %error.code, "a checkpoint is passed over: {}", error.chain());
            }
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// Removes what attempts before `epoch` left that nothing will read: checkpoints without a manifest,
/// and weights before training other than those at `initial_key`. The removed prefixes.
pub async fn sweep_superseded(store: &Store, job: &str, epoch: u64, initial_key: &str) -> Result<Vec<String>> {
    let complete = complete(store, job).await?;
    let entries = store.list(&paths::job_prefix(job)).await?;
    let stale: BTreeSet<String> = entries
        .iter()
        .filter_map(|entry| match (paths::parse_checkpoint(job, &entry.key), paths::parse_initial(job, &entry.key)) {
            (Some(of), _) if of.1 < epoch && !complete.contains(&of) => Some(paths::checkpoint(job, of.0, of.1)),
            (None, Some(of)) if of < epoch => Some(paths::initial(job, of)),
            _ => None,
        })
        .filter(|prefix| prefix != initial_key)
        .collect();
    for prefix in &stale {
        store.delete(&paths::manifest(prefix)).await?;
        store.delete_prefix(prefix).await?;
    }
    Ok(stale.into_iter().collect())
}

/// Step and epoch of every checkpoint that has a manifest, oldest first.
async fn complete(store: &Store, job: &str) -> Result<BTreeSet<(u32, u64)>> {
    let entries = store.list(&paths::checkpoints_prefix(job)).await?;
    let manifest_of = |key: &str| {
        let (step, epoch) = paths::parse_checkpoint(job, key)?;
        (key == paths::manifest(&paths::checkpoint(job, step, epoch))).then_some((step, epoch))
    };
    Ok(entries.iter().filter_map(|entry| manifest_of(&entry.key)).collect())
}

async fn is_same(store: &Store, key: &str, file: &File) -> Result<bool> {
    Ok(store.size(key).await? == file.bytes && store.sha256(key).await? == file.sha256)
}

/// Every file below `dir`, in order of path.
fn hash_folder(dir: &Path) -> Result<Vec<File>> {
    let mut files = Vec::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        let absolute = dir.join(&folder);
        for entry in std::fs::read_dir(&absolute).map_err(|error| Error::io(&absolute, error))? {
            let entry = entry.map_err(|error| Error::io(&absolute, error))?;
            let path = folder.join(entry.file_name());
            // Follows links: what they lead to is uploaded.
            let metadata = std::fs::metadata(entry.path()).map_err(|error| Error::io(entry.path(), error))?;
            if metadata.is_dir() {
                folders.push(path);
                continue;
            }
            let parts: Option<Vec<&str>> = path.iter().map(|part| part.to_str()).collect();
            let name = parts.map(|parts| parts.join("/")).filter(|name| is_plain(name) && name != "manifest.json");
            let name = name.ok_or_else(|| {
                Error::internal(format!("{}: a checkpoint cannot hold a file of this name", entry.path().display()))
            })?;
            let sha256 = sha256_file(&entry.path())?;
            files.push(File { path: name, bytes: metadata.len(), sha256 });
        }
    }
    if files.is_empty() || files.len() > MAX_FILES {
        return Err(Error::internal(format!("{}: a checkpoint of {} files", dir.display(), files.len())));
    }
    files.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

/// Whether a path stays inside the folder it is joined to, here and as a key of the store.
fn is_plain(path: &str) -> bool {
    !path.is_empty()
        && path.len() <= 1024
        && !path.contains(['\\', '\0'])
        && path.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
        && Path::new(path).components().all(|part| matches!(part, Component::Normal(_)))
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Error::internal(format!("hashing stopped: {error}")))?
}

fn missing(key: &str, error: Error) -> Error {
    if error.code == Code::ObjectNotFound { corrupt(key, "it is missing".to_owned()) } else { error }
}

fn corrupt(key: &str, why: String) -> Error {
    Error::new(Code::CheckpointCorrupt, format!("the checkpoint is corrupt: {key}: {why}"))
}

#[cfg(test)]
mod tests;
