use std::path::PathBuf;

use clap::Args;
use retort_core::Result;
use serde_json::json;

use crate::{
    command::{Context, HomeArg},
    export::{Source, export},
    home::open_store,
    outcome::Outcome,
    text::bytes,
};

/// Copies a promoted model out of the store, as a Hugging Face folder
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  retort model export support --out ./support
  retort model export support@2 --out ./support-2 --store /data/retort/store")]
pub struct Export {
    /// NAME or NAME@VERSION; the newest version when none is named
    model: String,
    /// The folder to write
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Replace an earlier export even though files that it did not write lie in its folder
    #[arg(long)]
    force: bool,
    /// Object store: a folder or a URL [default: that of the home]
    #[arg(long, value_name = "URL")]
    store: Option<String>,
    #[command(flatten)]
    home: HomeArg,
}

impl Export {
    pub async fn run(self, context: &Context) -> Result<Outcome> {
        let store = open_store(&self.home.resolve()?.store_or(self.store.as_deref())?)?;
        let source = Source::resolve(&store, &self.model).await?;
        let exported = export(&store, &source, &self.out, self.force).await?;
        context.output.json(&json!({
            "model": source.name,
            "version": source.version,
            "key": source.key,
            "path": exported.path,
            "files": exported.files,
            "bytes": exported.bytes,
        }));
        context.output.text(&format!(
            "{} is in {} ({} files, {})",
            source.title(),
            exported.path.display(),
            exported.files,
            bytes(exported.bytes)
        ));
        Ok(Outcome::Done)
    }
}
