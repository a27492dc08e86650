use std::{os::unix::process::CommandExt as _, path::PathBuf};

use clap::Args;
use retort_core::{Code, Error, Result};

use crate::{
    cluster::{missing, program_folder},
    command::{Context, HomeArg},
    model_folder::ModelFolder,
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
        let model = ModelFolder::resolve(&self.model, &self.home, self.store.as_deref()).await?.path;
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
}
