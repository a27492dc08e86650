//! The command line: one module a subcommand.

mod completions;
mod job;
mod model;
mod plan;
mod run;
mod shard;
mod up;

use std::{path::PathBuf, process::ExitCode};

use clap::{Args, Parser, Subcommand};
use retort_core::{Error, Result};
use retort_process::{LogArgs, LogFormat};

use crate::{
    client::Client,
    home::Home,
    outcome::{Outcome, fail, incomplete},
    output::Output,
};

/// Distils a large teacher model into a small private one.
#[derive(Debug, Parser)]
#[command(
    name = "retort",
    version,
    propagate_version = true,
    arg_required_else_help = true,
    after_help = "Examples:
  retort run examples/support/job.yaml       distil, judge, promote and export in one go
  retort up                                  serve jobs on this machine until Ctrl-C
  retort job create job.yaml                 hand a job to the retort that is up
  retort model chat support                  talk to the newest promoted `support`
  retort plan --teacher llama-3.1-405b       which GPUs it needs, how fast it will be, what a job costs

Exit codes: 0 done, 2 bad input, 3 the job's gates failed, 4 the job failed, 130 stopped or
cancelled, 1 anything else."
)]
pub struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct Global {
    /// Print JSON instead of text
    #[arg(long, global = true)]
    json: bool,
    /// What to log, in tracing's filter syntax; started processes follow it too
    #[arg(long, global = true, value_name = "FILTER")]
    log: Option<String>,
}

#[derive(Debug, Subcommand)]
enum Command {
    Up(up::Up),
    Run(run::Run),
    #[command(subcommand)]
    Job(job::Job),
    #[command(subcommand)]
    Model(model::Model),
    #[command(subcommand)]
    Shard(shard::Shard),
    Plan(plan::Plan),
    Completions(completions::Completions),
}

/// What every subcommand is given.
#[derive(Debug)]
pub struct Context {
    pub output: Output,
    /// `--log`, handed down to child processes.
    pub log: Option<String>,
}

impl Cli {
    /// Runs the command to its exit code.
    pub fn execute(self) -> ExitCode {
        LogArgs { log: self.global.log.clone().unwrap_or_else(|| "warn".to_owned()), log_format: LogFormat::Text }
            .init();
        let context = Context { output: Output::new(self.global.json), log: self.global.log };
        // One thread starts every child: the kernel ties "die with your parent" to the thread that
        // forked, and a pool's threads come and go.
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => return fail(&context.output, &Error::internal(format!("cannot start: {error}"))),
        };
        let result = runtime.block_on(self.command.run(&context));
        // A blocking read (a confirmation, an import) must not hold the exit back.
        runtime.shutdown_background();
        match (result, context.output.lost()) {
            (Ok(outcome), None) => outcome.exit_code(),
            (Ok(_), Some(error)) => incomplete(&error),
            (Err(error), _) => fail(&context.output, &error),
        }
    }
}

impl Command {
    async fn run(self, context: &Context) -> Result<Outcome> {
        match self {
            Self::Up(up) => up.run(context).await,
            Self::Run(run) => run.run(context).await,
            Self::Job(job) => job.run(context).await,
            Self::Model(model) => model.run(context).await,
            Self::Shard(shard) => shard.run(context).await,
            Self::Plan(plan) => plan.run(context),
            Self::Completions(completions) => completions.run(context),
        }
    }
}

/// `--home`.
#[derive(Clone, Debug, Args)]
pub struct HomeArg {
    /// Folder of the store, the database, the broker's data and the logs [default: ~/.retort]
    #[arg(long, env = "RETORT_HOME", value_name = "DIR")]
    pub home: Option<PathBuf>,
}

impl HomeArg {
    pub fn resolve(&self) -> Result<Home> {
        Home::resolve(self.home.as_deref())
    }
}

/// How to reach an orchestrator: `--address`, `$RETORT_ADDRESS`, the retort that is up in the
/// home, or, where no home was named, the default port of this machine.
#[derive(Clone, Debug, Args)]
pub struct Connection {
    /// The orchestrator [default: that of the retort that is up in the home; without --home also http://127.0.0.1:7474]
    #[arg(long, env = "RETORT_ADDRESS", value_name = "URL")]
    pub address: Option<String>,
    #[command(flatten)]
    pub home: HomeArg,
}

impl Connection {
    pub fn address(&self) -> Result<String> {
        match &self.address {
            Some(address) => Ok(address.clone()),
            None => self.home.resolve()?.address(),
        }
    }

    pub async fn connect(&self) -> Result<Client> {
        Client::connect(&self.address()?).await
    }

    /// The local folder behind the store, when it is known to be on this machine: artefacts are
    /// then shown as paths.
    pub fn local_store(&self) -> Option<PathBuf> {
        let home = self.home.resolve().ok()?;
        let running = home.running()?;
        let same = self.address.as_ref().is_none_or(|address| crate::client::same_address(address, &running.address));
        if same { crate::home::local_folder(&running.store) } else { None }
    }
}

#[cfg(test)]
mod tests;
