use std::{path::PathBuf, process::ExitCode};

use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use retort_artifact::Store;
use retort_core::{Code, Error, Result};
use retort_llama::Keep;
use retort_process::{LogArgs, exit_with, keep_freed_memory};
use retort_teacher::{
    Teacher, chat,
    group::{self, Formed, GroupArgs, Layers, LeaderWorkerSet, Place, StatsArgs},
    stage::Arithmetic,
};
use retort_worker::WorkerArgs;

/// Computes shards: completions of a teacher model with its soft targets.
///
/// Waits for tasks of its pool until it is stopped; the first SIGTERM hands the running shard back,
/// the second ends at once.
#[derive(Parser)]
#[command(name = "retort-teacher", version, subcommand_negates_reqs = true, after_help = EXAMPLES)]
struct Cli {
    #[command(flatten)]
    worker: Option<WorkerArgs>,
    #[command(flatten)]
    group: GroupArgs,
    /// Cores used for arithmetic; all of them when not given. Tokenising takes all for a moment
    #[arg(long, env = "RETORT_THREADS", global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    threads: Option<u16>,
    /// How to keep the weights of projections: stored, bf16, int8 or fp8; arithmetic stays as --dtype says
    #[arg(long, env = "RETORT_WEIGHTS", default_value = "stored", value_name = "HOW")]
    weights: String,
    #[command(subcommand)]
    command: Option<Command>,
}

const EXAMPLES: &str = "Examples:
  retort-teacher --store /srv/retort/store --brokers 127.0.0.1:9092
  retort-teacher --store /srv/retort/store --pool large --device cuda:0,cuda:1 --dtype bf16 --weights fp8
  retort-teacher --store /srv/retort/store --group big --stage 0/2 --peers 127.0.0.1:7475,127.0.0.1:7476
  retort-teacher stats --peer 127.0.0.1:7475
  retort-teacher chat --model ~/models/smollm2 --prompt \"Where is my parcel?\"";

#[derive(Subcommand)]
enum Command {
    /// Talks with a model: one answer to --prompt, or a conversation
    Chat(ChatArgs),
    /// Shows what the stages of a running teacher group have been doing
    Stats(StatsArgs),
}

#[derive(clap::Args)]
struct ChatArgs {
    /// A Hugging Face folder
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Answer this and exit
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// System message that opens the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Longest answer, tokens
    #[arg(long, default_value_t = 256, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=131_072))]
    max_new_tokens: u32,
    /// 0 is greedy
    #[arg(long, default_value_t = 0.7, value_name = "T", allow_negative_numbers = true, value_parser = chat::temperature)]
    temperature: f64,
    /// Nucleus mass in (0, 1]
    #[arg(long, default_value_t = 0.95, value_name = "P", allow_negative_numbers = true, value_parser = chat::top_p)]
    top_p: f64,
    /// The same seed gives the same answers
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u64,
    /// auto, cpu or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,
    /// auto, f32 or bf16
    #[arg(long, default_value = "auto")]
    dtype: String,
}

fn main() -> ExitCode {
    keep_freed_memory();
    let matches = Cli::command().get_matches();
    let parsed = Cli::from_arg_matches(&matches).and_then(|cli| Ok((cli, LogArgs::from_arg_matches(&matches)?)));
    let (cli, log) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => error.exit(),
    };
    log.init();
    let threads = cli.threads.map(usize::from);
    let done = match cli.command {
        Some(Command::Chat(args)) => talk(args, threads),
        Some(Command::Stats(args)) => runtime().and_then(|runtime| runtime.block_on(group::show_stats(&args))),
        // The optional group is `None` even when its flags are given: it holds another group.
        None => WorkerArgs::from_arg_matches(&matches)
            .map_err(|_| Error::new(Code::RequestInvalid, "--store is missing; see retort-teacher --help"))
            .and_then(|args| match Place::new(&cli.group, &LeaderWorkerSet::from_env())? {
                None => serve(args, threads, &cli.weights),
                Some(place) => stage(args, threads, &cli.weights, place),
            }),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => exit_with(&error),
    }
}

fn serve(args: WorkerArgs, threads: Option<usize>, weights: &str) -> Result<()> {
    let teacher = Teacher::new(arithmetic(&args, threads, weights)?, threads)?;
    let runtime = runtime()?;
    let done = runtime.block_on(retort_worker::run("teacher", args, teacher));
    runtime.shutdown_background();
    done
}

/// One stage of a group: the first works like any teacher, the others serve it.
fn stage(args: WorkerArgs, threads: Option<usize>, weights: &str, place: Place) -> Result<()> {
    let arithmetic = arithmetic(&args, threads, weights)?;
    let numbers = format!("{} {}", arithmetic.engine(), arithmetic.dtype());
    let runtime = runtime()?;
    let done = runtime.block_on(async {
        let shutdown = retort_worker::start(&args)?;
        // Said before the others are waited for.
        Store::check_address(&args.store)?;
        if !place.is_first() {
            let make = move || {
                if let Some(threads) = threads {
                    tch::set_num_threads(threads.clamp(1, 4096) as i32);
                }
                Box::new(Layers::new(arithmetic)) as Box<dyn group::Computer>
            };
            return group::serve(place, &numbers, make, &shutdown).await;
        }
        let formed = match Formed::new(place, &numbers, &shutdown).await {
            Err(error) if error.code == Code::WorkerStopped => return Ok(()),
            other => other?,
        };
        let teacher = Teacher::in_group(formed.parts, formed.pulse, arithmetic, threads)?;
        let done = retort_worker::run_until("teacher", args, teacher, &shutdown).await;
        let why = match &done {
            Ok(()) => &Error::new(Code::WorkerStopped, "stage 0 was asked to stop"),
            Err(error) => error,
        };
        formed.keeper.end(why).await;
        done
    });
    runtime.shutdown_background();
    done
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Error::internal(format!("cannot start the runtime: {error}")))
}

fn talk(args: ChatArgs, threads: Option<usize>) -> Result<()> {
    let (device, kind) = computing(&args.device, &args.dtype)?;
    if let Some(threads) = threads {
        tch::set_num_threads(threads.clamp(1, 4096) as i32);
    }
    let options = chat::Options {
        max_new_tokens: args.max_new_tokens,
        temperature: args.temperature,
        top_p: args.top_p,
        seed: args.seed,
        system: args.system,
    };
    chat::run(&args.model, device, kind, args.prompt, options)
}

fn arithmetic(args: &WorkerArgs, threads: Option<usize>, weights: &str) -> Result<Arithmetic> {
    let (devices, kind) = (devices(&args.device)?, &args.dtype);
    let wrong = |error: retort_llama::Error| Error::new(Code::DeviceUnavailable, error.to_string());
    let kind = retort_llama::dtype_from_flag(kind, devices[0]).map_err(wrong)?;
    let keep =
        Keep::from_flag(weights).map_err(|error| Error::new(Code::RequestInvalid, format!("--weights: {error}")))?;
    let arithmetic = match devices[..] {
        [device] => Arithmetic::on(device, kind, threads),
        _ => Arithmetic::Torch { devices, kind, keep },
    };
    Ok(arithmetic.keeping(keep))
}

/// One device, or several with a comma between, over which layers are dealt.
fn devices(flag: &str) -> Result<Vec<tch::Device>> {
    let wrong = |error: retort_llama::Error| Error::new(Code::DeviceUnavailable, error.to_string());
    flag.split(',').map(|one| retort_llama::device_from_flag(one.trim()).map_err(wrong)).collect()
}

fn computing(device: &str, dtype: &str) -> Result<(tch::Device, tch::Kind)> {
    let wrong = |error: retort_llama::Error| Error::new(Code::DeviceUnavailable, error.to_string());
    let device = retort_llama::device_from_flag(device).map_err(wrong)?;
    let kind = retort_llama::dtype_from_flag(dtype, device).map_err(wrong)?;
    Ok((device, kind))
}

#[cfg(test)]
mod tests {
    use clap::error::ErrorKind;

    use super::*;

    #[test]
    fn settings_out_of_bounds_are_refused_before_anything_is_read() {
        for (flag, value) in [
            ("--temperature", "nan"),
            ("--temperature", "1e300"),
            ("--temperature", "-1"),
            ("--temperature", "warm"),
            ("--top-p", "0"),
            ("--top-p", "inf"),
            ("--max-new-tokens", "0"),
        ] {
            let parsed = Cli::command().try_get_matches_from(["retort-teacher", "chat", "--model", "m", flag, value]);
            let error = parsed.expect_err(value);
            assert_eq!(error.kind(), ErrorKind::ValueValidation, "{flag} {value}: {error}");
            assert_eq!(error.exit_code(), 2);
        }
    }
}
