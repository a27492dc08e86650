//! The command line of `retort-student`.

use std::{path::PathBuf, process::ExitCode};

use clap::{Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use retort_core::{Code, Error, Result};
use retort_process::{LogArgs, exit_with, keep_freed_memory};
use retort_worker::WorkerArgs;

use crate::{
    generate,
    handler::Student,
    parallel::sync::PeerArgs,
    settings::{Settings, Threads},
    workspace,
};

/// Threads of the async side: network and disk, next to the one thread that computes.
const ASYNC_THREADS: usize = 2;

/// Trains students on published soft targets and judges them.
///
/// Waits for tasks of its pool until it is stopped. A stopped or killed training goes on from its
/// newest checkpoint.
#[derive(Debug, Parser)]
#[command(name = "retort-student", version, subcommand_negates_reqs = true, after_help = EXAMPLES)]
struct Cli {
    #[command(flatten)]
    worker: Option<WorkerArgs>,
    #[command(flatten)]
    compute: Compute,
    #[command(flatten)]
    peers: PeerArgs,
    #[command(subcommand)]
    command: Option<Command>,
}

const EXAMPLES: &str = "Examples:
  retort-student --store /srv/retort/store --brokers 127.0.0.1:9092
  retort-student --store /srv/retort/store --pool large --device cuda:0 --dtype bf16
  retort-student --store /srv/retort/store --listen 0.0.0.0:7480 --advertise trainer-0.pool:7480 --tls-ca ca.pem --tls-cert me.pem --tls-key me.key
  retort-student generate --model ./student --prompts prompts.jsonl --max-new-tokens 32 --json";

#[derive(Debug, Subcommand)]
enum Command {
    /// Answers prompts greedily with a Hugging Face folder
    Generate(generate::Options),
}

#[derive(Debug, Args)]
struct Compute {
    /// Cores used for arithmetic; all of them when not given
    #[arg(long, env = "RETORT_THREADS", global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// Cores used once the teacher's work for a job is done [default: those of --threads]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads_alone: Option<u16>,
    /// Folder for rows and checkpoints on their way; the system's temporary one when not given
    #[arg(long, env = "RETORT_WORK_DIR", value_name = "DIR")]
    work_dir: Option<PathBuf>,
}

/// Runs the process named by the command line.
pub fn run() -> ExitCode {
    keep_freed_memory();
    let matches = Cli::command().get_matches();
    let parsed = Cli::from_arg_matches(&matches).and_then(|cli| Ok((cli, LogArgs::from_arg_matches(&matches)?)));
    let (cli, log) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => error.exit(),
    };
    log.init();
    if let Some(threads) = cli.compute.threads {
        tch::set_num_threads(threads.into());
    }
    let done = match cli.command {
        Some(Command::Generate(options)) => generate::run(&options),
        // The optional group is `None` even when its flags are given: it holds another group.
        None => WorkerArgs::from_arg_matches(&matches)
            .map_err(|_| Error::new(Code::RequestInvalid, "--store is missing; see retort-student --help"))
            .and_then(|args| serve(args, cli.compute, &cli.peers)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => exit_with(&error),
    }
}

fn serve(args: WorkerArgs, compute: Compute, peers: &PeerArgs) -> Result<()> {
    let work_dir = compute.work_dir.unwrap_or_else(std::env::temp_dir);
    let threads = Threads { beside_teacher: compute.threads, alone: compute.threads_alone.or(compute.threads) };
    let settings = Settings { peers: peers.read()?, ..Settings::new(&args.device, &args.dtype, work_dir, threads)? };
    workspace::sweep(&settings.work_dir);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(ASYNC_THREADS)
        .enable_all()
        .build()
        .map_err(|error| Error::internal(format!("cannot start the runtime: {error}")))?;
    let done = runtime.block_on(retort_worker::run("student", args, Student::new(settings)));
    // A micro-batch under way is left where it is: its attempt has no use for it any more.
    runtime.shutdown_background();
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flags_are_sound_and_generate_needs_no_store() {
        Cli::command().debug_assert();
        let cli =
            Cli::try_parse_from(["retort-student", "generate", "--model", "m", "--prompts", "p", "--threads", "2"]);
        let cli = cli.unwrap();
        assert!(matches!(cli.command, Some(Command::Generate(_))));
        assert_eq!(cli.compute.threads, Some(2));
        assert!(Cli::try_parse_from(["retort-student", "--store", "s", "--threads", "0"]).is_err());
        assert!(Cli::try_parse_from(["retort-student", "--store", "s", "--threads", "1"]).is_ok());
        assert!(Cli::try_parse_from(["retort-student"]).is_err());
    }
}
