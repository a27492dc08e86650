//! The name of a model's weights: one hash, whatever files they lie in.

use std::path::Path;

use sha2::{Digest, Sha256};

use crate::{Result, weights::Folder};

/// SHA-256, in hexadecimal, over a folder's tensors in the order of their names: name, dtype,
/// shape and bytes. Splitting a checkpoint into several files, or padding its header, keeps it.
pub fn folder_sha256(dir: &Path) -> Result<String> {
    let folder = Folder::open(dir)?;
    let mut hasher = Sha256::new();
    for name in folder.names() {
        let Some((entry, bytes, _)) = folder.get(name) else { continue };
        hasher.update((name.len() as u64).to_le_bytes());
        hasher.update(name);
        hasher.update(format!("{} {:?} ", entry.dtype.name(), entry.shape));
        hasher.update(bytes);
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
