//! `retort model export --format gguf`: on a thread of its own, so that a signal is heard.

use indicatif::{ProgressBar, ProgressStyle};
use retort_core::{Code, Error, Result, spec::GgufType};
use retort_export::Gguf;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::{Export, Type};
use crate::{
    command::Context,
    model_folder::ModelFolder,
    outcome::Outcome,
    signals::Signals,
    text::{bytes, count},
};

pub async fn run(options: Export, context: &Context) -> Result<Outcome> {
    let kind = GgufType::from(options.kind.unwrap_or(Type::Q8_0));
    let folder = ModelFolder::resolve(&options.model, &options.home, options.store.as_deref()).await?;
    let (name, source, out) = (folder.name(), folder.path.clone(), options.out.clone());
    let signals = Signals::listen()?;
    let (stop, bar) = (signals.stop.clone(), bar());
    let (seen, shown) = (stop.clone(), bar.clone());
    let work = move || -> Result<Gguf> {
        let gguf = Gguf::plan(&source, &name, kind)?;
        shown.set_length(gguf.bytes());
        gguf.export(&out, options.force, &mut |progress| {
            shown.set_position(progress.done);
            unless_stopped(&seen)
        })?;
        Ok(gguf)
    };
    let done = tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(Error::internal(format!("the export broke off: {error}"))));
    bar.finish_and_clear();
    let gguf = match done {
        Err(error) if error.code == Code::JobCancelled && stop.is_cancelled() => {
            context.output.remark(&format!("stopped: {} was not written", options.out.display()));
            return Ok(Outcome::Interrupted);
        }
        other => other?,
    };
    let version = folder.source.as_ref().and_then(|source| source.version);
    context.output.json(&json!({
        "model": folder.name(),
        "version": version,
        "source": folder.path,
        "path": options.out,
        "format": "gguf",
        "type": kind.name().to_lowercase(),
        "architecture": gguf.architecture.class_name(),
        "parameters": gguf.parameters,
        "tensors": gguf.tensors(),
        "bytes": gguf.bytes(),
    }));
    context.output.text(&format!(
        "{} is in {} ({}, {} parameters in {} tensors, {})",
        folder.source.as_ref().map_or_else(|| folder.path.display().to_string(), |source| source.title()),
        options.out.display(),
        kind.name(),
        count(gguf.parameters),
        gguf.tensors(),
        bytes(gguf.bytes())
    ));
    Ok(Outcome::Done)
}

fn unless_stopped(stop: &CancellationToken) -> Result<()> {
    if stop.is_cancelled() { Err(Error::new(Code::JobCancelled, "stopped by a signal")) } else { Ok(()) }
}

/// On standard error, and hidden where that is no terminal.
fn bar() -> ProgressBar {
    let template = "writing  {bar:32.cyan/dim} {bytes:>10} of {total_bytes:<10} {bytes_per_sec}";
    ProgressBar::new(0)
        .with_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()))
}
