//! Training rows on local disk: appended as shards arrive, read back in any order.
//!
//! Passes after the first read rows in a shuffled order, so rows, not shards, are what can be found
//! again. Memory holds 16 bytes a row; the page cache does the rest.

use std::{fs::File, io::Write as _, os::unix::fs::FileExt as _, path::Path, sync::Arc};

use retort_core::{Error, Result};

use crate::example::Example;

/// An unnamed file of rows: its space is free again when this process ends, however it ends.
#[derive(Debug)]
pub struct Spill {
    file: Arc<File>,
    folder: String,
    /// Offset and length of each row, bytes.
    index: Vec<(u64, u32)>,
    end: u64,
}

impl Spill {
    /// In `folder`, which must exist.
    pub fn create(folder: &Path) -> Result<Self> {
        let file = tempfile::tempfile_in(folder).map_err(|error| Error::io(folder, error))?;
        Ok(Self { file: Arc::new(file), folder: folder.display().to_string(), index: Vec::new(), end: 0 })
    }

    /// Rows held.
    pub fn len(&self) -> u64 {
        self.index.len() as u64
    }

    /// Appends rows; blocks on the disk.
    pub fn append(&mut self, examples: &[Example]) -> Result<()> {
        for example in examples {
            let bytes = example.to_bytes();
            let length = u32::try_from(bytes.len()).map_err(|_| {
                Error::internal(format!("a row of {} bytes is larger than this build can keep", bytes.len()))
            })?;
            // The file is only ever written here, in order.
            (&*self.file).write_all(&bytes).map_err(|error| Error::io(&self.folder, error))?;
            self.index.push((self.end, length));
            self.end += u64::from(length);
        }
        Ok(())
    }

    /// What reads these rows, counted from 0, in this order; it may run on another thread.
    pub fn reader(&self, rows: &[u64]) -> Result<impl FnOnce() -> Result<Vec<Example>> + Send + 'static + use<>> {
        let place = |&row: &u64| {
            let place = usize::try_from(row).ok().and_then(|row| self.index.get(row)).copied();
            place.ok_or_else(|| Error::internal(format!("row {row} was asked for, {} are there", self.index.len())))
        };
        let places = rows.iter().map(place).collect::<Result<Vec<_>>>()?;
        let (file, folder) = (Arc::clone(&self.file), self.folder.clone());
        Ok(move || {
            let read = |(offset, length): (u64, u32)| {
                let mut bytes = vec![0; length as usize];
                file.read_exact_at(&mut bytes, offset).map_err(|error| Error::io(&folder, error))?;
                Example::from_bytes(&bytes)
                    .ok_or_else(|| Error::internal(format!("the spilled row at {offset} in {folder} was damaged")))
            };
            places.into_iter().map(read).collect()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::example::tests::example;

    #[test]
    fn rows_come_back_in_any_order() {
        let folder = tempfile::tempdir().unwrap();
        let mut spill = Spill::create(folder.path()).unwrap();
        let examples: Vec<_> = (0..9).map(|i| example(i, 1 + i as usize, i as usize, 3, 40)).collect();
        spill.append(&examples[..4]).unwrap();
        spill.append(&examples[4..]).unwrap();
        assert_eq!(spill.len(), 9);
        let read = spill.reader(&[8, 0, 4, 4]).unwrap()().unwrap();
        assert_eq!(read, [8usize, 0, 4, 4].map(|i| examples[i].clone()));
        assert!(spill.reader(&[9]).is_err());
        // Unnamed: nothing to clean up after a kill.
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
