//! The name of a model's weights: one hash, whatever files they lie in and whoever reads them.
//!
//! The hash is taken over the tensors' own hashes, so that processes that hold a few layers each can
//! work it out together, and none reads what another holds.

use std::{
    path::Path,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
};

use sha2::{Digest, Sha256};

use crate::{Error, Result, weights::Folder};

/// Bytes read between two looks at how far it is.
const READ: usize = 16 << 20;
/// Bytes of each place that [`folder_print`] looks at, and how many places a tensor has.
const PRINT: (usize, usize) = (64, 4);

/// What one tensor of a folder is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorHash {
    pub name: String,
    /// As stored: `F32 [3, 4]`.
    pub shape: String,
    /// Of its bytes.
    pub sha256: [u8; 32],
}

/// SHA-256, in hexadecimal, over a folder's tensors in the order of their names: name, dtype, shape and
/// the SHA-256 of their bytes. Splitting a checkpoint into several files, or padding its header, keeps it.
/// `progress` is as in [`tensor_hashes`].
pub fn folder_sha256(dir: &Path, progress: impl Fn(u64, u64) + Sync) -> Result<String> {
    let tensors = tensor_hashes(dir, |_| true, progress)?;
    Ok(tensors_sha256(tensors.iter().map(|tensor| (tensor.name.as_str(), tensor.shape.as_str(), &tensor.sha256[..]))))
}

/// [`folder_sha256`] from the hashes of all its tensors `(name, shape, sha256)`, in the order of their
/// names.
pub fn tensors_sha256<'a>(tensors: impl IntoIterator<Item = (&'a str, &'a str, &'a [u8])>) -> String {
    let mut hasher = Sha256::new();
    for (name, shape, sha256) in tensors {
        hasher.update((name.len() as u64).to_le_bytes());
        hasher.update(name);
        hasher.update(format!("{shape} "));
        hasher.update(sha256);
    }
    hex(&hasher.finalize())
}

/// The hashes of a folder's `wanted` tensors, by name; no other tensor is read. `progress` hears, from any
/// thread, how many bytes are read of how many.
pub fn tensor_hashes(
    dir: &Path,
    wanted: impl Fn(&str) -> bool,
    progress: impl Fn(u64, u64) + Sync,
) -> Result<Vec<TensorHash>> {
    let folder = Folder::open(dir)?;
    let names: Vec<&str> = folder.names().filter(|name| wanted(name)).collect();
    let total = names.iter().filter_map(|name| folder.get(name)).map(|(_, bytes)| bytes.len() as u64).sum();
    let read = AtomicU64::new(0);
    let sha256 = |bytes: &[u8]| {
        let mut hasher = Sha256::new();
        for bytes in bytes.chunks(READ) {
            hasher.update(bytes);
            let before = read.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            progress(before + bytes.len() as u64, total);
        }
        hasher.finalize().into()
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(names.len()).min(16);
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        while let Some(name) = names.get(next.fetch_add(1, Ordering::Relaxed)) {
            let Some((entry, bytes)) = folder.get(name) else { continue };
            let shape = format!("{} {:?}", entry.dtype.name(), entry.shape);
            done.push(TensorHash { name: (*name).to_owned(), shape, sha256: sha256(bytes) });
        }
        done
    };
    let mut hashes = Vec::with_capacity(names.len());
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        for thread in threads {
            let done = thread.join().map_err(|_| Error::Invalid("hashing the weights panicked".into()))?;
            hashes.extend(done);
        }
        Ok::<_, Error>(())
    })?;
    hashes.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(hashes)
}

/// SHA-256, in hexadecimal, over every tensor's name, dtype and shape and a few of its bytes: it tells
/// one checkpoint from another after a look, and does not prove that two are the same.
pub fn folder_print(dir: &Path) -> Result<String> {
    let folder = Folder::open(dir)?;
    let mut hasher = Sha256::new();
    let (size, places) = PRINT;
    for name in folder.names() {
        let Some((entry, bytes)) = folder.get(name) else { continue };
        hasher.update((name.len() as u64).to_le_bytes());
        hasher.update(name);
        hasher.update(format!("{} {:?} ", entry.dtype.name(), entry.shape));
        let last = bytes.len().saturating_sub(size);
        for place in 0..places {
            let start = last / (places - 1) * place;
            hasher.update(&bytes[start..(start + size).min(bytes.len())]);
        }
    }
    Ok(hex(&hasher.finalize()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
