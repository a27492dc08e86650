//! SHA-256 of files and of lists of files, in lower-case hex.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use retort_core::{Error, Result};
use sha2::{Digest, Sha256};

const CHUNK: usize = 1 << 20;

/// Of a whole file; `advance` is told the bytes of every chunk read.
pub(crate) fn sha256_file(path: &Path, advance: &mut dyn FnMut(u64)) -> Result<String> {
    let mut file = File::open(path).map_err(|error| Error::io(path, error))?;
    let mut hasher = Sha256::new();
    let mut chunk = vec![0; CHUNK];
    loop {
        let read = file.read(&mut chunk).map_err(|error| Error::io(path, error))?;
        if read == 0 {
            return Ok(hex(&hasher.finalize()));
        }
        hasher.update(&chunk[..read]);
        advance(read as u64);
    }
}

/// Of a list of `(name, sha256)` in the order given.
pub(crate) fn sha256_list<'a>(files: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    let mut hasher = Sha256::new();
    for (name, sha256) in files {
        hasher.update(format!("{sha256}  {name}\n"));
    }
    hex(&hasher.finalize())
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
