mod place;
mod session;

use std::{cell::RefCell, io::IsTerminal as _, path::PathBuf};

use clap::Args;
use retort_core::Result;

use super::{Context, HomeArg};
use crate::{
    cluster::ClusterArgs,
    export,
    home::absolute_store,
    outcome::{Outcome, echo_error},
    progress::{Mode, View},
    request::Remembered,
    signals::Signals,
    spec_file,
};
use session::Session;

/// Runs one job from its spec to an exported model
///
/// Starts what is needed on free ports, submits the job, shows its progress, prints the report,
/// exports the model, stops what it started. Stopped by Ctrl-C, or killed, the same command goes on
/// with the same job: finished work is kept, and a result that was not delivered is. When `retort up`
/// serves the home, it is used; another `retort run` has its home to itself.
///
/// Off a terminal, or with --json, one JSON object a line is printed: "submitted" (job, resumed, plan), "event"
/// (sequence, time, state, progress, event), "notice", at the end "result" (job, export) or "error" (code, message),
/// whose code is "interrupted" after a first Ctrl-C or SIGTERM. A second one ends it at once, and a command line that
/// is wrong is told in text.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  retort run examples/support/job.yaml
  retort run job.yaml --home /data/retort --out ./student
  retort run job.yaml --plain | tee run.log
  retort run job.yaml --address http://retort.internal:7474      use the orchestrator there

The exit code says how the job ended: 0 succeeded, 3 a gate failed, 4 failed, 130 stopped or cancelled.")]
pub struct Run {
    /// The spec, YAML; paths in it are relative to its folder
    spec: PathBuf,
    #[command(flatten)]
    home: HomeArg,
    /// Start nothing; use this orchestrator
    #[arg(long, value_name = "URL")]
    address: Option<String>,
    /// Where the model goes [default: HOME/exports/NAME]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Begin a new job even where an earlier one of this spec is unfinished or not delivered
    #[arg(long)]
    new: bool,
    /// Leave everything up after the job, until Ctrl-C
    #[arg(long, conflicts_with = "address")]
    keep_up: bool,
    /// Text lines instead of bars or JSON
    #[arg(long, conflicts_with = "json")]
    plain: bool,
    #[command(flatten)]
    cluster: ClusterArgs,
}

impl Run {
    pub async fn run(self, context: &Context) -> Result<Outcome> {
        let spec = spec_file::read(&self.spec)?;
        let home = self.home.resolve()?;
        let out = self.out.clone().unwrap_or_else(|| home.exports().join(&spec.name));
        export::check_target(&out, &spec.name, false)?;
        // Not first after the training. The home's own folder is the home's matter.
        if self.out.is_some() || home.exports().is_dir() {
            export::check_place(&out)?;
        }
        self.cluster.store.as_deref().map(absolute_store).transpose()?;
        let remembered = Remembered::of(&home, &spec)?;
        let signals = Signals::listen()?;
        let mode = Mode::choose(context.output.is_json(), self.plain, std::io::stdout().is_terminal());
        let (view, output) = View::new(mode, &context.output);
        let session = Session {
            args: &self,
            log: context.log.clone(),
            spec,
            home,
            out,
            remembered,
            signals,
            view: RefCell::new(view),
            output,
        };
        let result = session.run().await;
        echo_error(&context.output, &session.output, result)
    }
}
