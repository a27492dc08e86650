//! Copies a model's Hugging Face folder out of the store.

mod target;

use std::{
    collections::BTreeSet,
    path::{Component, Path, PathBuf},
};

use retort_artifact::{Entry, Store, paths};
use retort_core::{Code, Error, Result};
use retort_proto as proto;
use serde::{Deserialize, Serialize};

use crate::home::create_folder;
use target::{Receipt, Staging};

pub use target::{check_place, check_target};

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

/// Copies the folder to `out`: all or nothing. An earlier export there gives way once the new one
/// is complete.
///
/// Errors: those of [`check_target`]; `ModelNotFound` when the store has no such folder; what the
/// store and the disk say.
pub async fn export(store: &Store, source: &Source, out: &Path, force: bool) -> Result<Exported> {
    let out = std::path::absolute(out).map_err(|error| Error::io(out, error))?;
    check_target(&out, &source.name, force)?;
    let entries = files(store, source).await?;
    let staging = Staging::beside(&out)?;
    let mut names = BTreeSet::new();
    for entry in &entries {
        let name = relative(&source.key, &entry.key)?;
        let file = staging.folder().join(&name);
        create_folder(file.parent().unwrap_or(staging.folder()))?;
        store.get_to_file(&entry.key, &file).await?;
        names.insert(name);
    }
    Receipt::new(source, names).write(staging.folder())?;
    staging.replace(&out)?;
    Ok(Exported { path: out, files: entries.len(), bytes: entries.iter().map(|entry| entry.size).sum() })
}

/// What lies in the model's folder.
async fn files(store: &Store, source: &Source) -> Result<Vec<Entry>> {
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
    Ok(entries)
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
