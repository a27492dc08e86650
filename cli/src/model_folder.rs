//! The folder on this machine that a model named on the command line lies in.

use std::path::{Path, PathBuf};

use retort_core::{Code, Error, Result};

use crate::{
    command::HomeArg,
    export::{Source, export},
    home::{local_folder, open_store},
};

/// A folder, and whose it is.
#[derive(Debug)]
pub struct ModelFolder {
    pub path: PathBuf,
    /// Of a promoted model; `None` for a folder that was named itself.
    pub source: Option<Source>,
}

impl ModelFolder {
    /// `text` is a folder, or NAME or NAME@VERSION of a promoted model: that is used where it lies, or exported first
    /// when the store is elsewhere.
    pub async fn resolve(text: &str, home: &HomeArg, store: Option<&str>) -> Result<Self> {
        if Path::new(text).is_dir() {
            return Ok(Self { path: PathBuf::from(text), source: None });
        }
        if text.contains(['/', '.', '\\']) && !text.starts_with("models/") {
            return Err(Error::new(
                Code::FileNotFound,
                format!("{text}: no such folder; a promoted model goes by NAME or NAME@VERSION"),
            ));
        }
        let home = home.resolve()?;
        let location = home.store_or(store)?;
        let store = open_store(&location)?;
        let source = Source::resolve(&store, text).await?;
        let path = match local_folder(&location) {
            Some(folder) => folder.join(&source.key),
            None => {
                let version = source.version.unwrap_or_default();
                let out = home.exports().join(format!("{}@{version}", source.name));
                export(&store, &source, &out, false).await?.path
            }
        };
        Ok(Self { path, source: Some(source) })
    }

    /// What a file made from it is called.
    pub fn name(&self) -> String {
        let path = std::path::absolute(&self.path).unwrap_or_else(|_| self.path.clone());
        match &self.source {
            Some(source) => source.name.clone(),
            None => path.file_name().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned()),
        }
    }
}
