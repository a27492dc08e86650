//! Which store a folder holds.
//!
//! A store that is away (unmounted, moved) leaves no folder, or an empty one. Only a mark in the folder tells that from
//! a store that has lost its objects, and from a new one.

use std::{
    fs::{self, File},
    io::{self, ErrorKind, Write as _},
    path::Path,
};

use retort_core::{Code, Error, Result};
use serde::{Deserialize, Serialize};

use super::fault;
use crate::paths;

/// Lies in the store's root; it is no object, and no key names it.
pub(super) const FILE: &str = "retort-store.json";
/// Version that this build writes, and the newest it reads.
const SCHEMA_VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Identity {
    schema_version: u32,
    /// A UUID, made with the store.
    id: String,
}

/// The id of the store at `root`, which gets one where it has none.
pub(super) fn make(root: &Path) -> Result<String> {
    if let Some(id) = read(root)? {
        return Ok(id);
    }
    write(root).map_err(|error| fault::io(&root.join(FILE), error))?;
    // Several may have made one at once; the first one's stays.
    read(root)?.ok_or_else(|| away(root))
}

/// The id of the store at `root`; none of one that an older build made, which has objects alone.
///
/// Errors: `StoreUnavailable` where there is no store.
pub(super) fn find(root: &Path) -> Result<Option<String>> {
    let found = read(root)?;
    if found.is_none() && !has_objects(root) {
        return Err(Error::new(
            Code::StoreUnavailable,
            format!(
                "{}: no object store is there: {}; mount it, or name where it lies with --store",
                root.display(),
                missing(root)
            ),
        ));
    }
    Ok(found)
}

/// Whether the store that was opened is still there; `opened` is its id if it had one.
pub(super) fn check(root: &Path, opened: Option<&str>) -> Result<()> {
    match (read(root)?, opened) {
        (Some(found), Some(opened)) if found != opened => Err(Error::new(
            Code::StoreUnavailable,
            format!(
                "{}: another object store is there ({found}) than was opened ({opened}); put that one back, or start \
                 again to use this one",
                root.display()
            ),
        )),
        (None, Some(_)) => Err(away(root)),
        (None, None) if !has_objects(root) => Err(away(root)),
        _ => Ok(()),
    }
}

fn away(root: &Path) -> Error {
    Error::new(
        Code::StoreUnavailable,
        format!(
            "{}: the object store is not there any more: {}; mount it or put it back",
            root.display(),
            missing(root)
        ),
    )
}

/// What a store would have there.
fn missing(root: &Path) -> String {
    match fs::read_dir(root).map(|mut entries| entries.next().is_none()) {
        Ok(true) => "the folder is empty".to_owned(),
        Ok(false) => format!("the folder has no {FILE}"),
        Err(error) if error.kind() == ErrorKind::NotFound => "there is no such folder".to_owned(),
        Err(error) => error.to_string(),
    }
}

fn has_objects(root: &Path) -> bool {
    paths::FOLDERS.iter().any(|folder| root.join(folder).is_dir())
}

fn read(root: &Path) -> Result<Option<String>> {
    let path = root.join(FILE);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(fault::io(&path, error)),
    };
    let identity: Identity = serde_json::from_slice(&bytes).map_err(|error| {
        Error::new(
            Code::StoreUnavailable,
            format!(
                "{}: it does not say which store this is ({error}); put the file back, or remove it and start again \
                 if the objects beside it are the right ones",
                path.display()
            ),
        )
    })?;
    if identity.schema_version > SCHEMA_VERSION {
        return Err(Error::new(
            Code::StoreUnsupported,
            format!(
                "{}: it has schema version {}, this build reads up to {SCHEMA_VERSION}; use a newer retort",
                path.display(),
                identity.schema_version
            ),
        ));
    }
    Ok(Some(identity.id))
}

/// Written aside, flushed and linked into place, so that it is there whole or not at all.
fn write(root: &Path) -> io::Result<()> {
    let id = uuid::Uuid::new_v4();
    // A name that no listing shows, should this process be killed before the end.
    let staged = root.join(format!("{FILE}#{}", id.as_u128()));
    let bytes = serde_json::to_vec_pretty(&Identity { schema_version: SCHEMA_VERSION, id: id.to_string() })?;
    let put = || {
        let mut file = File::create_new(&staged)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        match fs::hard_link(&staged, root.join(FILE)) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            linked => linked,
        }
    };
    let linked = put();
    let _ = fs::remove_file(&staged);
    linked?;
    File::open(root)?.sync_all()
}
