//! A child's log: `NAME.log`, with the previous run's kept as `NAME.log.1`.

use std::{
    fs::File,
    io::{Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
    process::Stdio,
};

use retort_core::{Error, Result};

use crate::home::create_folder;

/// How much of a log's end an error shows.
const TAIL_BYTES: u64 = 4096;
const TAIL_LINES: usize = 15;

#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    file: File,
    /// Where the present life of the child begins.
    begin: u64,
}

impl LogFile {
    /// Opens a fresh log, moving the previous one aside.
    pub fn rotate(folder: &Path, name: &str) -> Result<Self> {
        create_folder(folder)?;
        let path = folder.join(format!("{name}.log"));
        if path.exists() {
            let previous = folder.join(format!("{name}.log.1"));
            std::fs::rename(&path, &previous).map_err(|error| Error::io(&previous, error))?;
        }
        let file = File::options().create(true).append(true).open(&path).map_err(|error| Error::io(&path, error))?;
        Ok(Self { path, file, begin: 0 })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A handle for the child's standard error.
    pub fn stdio(&self) -> Result<Stdio> {
        self.file.try_clone().map(Stdio::from).map_err(|error| Error::io(&self.path, error))
    }

    /// A log that cannot be written stops nothing.
    pub fn append(&mut self, bytes: &[u8]) {
        let _ = self.file.write_all(bytes);
    }

    /// Draws a line between two lives of the child.
    pub fn mark(&mut self, what: &str) {
        self.append(format!("--- {what} by retort ---\n").as_bytes());
        self.begin = self.file.metadata().map(|metadata| metadata.len()).unwrap_or(0);
    }

    /// The last lines of the present life.
    pub fn tail(&self) -> String {
        let read = || -> std::io::Result<String> {
            let mut file = File::open(&self.path)?;
            let end = file.metadata()?.len();
            file.seek(SeekFrom::Start(self.begin.max(end.saturating_sub(TAIL_BYTES))))?;
            let mut bytes = Vec::new();
            file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
            Ok(crate::text::clean(&String::from_utf8_lossy(&bytes)))
        };
        let text = read().unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_one_previous_run_and_shows_the_end_of_this_life() {
        let folder = tempfile::tempdir().unwrap();
        let mut log = LogFile::rotate(folder.path(), "broker").unwrap();
        log.append(b"first run\n");
        let mut log = LogFile::rotate(folder.path(), "broker").unwrap();
        log.append(b"before\n");
        log.mark("restarted");
        for line in 0..40 {
            log.append(format!("line {line}\n").as_bytes());
        }
        let tail = log.tail();
        assert!(tail.starts_with("line 25\n") && tail.ends_with("line 39"), "{tail}");
        assert_eq!(std::fs::read_to_string(folder.path().join("broker.log.1")).unwrap(), "first run\n");
    }
}
