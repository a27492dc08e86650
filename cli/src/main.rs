//! The `retort` command. Each subcommand is one file under `command/`; what several of them share
//! lies beside it: the supervisor of child processes, the gRPC client, live progress, the report.

#![deny(clippy::print_stdout, clippy::print_stderr)] // they panic on a stream that is full or closed

mod client;
mod cluster;
mod command;
mod export;
mod follow;
mod home;
mod job_plan;
mod json;
mod model_folder;
mod outcome;
mod output;
mod progress;
mod promoted;
mod report;
mod request;
mod signals;
mod spec_file;
mod supervise;
mod text;

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    match command::Cli::try_parse() {
        Ok(cli) => cli.execute(),
        Err(message) => outcome::say(&message),
    }
}
