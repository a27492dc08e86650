//! The rounds: every side at its work, one after the other, again and again.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use crate::{
    Failure, Options,
    machine::Machine,
    side::{About, Answer, Side},
    work::{RETORT, RETORT_2, RETORT_16, ROOF, ROUND, SIDES, TRANSFORMERS, VLLM, Work},
};

/// OpenMP's threads go on spinning for 0.2 s after their work; the next side shall have the cores to itself.
const SETTLE: Duration = Duration::from_millis(500);

pub struct Measured {
    /// Of every side, or why it was left out.
    pub sides: BTreeMap<&'static str, Result<About, String>>,
    /// What each side answered at each work, round after round, in the order of a round.
    pub answers: Vec<(&'static str, Work, Vec<Answer>)>,
    pub rounds: u32,
    pub seconds: f64,
}

pub fn run(options: &Options, machine: &Machine, folder: &Path) -> Result<Measured, Failure> {
    if let Some(unknown) = options.without.iter().find(|side| !SIDES.contains(&side.as_str())) {
        return Err(format!("--without {unknown}: the sides are {}", SIDES.join(", ")).into());
    }
    let started = Instant::now();
    let vocab = u32::try_from(retort_llama::Config::from_dir(&options.model)?.vocab_size)?;
    let mut running = BTreeMap::new();
    let mut sides = BTreeMap::new();
    for name in SIDES {
        let side = start(name, options, machine, folder);
        let side = side.and_then(|side| warmed(name, side, vocab));
        match &side {
            Ok(side) => eprintln!("{name}: {}, {}", side.about.version, side.about.dtype),
            Err(why) => eprintln!("{name}: left out: {why}"),
        }
        sides.insert(name, side.as_ref().map(|side| side.about.clone()).map_err(String::clone));
        running.extend(side.ok().map(|side| (name, side)));
    }
    let mut answers: Vec<(&'static str, Work, Vec<Answer>)> =
        ROUND.iter().map(|&(name, work)| (name, if options.quick { work.short() } else { work }, Vec::new())).collect();
    let rounds = if options.quick { 1 } else { options.rounds };
    for round in 0..rounds {
        for (name, work, answered) in &mut answers {
            let Some(side) = running.get_mut(name) else { continue };
            std::thread::sleep(SETTLE);
            match side.ask(&work.request(vocab, u64::from(round))) {
                Ok(answer) => {
                    let rate = answer.tokens as f64 / answer.seconds;
                    eprintln!("round {}: {name}: {}: {rate:.1} tokens/s", round + 1, work.name());
                    answered.push(answer);
                }
                Err(why) => {
                    eprintln!("round {}: {name}: left out: {why}", round + 1);
                    running.remove(name);
                    sides.insert(name, Err(why));
                }
            }
        }
    }
    drop(running);
    Ok(Measured { sides, answers, rounds, seconds: started.elapsed().as_secs_f64() })
}

/// Starts a side and waits until it is loaded; the error is why it cannot run.
pub fn start(name: &str, options: &Options, machine: &Machine, folder: &Path) -> Result<Side, String> {
    if options.without.iter().any(|without| without == name) {
        return Err("as asked".to_owned());
    }
    let mut command = match name {
        RETORT | RETORT_2 | RETORT_16 | ROOF => {
            let mut command = Command::new(std::env::current_exe().map_err(|error| error.to_string())?);
            command.args(["answer", name]).arg(&options.model).arg(machine.dtype);
            command.arg(machine.threads.to_string()).arg(folder.join("store"));
            command
        }
        TRANSFORMERS | VLLM => {
            let python = options.cache.join(format!("venv-{name}/bin/python"));
            if !python.exists() {
                return Err(format!("{} is not there: run `python3 setup/fetch.py {name}`", python.display()));
            }
            let script =
                PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("benches/teacher/peers/with_{name}.py"));
            let mut command = Command::new(python);
            command.arg(script).arg(&options.model);
            command.arg(if machine.dtype == "bf16" { "bfloat16" } else { "float32" });
            command.arg(machine.threads.to_string());
            // They ask nobody and tell nobody: the model is a folder.
            command.envs([("HF_HUB_OFFLINE", "1"), ("VLLM_NO_USAGE_STATS", "1"), ("DO_NOT_TRACK", "1")]);
            command.env("VLLM_CACHE_ROOT", folder.join("vllm"));
            if name == VLLM {
                command.env("LD_PRELOAD", advised(&options.cache.join("venv-vllm")));
            }
            command
        }
        _ => return Err("nobody knows how to start it".to_owned()),
    };
    command.env("OMP_NUM_THREADS", machine.threads.to_string()).env("PYTHONDONTWRITEBYTECODE", "1");
    Side::start(command, &folder.join(format!("{name}.log")))
}

/// The libraries that vLLM advises to load before all others, as far as they are there: the OpenMP that came
/// with it, and an allocator of the system.
fn advised(environment: &Path) -> String {
    let openmp = environment.join("lib/libiomp5.so");
    let allocator = PathBuf::from("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4");
    let there = [allocator, openmp].into_iter().filter(|library| library.exists());
    there.map(|library| library.display().to_string()).collect::<Vec<_>>().join(":")
}

/// Has a side do a little of each of its works, whose first time is always slower.
fn warmed(name: &str, mut side: Side, vocab: u32) -> Result<Side, String> {
    for (_, work) in ROUND.iter().filter(|(of, _)| *of == name) {
        // A seed that no round has.
        side.ask(&work.short().request(vocab, u64::MAX))?;
    }
    Ok(side)
}
