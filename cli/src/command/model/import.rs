use std::path::PathBuf;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use retort_core::{Error, Result};
use retort_import::{Imported, Phase, Progress};
use serde_json::json;

use crate::{
    command::Context,
    outcome::Outcome,
    text::{bytes, count, table},
};

/// Turns a GGUF file or a Hugging Face folder into a checked Hugging Face folder
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  retort model import smollm2.gguf --out models/smollm2
  retort model import ~/hf/Llama-3.2-1B-Instruct --out models/llama-1b")]
pub struct Import {
    /// A .gguf file, or a folder with config.json and safetensors
    source: PathBuf,
    /// The folder to write; it must not exist, or hold this very import
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

impl Import {
    pub async fn run(self, context: &Context) -> Result<Outcome> {
        let bar = bar();
        let shown = bar.clone();
        let work = move || {
            let mut phase = None;
            retort_import::import(&self.source, &self.out, &mut |progress| show(&shown, &mut phase, progress))
        };
        let imported = tokio::task::spawn_blocking(work)
            .await
            .unwrap_or_else(|error| Err(Error::internal(format!("the import broke off: {error}"))));
        bar.finish_and_clear();
        let imported = imported?;
        context.output.json(&json!({
            "folder": imported.folder,
            "architecture": imported.architecture,
            "parameters": imported.parameters,
            "tensors": imported.tensors,
            "source_format": imported.source_format.to_string(),
            "source_sha256": imported.source_sha256,
            "sha256": imported.sha256,
            "bytes_written": imported.bytes_written,
            "unchanged": imported.unchanged,
        }));
        context.output.text(&render(&imported));
        Ok(Outcome::Done)
    }
}

fn render(imported: &Imported) -> String {
    let written =
        if imported.unchanged { "nothing: it was imported before".to_owned() } else { bytes(imported.bytes_written) };
    let rows = [
        ("imported", imported.folder.display().to_string()),
        ("from", imported.source_format.to_string()),
        (
            "model",
            format!(
                "{}, {} parameters in {} tensors",
                imported.architecture,
                count(imported.parameters),
                imported.tensors
            ),
        ),
        ("written", written),
        ("sha256", imported.sha256.clone()),
    ];
    table(&rows.map(|(name, value)| vec![name.to_owned(), value]), &[])
}

/// On standard error, and hidden where that is no terminal.
fn bar() -> ProgressBar {
    let template = "{msg:<8} {bar:32.cyan/dim} {bytes:>10} of {total_bytes:<10} {bytes_per_sec}";
    ProgressBar::new(0)
        .with_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn show(bar: &ProgressBar, phase: &mut Option<Phase>, progress: Progress) {
    if *phase != Some(progress.phase) {
        *phase = Some(progress.phase);
        bar.reset();
        bar.set_message(progress.phase.to_string());
    }
    bar.set_length(progress.total);
    bar.set_position(progress.done);
}
