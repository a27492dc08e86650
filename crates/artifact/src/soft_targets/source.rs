//! Where a shard's bytes are: in memory, or in a file that is read piece by piece.

use std::{fs::File, io, os::unix::fs::FileExt as _, path::Path, sync::Arc};

use bytes::{Buf as _, Bytes};
use parquet::{
    errors::{ParquetError, Result as ParquetResult},
    file::reader::{ChunkReader, Length},
};
use retort_core::{Error, Result};
use sha2::{Digest as _, Sha256};

use crate::hash::hex;

/// Of what is hashed, at once.
const PIECE: usize = 256 << 10;

/// A shard's bytes; cheap to clone.
#[derive(Clone, Debug)]
pub enum Source {
    Bytes(Bytes),
    /// A file and its length when it was opened.
    File(Arc<File>, u64),
}

impl Source {
    /// Opens a file; reading takes only the piece asked for.
    pub fn open(path: &Path) -> Result<Self> {
        File::open(path).and_then(Self::of_file).map_err(|error| Error::io(path, error))
    }

    /// Of an open file.
    pub fn of_file(file: File) -> io::Result<Self> {
        let length = file.metadata()?.len();
        Ok(Self::File(Arc::new(file), length))
    }

    /// SHA-256 of all of it, in hexadecimal.
    pub fn sha256(&self) -> Result<String> {
        Ok(hex(&self.hash(self.len())?.finalize()))
    }

    /// A hasher that has seen the bytes before `end`.
    pub(super) fn hash(&self, end: u64) -> Result<Sha256> {
        let mut hasher = Sha256::new();
        let mut piece = vec![0; PIECE.min(end as usize)];
        let mut at = 0;
        while at < end {
            let length = (end - at).min(PIECE as u64) as usize;
            self.read_exact_at(&mut piece[..length], at).map_err(|error| Error::io("the shard", error))?;
            hasher.update(&piece[..length]);
            at += length as u64;
        }
        Ok(hasher)
    }

    /// Reads all of a file, for its errors' sake.
    pub(super) fn check_readable(&self) -> io::Result<()> {
        let Self::File(_, length) = self else { return Ok(()) };
        let mut piece = vec![0; PIECE];
        for at in (0..*length).step_by(PIECE) {
            let left = (*length - at).min(PIECE as u64) as usize;
            self.read_exact_at(&mut piece[..left], at)?;
        }
        Ok(())
    }

    /// Fills `into` from `offset` on.
    pub(super) fn read_exact_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        match self {
            Self::Bytes(bytes) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX);
                let piece = start.checked_add(into.len()).and_then(|end| bytes.get(start..end));
                into.copy_from_slice(piece.ok_or(io::ErrorKind::UnexpectedEof)?);
                Ok(())
            }
            Self::File(file, _) => file.read_exact_at(into, offset),
        }
    }
}

impl From<Bytes> for Source {
    fn from(bytes: Bytes) -> Self {
        Self::Bytes(bytes)
    }
}

impl From<Vec<u8>> for Source {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Bytes(bytes.into())
    }
}

impl Length for Source {
    fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File(_, length) => *length,
        }
    }
}

impl ChunkReader for Source {
    type T = Cursor;

    fn get_read(&self, start: u64) -> ParquetResult<Cursor> {
        Ok(Cursor { source: self.clone(), at: start })
    }

    /// `length` is held against the source's own before memory is taken.
    fn get_bytes(&self, start: u64, length: usize) -> ParquetResult<Bytes> {
        if start.checked_add(length as u64).is_none_or(|end| end > self.len()) {
            return Err(ParquetError::EOF(format!("{length} bytes at {start} of {}", self.len())));
        }
        match self {
            Self::Bytes(bytes) => Ok(bytes.slice(start as usize..start as usize + length)),
            Self::File(..) => {
                let mut piece = vec![0; length];
                self.read_exact_at(&mut piece, start)?;
                Ok(piece.into())
            }
        }
    }
}

/// Reads on from a place.
pub struct Cursor {
    source: Source,
    at: u64,
}

impl io::Read for Cursor {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = match &self.source {
            Source::Bytes(bytes) => {
                let start = usize::try_from(self.at).unwrap_or(usize::MAX).min(bytes.len());
                let mut rest = &bytes[start..];
                let length = rest.len().min(into.len());
                rest.copy_to_slice(&mut into[..length]);
                length
            }
            Source::File(file, _) => file.read_at(into, self.at)?,
        };
        self.at += read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn a_file_and_memory_read_alike_and_refuse_what_is_not_there() {
        let bytes: Vec<u8> = (0..=255).cycle().take(10_000).collect();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &bytes).unwrap();
        for source in [Source::from(Bytes::from(bytes.clone())), Source::open(file.path()).unwrap()] {
            assert_eq!(source.len(), 10_000);
            assert_eq!(source.get_bytes(9000, 1000).unwrap(), bytes[9000..]);
            assert!(source.get_bytes(9000, 1001).is_err());
            assert!(source.get_bytes(u64::MAX, 2).is_err());
            assert!(source.read_exact_at(&mut [0; 2], 9999).is_err());
            let mut rest = Vec::new();
            source.get_read(7).unwrap().read_to_end(&mut rest).unwrap();
            assert_eq!(rest, bytes[7..]);
        }
        assert!(Source::open(Path::new("/nowhere")).is_err());
    }
}
