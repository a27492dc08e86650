use std::{
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
};

use clap::Args;
use retort_core::{Code, Error, Result};

use crate::{
    cluster::{missing, program_folder},
    command::{Context, HomeArg},
    export::{Source, export},
    home::{local_folder, open_store},
    outcome::Outcome,
};

/// Talks to a model: a promoted one by its name, or any Hugging Face folder
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  retort model chat support
  retort model chat support@2 --prompt 'Where is my parcel?'
  retort model chat ./models/smollm2 --temperature 0")]
pub struct Chat {
    /// A folder, or NAME or NAME@VERSION of a promoted model
    model: String,
    /// Answer this once instead of a conversation
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// Longest answer, tokens
    #[arg(long, value_name = "N")]
    max_new_tokens: Option<u32>,
    /// 0 is greedy
    #[arg(long, value_name = "T")]
    temperature: Option<f64>,
    /// Object store: a folder or a URL [default: that of the home]
    #[arg(long, value_name = "URL")]
    store: Option<String>,
    /// Folder of retort-teacher [default: that of this program]
    #[arg(long, env = "RETORT_PROGRAMS", value_name = "DIR")]
    programs: Option<PathBuf>,
    #[command(flatten)]
    home: HomeArg,
}

impl Chat {
    pub async fn run(self, context: &Context) -> Result<Outcome> {
        let folder = program_folder(self.programs.as_deref())?;
        let program = folder.join("retort-teacher");
        if !program.is_file() {
            return Err(missing("retort-teacher", &folder));
        }
        let model = self.folder().await?;
        let mut command = std::process::Command::new(&program);
        command.arg("chat").arg("--model").arg(&model);
        for (flag, value) in [
            ("--prompt", self.prompt),
            ("--max-new-tokens", self.max_new_tokens.map(|n| n.to_string())),
            ("--temperature", self.temperature.map(|t| t.to_string())),
            ("--log", context.log.clone()),
        ] {
            if let Some(value) = value {
                command.args([flag, &value]);
            }
        }
        // Becomes the teacher's own process: the terminal and the signals are its.
        let error = command.exec();
        Err(Error::new(Code::ComponentFailed, format!("cannot start {}: {error}", program.display())))
    }

    /// The model's folder on this machine, exported from a store elsewhere when it must be.
    async fn folder(&self) -> Result<PathBuf> {
        if Path::new(&self.model).is_dir() {
            return Ok(PathBuf::from(&self.model));
        }
        if self.model.contains(['/', '.', '\\']) && !self.model.starts_with("models/") {
            return Err(Error::new(
                Code::FileNotFound,
                format!("{}: no such folder; a promoted model goes by NAME or NAME@VERSION", self.model),
            ));
        }
        let home = self.home.resolve()?;
        let location = home.store_or(self.store.as_deref())?;
        let store = open_store(&location)?;
        let source = Source::resolve(&store, &self.model).await?;
        match local_folder(&location) {
            Some(folder) => Ok(folder.join(&source.key)),
            None => {
                let version = source.version.unwrap_or_default();
                let out = home.exports().join(format!("{}@{version}", source.name));
                Ok(export(&store, &source, &out, false).await?.path)
            }
        }
    }
}
