//! A file that appears whole or not at all.
//!
//! It is gathered beside its name and renamed when it is done. The unfinished one is locked by whoever writes it; one
//! that nobody holds is a dead run's, and the next export there removes it.

use std::{
    fs::{File, Permissions},
    io::ErrorKind,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use retort_core::{Code, Error, Result};
use tempfile::NamedTempFile;

const PREFIX: &str = ".retort-unfinished-";

/// An export that has not its name yet; dropped, it is gone.
#[derive(Debug)]
pub struct Unfinished {
    file: NamedTempFile,
    out: PathBuf,
    force: bool,
}

impl Unfinished {
    /// Beside `out`, on the same disk; `inputs` are files that the export reads.
    ///
    /// # Errors
    /// `ObjectExists` when `out` is a folder, a link, an input, or a file that `force` does not give up.
    pub fn beside(out: &Path, force: bool, inputs: &[PathBuf]) -> Result<Self> {
        check(out, force, inputs)?;
        let folder = match out.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        sweep(folder);
        let io = |error| Error::io(folder, error);
        loop {
            let file = tempfile::Builder::new()
                .prefix(PREFIX)
                .permissions(Permissions::from_mode(0o666)) // less what the umask takes
                .tempfile_in(folder)
                .map_err(io)?;
            // On a disk without locks nothing is swept.
            let _ = file.as_file().lock();
            // Another's sweep may have taken it before it was locked.
            if file.path().exists() {
                return Ok(Self { file, out: out.to_owned(), force });
            }
        }
    }

    pub fn file(&self) -> &File {
        self.file.as_file()
    }

    /// Gives the file its name; how many bytes it has.
    pub fn publish(self) -> Result<u64> {
        let io = |error| Error::io(&self.out, error);
        self.file.as_file().sync_all().map_err(io)?;
        let bytes = self.file.as_file().metadata().map_err(io)?.len();
        let named = if self.force { self.file.persist(&self.out) } else { self.file.persist_noclobber(&self.out) };
        match named {
            Ok(_) => Ok(bytes),
            Err(error) if error.error.kind() == ErrorKind::AlreadyExists => Err(exists(&self.out)),
            Err(error) => Err(io(error.error)),
        }
    }
}

fn check(out: &Path, force: bool, inputs: &[PathBuf]) -> Result<()> {
    let refuse = |why: &str| Err(Error::new(Code::ObjectExists, format!("{} {why}", out.display())));
    let Ok(metadata) = out.symlink_metadata() else { return Ok(()) };
    if metadata.is_dir() {
        return refuse("is a folder; name a file with --out");
    }
    if metadata.is_symlink() {
        // Replacing /dev/stdout is nobody's wish.
        return refuse("is a link; name the file it leads to with --out");
    }
    if !metadata.is_file() {
        return refuse("is no file; name one with --out");
    }
    let place = out.canonicalize().ok();
    if place.is_some() && inputs.iter().any(|input| input.canonicalize().ok() == place) {
        return refuse("is one of the files to export; name another with --out");
    }
    if force { Ok(()) } else { Err(exists(out)) }
}

fn exists(out: &Path) -> Error {
    let message =
        format!("{}: it is there already; name another with --out, or replace it with --force", out.display());
    Error::new(Code::ObjectExists, message)
}

/// Removes the unfinished exports that nobody holds. One that cannot be removed harms nobody.
fn sweep(folder: &Path) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let ours = entry.file_name().to_string_lossy().starts_with(PREFIX);
        let regular = entry.file_type().is_ok_and(|kind| kind.is_file());
        if ours && regular && File::open(entry.path()).is_ok_and(|file| file.try_lock().is_ok()) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}
