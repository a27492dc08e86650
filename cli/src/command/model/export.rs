mod gguf;

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use retort_core::{Code, Error, Result, spec::GgufType};
use serde_json::json;

use crate::{
    command::{Context, HomeArg},
    export::{Source, export},
    home::open_store,
    outcome::Outcome,
    text::bytes,
};

/// Writes a promoted model as a Hugging Face folder, or any model as a GGUF file for llama.cpp
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  retort model export support --out ./support
  retort model export support@2 --out ./support-2 --store /data/retort/store
  retort model export support --format gguf --out support.gguf
  retort model export ./models/smollm2 --format gguf --type f16 --out smollm2-F16.gguf")]
pub struct Export {
    /// NAME or NAME@VERSION, the newest version when none is named; for gguf also a Hugging Face folder
    model: String,
    /// The folder, or the file, to write: whole or not at all
    #[arg(long, visible_alias = "output", value_name = "PATH")]
    out: PathBuf,
    #[arg(long, value_enum, default_value_t = Format::HuggingFace)]
    format: Format,
    /// gguf: how matrices are stored [default: q8_0]
    #[arg(long = "type", value_enum, value_name = "TYPE")]
    kind: Option<Type>,
    /// Replace a file that is there; or an earlier export although it is another model's, or files that it did not write
    /// lie in its folder
    #[arg(long)]
    force: bool,
    /// Object store: a folder or a URL [default: that of the home]
    #[arg(long, value_name = "URL")]
    store: Option<String>,
    #[command(flatten)]
    home: HomeArg,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    HuggingFace,
    Gguf,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Type {
    /// A byte a value and a scale for each 32
    #[value(name = "q8_0")]
    Q8_0,
    F16,
    Bf16,
    F32,
}

impl From<Type> for GgufType {
    fn from(kind: Type) -> Self {
        match kind {
            Type::Q8_0 => Self::Q8_0,
            Type::F16 => Self::F16,
            Type::Bf16 => Self::Bf16,
            Type::F32 => Self::F32,
        }
    }
}

impl Export {
    pub async fn run(self, context: &Context) -> Result<Outcome> {
        if self.format == Format::Gguf {
            return gguf::run(self, context).await;
        }
        if self.kind.is_some() {
            return Err(Error::new(Code::RequestInvalid, "--type goes with --format gguf"));
        }
        if self.model.contains(['/', '.']) && Path::new(&self.model).is_dir() {
            return Err(Error::new(
                Code::RequestInvalid,
                format!(
                    "{} is a folder already; `retort model import` copies and checks one, --format gguf makes a file of it",
                    self.model
                ),
            ));
        }
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
