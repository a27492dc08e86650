//! The folder that an export goes to: whose it is, and how it changes hands.
//!
//! An export is gathered in a folder of its own beside its target, so that a rename puts it there
//! whole. That folder is locked by whoever fills it; one that nobody holds is a dead run's, and the
//! next export beside it clears it away.

use std::{
    collections::BTreeSet,
    fs::File,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use retort_core::{Code, Error, Result};
use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use super::Source;
use crate::home::{cannot_make, create_folder, read_small};

/// Name of the receipt in an exported folder.
const RECEIPT: &str = "retort-export.json";
const STAGING: &str = ".retort-export-";

/// Says where an exported folder came from and which files are the export's own: those a later
/// export may replace.
#[derive(Debug, Serialize, Deserialize)]
pub struct Receipt {
    #[serde(flatten)]
    source: Source,
    /// Relative to the folder. `None` in receipts of before they were listed: then all are its own.
    files: Option<BTreeSet<PathBuf>>,
}

impl Receipt {
    pub fn new(source: &Source, files: BTreeSet<PathBuf>) -> Self {
        Self { source: source.clone(), files: Some(files) }
    }

    pub fn write(&self, folder: &Path) -> Result<()> {
        let text = serde_json::to_vec_pretty(self)
            .map_err(|error| Error::internal(format!("cannot write a receipt: {error}")))?;
        let path = folder.join(RECEIPT);
        std::fs::write(&path, text).map_err(|error| Error::io(&path, error))
    }

    fn read(folder: &Path) -> Result<Option<Self>> {
        Ok(read_small(&folder.join(RECEIPT))?.and_then(|text| serde_json::from_str(&text).ok()))
    }

    fn covers(&self, file: &Path) -> bool {
        file == Path::new(RECEIPT) || self.files.as_ref().is_none_or(|files| files.contains(file))
    }
}

/// Whether an export of `model` may go there: to nothing, an empty folder, or an earlier export of it. Another model's
/// export, and files that the earlier export did not write, are somebody's: they go only where `force` says so.
///
/// Errors: `ObjectExists`, naming what is in the way.
pub fn check_target(out: &Path, model: &str, force: bool) -> Result<()> {
    let refuse =
        |what: &str, way_out: &str| Err(Error::new(Code::ObjectExists, format!("{} {what}; {way_out}", out.display())));
    let empty = match std::fs::read_dir(out) {
        Ok(mut entries) => entries.next().is_none(),
        Err(error) if error.kind() == ErrorKind::NotFound => true,
        Err(error) if error.kind() == ErrorKind::NotADirectory => {
            return refuse("is a file", "name another with --out");
        }
        Err(error) => return Err(Error::io(out, error)),
    };
    if empty {
        return Ok(());
    }
    match Receipt::read(out)? {
        None => refuse("holds files that are no earlier export", "name another folder with --out, or remove it"),
        Some(_) if force => Ok(()),
        Some(receipt) if receipt.source.name != model => refuse(
            &format!("holds an export of {}", receipt.source.title()),
            "name another folder with --out, or let `retort model export --force` replace it",
        ),
        Some(receipt) => match stranger(out, Path::new(""), &receipt)? {
            None => Ok(()),
            Some(file) => refuse(
                &format!("holds {}, which the earlier export there did not write", file.display()),
                "move it away, name another folder with --out, or let `retort model export --force` delete it",
            ),
        },
    }
}

/// Whether an export to `out` could be gathered beside it; nothing is left behind. Folders above it that are not there
/// yet are made by the export itself, so the nearest one that is there is tried.
///
/// Errors: as [`Staging::beside`].
pub fn check_place(out: &Path) -> Result<()> {
    let out = std::path::absolute(out).map_err(|error| Error::io(out, error))?;
    let parent = out.parent().unwrap_or(Path::new("/"));
    let there = parent.ancestors().find(|folder| folder.exists()).unwrap_or(parent);
    let named = if there == parent { out.as_path() } else { parent };
    tempfile::Builder::new().prefix(STAGING).tempdir_in(there).map(drop).map_err(|error| cannot_make(named, error))
}

/// A file below `root`/`folder` that is not the export's. Links are files: none is followed.
fn stranger(root: &Path, folder: &Path, receipt: &Receipt) -> Result<Option<PathBuf>> {
    let at = root.join(folder);
    let io = |error| Error::io(&at, error);
    for entry in std::fs::read_dir(&at).map_err(io)? {
        let entry = entry.map_err(io)?;
        let name = folder.join(entry.file_name());
        let found = if entry.file_type().map_err(io)?.is_dir() {
            stranger(root, &name, receipt)?
        } else {
            (!receipt.covers(&name)).then_some(name)
        };
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

/// Where an export is gathered; dropped, it is gone.
#[derive(Debug)]
pub struct Staging {
    folder: PathBuf,
    place: TempDir,
    /// Held while the export lives.
    _lock: Option<File>,
}

impl Staging {
    /// On the target's disk; clears away what dead runs left there.
    pub fn beside(out: &Path) -> Result<Self> {
        let parent = out.parent().unwrap_or(Path::new("/"));
        create_folder(parent)?;
        sweep(parent);
        loop {
            let place =
                tempfile::Builder::new().prefix(STAGING).tempdir_in(parent).map_err(|error| cannot_make(out, error))?;
            let lock = open_folder(place.path());
            // On a disk without locks nothing is swept.
            let _ = lock.as_ref().map(|lock| flock(lock, FlockOperation::LockExclusive));
            // Another's sweep may have taken it before it was locked.
            if place.path().exists() {
                let folder = place.path().join("model");
                create_folder(&folder)?;
                return Ok(Self { folder, place, _lock: lock });
            }
        }
    }

    /// The folder to fill.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Puts what was gathered in the place of `out`. What was there is deleted last, and put back
    /// when the new one cannot take its place.
    pub fn replace(self, out: &Path) -> Result<()> {
        let io = |error| Error::io(out, error);
        let earlier = self.place.path().join("earlier");
        let moved = match std::fs::rename(out, &earlier) {
            Ok(()) => true,
            Err(error) if error.kind() == ErrorKind::NotFound => false,
            Err(error) => return Err(io(error)),
        };
        std::fs::rename(&self.folder, out).map_err(|error| {
            if moved {
                let _ = std::fs::rename(&earlier, out);
            }
            io(error)
        })
    }
}

/// Removes the staging folders that nobody holds. One that cannot be removed harms nobody.
fn sweep(parent: &Path) {
    for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
        if !entry.file_name().to_string_lossy().starts_with(STAGING) {
            continue;
        }
        let lock = open_folder(&entry.path());
        if lock.as_ref().is_some_and(|lock| flock(lock, FlockOperation::NonBlockingLockExclusive).is_ok()) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

fn open_folder(path: &Path) -> Option<File> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    open(path, flags, Mode::empty()).ok().map(File::from)
}
