//! The 405B's structure with its width shrunk, on this machine: docs/rehearsal-405b.md.
//!
//! A checkpoint of 191 files goes to 16 stage processes on loopback, started by `retort up` as a user would;
//! a job scores, another generates and loses a stage in the middle; each ends with a promoted student. Then
//! one process does the same two jobs, and its shards must be the group's, bit for bit. The first thing that
//! is wrong ends the rehearsal and is told.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a rehearsal stops at the first thing that is wrong

mod checkpoint;
mod fault;
mod jobs;
mod stages;
mod vocabulary;

use std::{
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

use clap::Parser;
use retort_artifact::soft_targets::Shard;
use retort_tests::{
    retort::Up,
    ticks::{Others, Ticks},
};

use crate::{
    checkpoint::Checkpoint,
    fault::Fault,
    jobs::{Done, Job},
    stages::{Reading, Stage, look, mib, peaks, table},
};

pub type Failure = Box<dyn std::error::Error>;

const STAGES: usize = 16;
/// All processes together, bytes.
const MEMORY: u64 = 24 << 30;

/// Rehearses Llama 3.1 405B over 16 stages on this machine, with the width of its layers shrunk 64 times.
#[derive(Parser)]
#[command(name = "rehearse_405b", after_help = "Example:\n  make rehearse-405b")]
struct Options {
    /// Where the checkpoint is kept for the next rehearsal, and where the two runs have their homes
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// The stage that is killed while the second job runs
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..STAGES as u64))]
    kill: u64,
}

/// How the group did.
struct Grouped {
    stages: Vec<Stage>,
    score: Done,
    generate: Done,
    fault: Fault,
    /// Of all processes together, bytes.
    peaks: u64,
    others: Others,
}

/// How one process did.
struct Alone {
    score: Done,
    generate: Done,
    threads: usize,
    others: Others,
}

#[tokio::main]
async fn main() {
    let started = Instant::now();
    std::panic::set_hook(Box::new(move |panic| {
        let said = panic.payload_as_str().unwrap_or("a panic that says nothing");
        eprintln!("rehearsal failed after {:.0} s: {said}", started.elapsed().as_secs_f64());
    }));
    if let Err(error) = rehearse(&Options::parse()).await {
        panic!("{error}");
    }
    println!("rehearsal passed in {:.0} s", started.elapsed().as_secs_f64());
}

async fn rehearse(options: &Options) -> Result<(), Failure> {
    fs::create_dir_all(&options.folder)?;
    let written = Instant::now();
    let checkpoint = Checkpoint::ready(&options.folder.join("checkpoint"))?;
    println!(
        "checkpoint     {} tensors, {:.1} M parameters, hidden {}, MLP {}, heads of {}; ready after {:.1} s",
        checkpoint.tensors(),
        checkpoint.parameters() as f64 / 1e6,
        checkpoint::HIDDEN,
        checkpoint::INNER,
        checkpoint::HEAD_DIM,
        written.elapsed().as_secs_f64()
    );
    let work = options.folder.join("work");
    if work.exists() {
        fs::remove_dir_all(&work)?;
    }
    let score = Job::score(&work, &checkpoint.folder)?;
    let generate = Job::generate(&work, &checkpoint.folder)?;

    let grouped = group(&work.join("group"), &checkpoint, [&score, &generate], options.kill as usize).await?;
    let alone = alone(&work.join("alone"), [&score, &generate]).await?;
    let pairs = [(&score, &grouped.score, &alone.score), (&generate, &grouped.generate, &alone.generate)];
    let mut positions = 0;
    for (job, of_group, of_one) in pairs {
        positions += equal(job, of_group, of_one)?;
    }

    table(&grouped.stages, &Reading::busy(&grouped.score.readings), &Reading::busy(&grouped.generate.readings));
    for (job, of_group, of_one) in pairs {
        println!(
            "{:<15}{:.0} tokens/s in {STAGES} stages of 1 thread, {:.0} in one process of {}: {:.2} of it; {:.1} s and {:.1} s in all",
            job.mode,
            of_group.tokens_a_second,
            of_one.tokens_a_second,
            alone.threads,
            of_group.tokens_a_second / of_one.tokens_a_second,
            of_group.seconds,
            of_one.seconds
        );
    }
    let fault = &grouped.fault;
    println!(
        "fault          stage {} lost: seen and named after {:.2} s, the group stood after {:.1} s, the next shard was published after {:.1} s",
        fault.stage,
        fault.seen,
        fault.stood,
        fault.published.ok_or("no shard was published after the fault")?
    );
    println!(
        "results        {positions} soft targets, all bit for bit those of one process; each shard published once"
    );
    println!(
        "memory         {:.1} GiB, the peaks of all processes of the group's run together",
        mib(grouped.peaks) / 1024.0
    );
    let cores = std::thread::available_parallelism()?;
    println!(
        "machine        {cores} cores, of which others used {:.2} during the group's jobs and {:.2} during one process's{}",
        grouped.others.used,
        alone.others.used,
        if grouped.others.quiet() && alone.others.quiet() { "" } else { ": quote no speeds" }
    );
    if grouped.peaks > MEMORY {
        return Err(format!("{:.1} GiB are more than a rehearsal may take", mib(grouped.peaks) / 1024.0).into());
    }
    fs::remove_dir_all(&work)?;
    Ok(())
}

async fn group(home: &Path, checkpoint: &Checkpoint, jobs: [&Job; 2], kill: usize) -> Result<Grouped, Failure> {
    fs::create_dir_all(home)?;
    let (started, before) = (Instant::now(), Ticks::now()?);
    let stages = STAGES.to_string();
    let mut up = Up::start(home, &["--teacher-stages", &stages, "--dtype", "f32", "--ready-timeout", "300"]);
    println!("group          {STAGES} stages stood after {:.1} s", started.elapsed().as_secs_f64());
    let score = jobs[0].run(&mut up, None).await?;
    let stages = look(&up, checkpoint);
    let mut fault = Fault::of(kill);
    let generate = jobs[1].run(&mut up, Some(&mut fault)).await?;
    look(&up, checkpoint);
    let peaks = peaks(&up);
    // What a process used counts once it has ended.
    drop(up);
    let others = Ticks::now()?.since(&before, std::thread::available_parallelism()?.get());
    Ok(Grouped { stages, score, generate, fault, peaks, others })
}

/// One process, with as many threads as the group's could run at once.
async fn alone(home: &Path, jobs: [&Job; 2]) -> Result<Alone, Failure> {
    fs::create_dir_all(home)?;
    let cores = std::thread::available_parallelism()?.get();
    let (threads, before) = (cores.min(STAGES), Ticks::now()?);
    println!("alone          one process of {threads} threads does the same jobs");
    let mut up = Up::start_on(home, threads, &["--dtype", "f32"]);
    let score = jobs[0].run(&mut up, None).await?;
    let generate = jobs[1].run(&mut up, None).await?;
    drop(up);
    Ok(Alone { score, generate, threads, others: Ticks::now()?.since(&before, cores) })
}

/// Compares what the group published with what one process did; counts the soft targets.
fn equal(job: &Job, group: &Done, alone: &Done) -> Result<u64, Failure> {
    // Job and attempt are others; all else of the header must be the same, the teacher's hash among it.
    let of = |shard: &Shard| {
        let mut shard = shard.clone();
        (shard.header.job, shard.header.epoch) = (String::new(), 0);
        shard
    };
    if !group.shards.keys().eq(alone.shards.keys()) {
        return Err(format!("the {} job has other shards in the group than in one process", job.mode).into());
    }
    for (index, shard) in &group.shards {
        let (ours, theirs) = (of(shard), of(&alone.shards[index]));
        if ours.header != theirs.header {
            return Err(format!(
                "{} shard {index}: {:?} in the group, {:?} in one process",
                job.mode, ours.header, theirs.header
            )
            .into());
        }
        if let Some((row, _)) = ours.sequences.iter().zip(&theirs.sequences).find(|(ours, theirs)| ours != theirs) {
            return Err(format!("{} shard {index}: row {:?} differs from one process's", job.mode, row.row_id).into());
        }
        if ours != theirs {
            return Err(format!("{} shard {index} has other rows than one process's", job.mode).into());
        }
    }
    Ok(group.shards.values().map(Shard::target_tokens).sum())
}
