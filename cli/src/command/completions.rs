use clap::{Args, CommandFactory as _};
use clap_complete::Shell;
use retort_core::Result;

use super::{Cli, Context};
use crate::outcome::Outcome;

/// Prints a shell's completion script
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  retort completions bash > ~/.local/share/bash-completion/completions/retort
  retort completions zsh > ~/.zfunc/_retort")]
pub struct Completions {
    shell: Shell,
}

impl Completions {
    pub fn run(self, context: &Context) -> Result<Outcome> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "retort", &mut script);
        let script = String::from_utf8_lossy(&script).into_owned();
        context.output.json(&serde_json::json!({ "shell": self.shell.to_string(), "script": script }));
        context.output.text(&script);
        Ok(Outcome::Done)
    }
}
