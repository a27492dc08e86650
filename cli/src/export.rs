//! Copies a model's Hugging Face folder out of the store.

use std::path::{Component, Path, PathBuf};

use retort_artifact::{Store, paths};
use retort_core::{Code, Error, Result};
use retort_proto as proto;
use serde::{Deserialize, Serialize};

use crate::home::{create_folder, read_small};

/// Says where an exported folder came from; its presence lets a later export replace the folder.
const RECEIPT: &str = "retort-export.json";
/// Most files of one model.
const MAX_FILES: usize = 10_000;

/// A model's folder in the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    pub name: String,
    /// Of a promoted model; `None` for a candidate.
    pub version: Option<u32>,
    /// Prefix of the Hugging Face folder in the store, with a `/` at its end.
    pub key: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exported {
    pub path: PathBuf,
    pub files: usize,
    /// Over all files.
    pub bytes: u64,
}

impl Source {
    /// Finds `NAME`, `NAME@VERSION` or `models/NAME/versions/VERSION`; the newest when no version is named.
    pub async fn resolve(store: &Store, text: &str) -> Result<Self> {
        let (name, wanted) = parse(text)?;
        let prefix = paths::model_versions_prefix(&name);
        let versions: Vec<u32> = store
            .list(&prefix)
            .await?
            .iter()
            .filter_map(|entry| entry.key.strip_prefix(&prefix)?.strip_suffix(".json")?.parse().ok())
            .collect();
        let newest = versions.iter().max().copied().ok_or_else(|| {
            Error::new(
                Code::ModelNotFound,
                format!("no model {name:?} is promoted in this store; `retort model list` shows those that are, --store or --home names another store"),
            )
        })?;
        let version = wanted.unwrap_or(newest);
        if !versions.contains(&version) {
            return Err(Error::new(
                Code::ModelNotFound,
                format!("model {name:?} has no version {version}; the newest is {newest}"),
            ));
        }
        Ok(Self { key: paths::model_folder(&name, version), name, version: Some(version) })
    }

    /// What a finished job left: the promoted model, else its candidate. `None` when it left neither.
    pub fn of_job(job: &proto::Job) -> Option<Self> {
        let report = job.report.as_ref()?;
        let name = job.spec.as_ref()?.name.clone();
        if let Ok((name, Some(version))) = parse(&report.promoted) {
            return Some(Self { key: paths::model_folder(&name, version), name, version: Some(version) });
        }
        let folder = |key: &String| if key.ends_with('/') { key.clone() } else { format!("{key}/") };
        let model = report.artifacts.get("model").map(folder);
        let candidate = || report.artifacts.get("checkpoint").map(|key| paths::model_prefix(&folder(key)));
        Some(Self { name, version: None, key: model.or_else(candidate)? })
    }

    /// `support version 3`, or `the candidate of support`.
    pub fn title(&self) -> String {
        match self.version {
            Some(version) => format!("{} version {version}", self.name),
            None => format!("the candidate of {}", self.name),
        }
    }
}

/// Copies the folder to `out`: all or nothing.
///
/// Errors: `ObjectExists` when `out` holds something that is no earlier export and `force` is not
/// given; `ModelNotFound` when the store has no such folder; what the store and the disk say.
pub async fn export(store: &Store, source: &Source, out: &Path, force: bool) -> Result<Exported> {
    let out = std::path::absolute(out).map_err(|error| Error::io(out, error))?;
    check_target(&out, force)?;
    let entries = store.list(&source.key).await?;
    if entries.is_empty() {
        return Err(Error::new(Code::ModelNotFound, format!("nothing lies at {} in the store", source.key)));
    }
    if entries.len() > MAX_FILES {
        return Err(Error::new(
            Code::ModelMalformed,
            format!("{} holds {} files; no model has so many", source.key, entries.len()),
        ));
    }
    let parent = out.parent().unwrap_or(Path::new("/"));
    create_folder(parent)?;
    let staging = tempfile::Builder::new()
        .prefix(".retort-export-")
        .tempdir_in(parent)
        .map_err(|error| Error::io(parent, error))?;
    let folder = staging.path().join("model");
    create_folder(&folder)?;
    let mut bytes = 0;
    for entry in &entries {
        let file = folder.join(relative(&source.key, &entry.key)?);
        create_folder(file.parent().unwrap_or(&folder))?;
        store.get_to_file(&entry.key, &file).await?;
        bytes += entry.size;
    }
    let receipt = serde_json::to_vec_pretty(source)
        .map_err(|error| Error::internal(format!("cannot write a receipt: {error}")))?;
    let receipt_path = folder.join(RECEIPT);
    std::fs::write(&receipt_path, receipt).map_err(|error| Error::io(&receipt_path, error))?;
    if out.exists() {
        std::fs::remove_dir_all(&out).map_err(|error| Error::io(&out, error))?;
    }
    std::fs::rename(&folder, &out).map_err(|error| Error::io(&out, error))?;
    Ok(Exported { path: out, files: entries.len(), bytes })
}

/// Whether an export may go there: nothing, an empty folder, or an earlier export.
pub fn check_target(out: &Path, force: bool) -> Result<()> {
    let refuse = |what: &str| {
        Err(Error::new(
            Code::ObjectExists,
            format!("{} {what}; name another folder with --out, or remove it", out.display()),
        ))
    };
    match std::fs::read_dir(out) {
        Ok(mut entries) => {
            let earlier = read_small(&out.join(RECEIPT))?.is_some();
            if force || earlier || entries.next().is_none() {
                Ok(())
            } else {
                refuse("holds files that are no earlier export")
            }
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => refuse("is a file"),
        Err(error) => Err(Error::io(out, error)),
    }
}

fn parse(text: &str) -> Result<(String, Option<u32>)> {
    let bare = text.strip_prefix("models/").unwrap_or(text);
    let (name, version) = match bare.split_once('@').or_else(|| bare.split_once("/versions/")) {
        Some((name, version)) => (name, Some(version)),
        None => (bare, None),
    };
    let valid = (1..=63).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    let number = version.map(str::parse::<u32>).transpose();
    match number {
        Ok(number) if valid => Ok((name.to_owned(), number)),
        _ => Err(Error::new(
            Code::RequestInvalid,
            format!(
                "{:?} names no model; write NAME or NAME@VERSION, such as support@2",
                crate::text::shorten(text, 80)
            ),
        )),
    }
}

/// The file's place in the folder; a key cannot lead out of it.
fn relative(prefix: &str, key: &str) -> Result<PathBuf> {
    let path = PathBuf::from(key.strip_prefix(prefix).unwrap_or(key));
    if path.components().all(|part| matches!(part, Component::Normal(_))) && path.components().next().is_some() {
        Ok(path)
    } else {
        Err(Error::new(Code::ModelMalformed, format!("the store holds {key:?}, which is no file of a model's folder")))
    }
}

#[cfg(test)]
mod tests;
