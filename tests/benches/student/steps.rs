//! retort's distillation step beside the plain PyTorch one of the same student, batch and precision: tokens a second
//! and peak memory. The two take turns, each time in a fresh process.

use std::{path::Path, process::Command, time::Duration};

use retort_tests::ticks::{Others, Ticks};
use serde::{Deserialize, Serialize};

use crate::{Failure, Options, overheads, quiet};

/// One step's work.
#[derive(Clone, Copy, Serialize)]
struct Case {
    vocab: u32,
    batch: u32,
    length: u32,
    k: u32,
    /// Of PyTorch's peak memory, at most.
    memory_bar: f64,
    /// Whether the rate has a bar too.
    timed: bool,
}

const CASES: [Case; 2] = [
    Case { vocab: 49_152, batch: 4, length: 512, k: 64, memory_bar: 0.40, timed: true },
    Case { vocab: 128_256, batch: 4, length: 512, k: 64, memory_bar: 0.25, timed: false },
];
/// Of PyTorch's rate, at least.
const RATE_BAR: f64 = 1.3;
const RATE_BAR_BF16: f64 = 1.6;
/// OpenMP's threads go on spinning after their work.
const SETTLE: Duration = Duration::from_millis(500);

#[derive(Clone, Copy, Deserialize, Serialize)]
struct Turn {
    tokens_per_s: f64,
    peak_gb: f64,
}

/// Both sides' turns at a case.
#[derive(Serialize)]
struct Measured {
    case: Case,
    retort: Vec<Turn>,
    pytorch: Vec<Turn>,
}

#[derive(Serialize)]
pub struct Steps {
    threads: usize,
    bf16: bool,
    rounds: u32,
    others: Others,
    measured: Vec<Measured>,
}

pub fn measure(options: &Options) -> Result<Steps, Failure> {
    let cores = std::thread::available_parallelism()?.get();
    let threads = options.threads.map_or(cores, |threads| threads as usize);
    let own = std::env::current_exe()?.with_file_name("kd_step");
    let python = options.cache.join("venv-transformers/bin/python");
    for (path, made_by) in
        [(&own, "cargo build --workspace --examples"), (&python, "python3 setup/fetch.py transformers")]
    {
        if !path.exists() {
            return Err(format!("{} is not there: run `{made_by}`", path.display()).into());
        }
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/student/pytorch_step.py");
    let before = Ticks::now()?;
    let mut measured: Vec<Measured> =
        CASES.map(|case| Measured { case, retort: Vec::new(), pytorch: Vec::new() }).into();
    for round in 1..=options.rounds {
        for Measured { case, retort, pytorch } in &mut measured {
            let mut theirs = Command::new(&python);
            theirs.arg(&script);
            for (side, mut command, turns) in [("retort", Command::new(&own), retort), ("pytorch", theirs, pytorch)] {
                let turn = turn(command.args(arguments(case, options, threads)))
                    .map_err(|error| format!("{side}, vocabulary {}: {error}", case.vocab))?;
                let Turn { tokens_per_s, peak_gb } = turn;
                eprintln!(
                    "round {round} of {}: {side}, vocabulary {}: {tokens_per_s:.0} tokens/s, {peak_gb:.2} GB",
                    options.rounds, case.vocab
                );
                turns.push(turn);
            }
        }
    }
    let others = Ticks::now()?.since(&before, cores);
    Ok(Steps { threads, bf16: options.bf16, rounds: options.rounds, others, measured })
}

impl Steps {
    pub fn table(&self) -> String {
        let dtype = if self.bf16 { "bf16" } else { "float32" };
        let rate_bar = if self.bf16 { RATE_BAR_BF16 } else { RATE_BAR };
        let head = format!(
            "{dtype}, {} threads each, {} rounds. {}\n\n\
             | step | | retort | plain PyTorch | ratio of medians | of rounds | wanted | |\n|---|---|---|---|---|---|---|---|",
            self.threads,
            self.rounds,
            quiet(self.others)
        );
        let rows = self.measured.iter().flat_map(|measured| {
            let bar = measured.case.timed.then_some(rate_bar);
            [
                row(
                    measured,
                    "tokens/s",
                    |turn| turn.tokens_per_s,
                    |ratio| bar.map(|bar| (format!("{bar}"), ratio >= bar)),
                ),
                row(
                    measured,
                    "peak, GB",
                    |turn| turn.peak_gb,
                    |ratio| {
                        let bar = measured.case.memory_bar;
                        Some((format!("at most {bar}"), ratio <= bar))
                    },
                ),
            ]
        });
        std::iter::once(head).chain(rows).collect::<Vec<_>>().join("\n")
    }
}

fn arguments(case: &Case, options: &Options, threads: usize) -> Vec<String> {
    let numbers = [
        ("--vocab", case.vocab),
        ("--batch", case.batch),
        ("--length", case.length),
        ("--k", case.k),
        ("--steps", options.steps),
        ("--threads", threads as u32),
    ];
    let numbers = numbers.into_iter().flat_map(|(name, number)| [name.to_owned(), number.to_string()]);
    numbers.chain(options.bf16.then(|| "--bf16".to_owned())).collect()
}

/// The last line that a side prints.
fn turn(command: &mut Command) -> Result<Turn, Failure> {
    std::thread::sleep(SETTLE);
    let done = command.output()?;
    if !done.status.success() {
        let why = String::from_utf8_lossy(&done.stderr);
        return Err(format!("{}: {}", done.status, why.lines().last().unwrap_or("it said nothing")).into());
    }
    let said = String::from_utf8(done.stdout)?;
    Ok(serde_json::from_str(said.lines().last().unwrap_or_default())?)
}

fn row(
    measured: &Measured,
    what: &str,
    of: impl Fn(&Turn) -> f64,
    judge: impl Fn(f64) -> Option<(String, bool)>,
) -> String {
    let Measured { case, retort, pytorch } = measured;
    let median = |turns: &[Turn]| overheads::median(turns.iter().map(&of).collect()).unwrap_or(f64::NAN);
    let ratios = || retort.iter().zip(pytorch).map(|(ours, theirs)| of(ours) / of(theirs));
    let (least, greatest) = (ratios().fold(f64::INFINITY, f64::min), ratios().fold(0.0, f64::max));
    let (ours, theirs) = (median(retort), median(pytorch));
    let (bar, met) = match judge(ours / theirs) {
        Some((bar, met)) => (bar, if met { "met" } else { "**missed**" }),
        None => (String::new(), ""),
    };
    let digits = if ours >= 10.0 { 0 } else { 2 };
    format!(
        "| vocabulary {}, {} x {}, k {} | {what} | {ours:.digits$} | {theirs:.digits$} | {:.2} | {least:.2} to {greatest:.2} | {bar} | {met} |",
        case.vocab,
        case.batch,
        case.length,
        case.k,
        ours / theirs
    )
}
