//! The 405B's structure with its width shrunk, over 16 stage processes on this machine: a checkpoint of
//! 191 files is written, a job scored and another generated, a stage killed in the middle of each; then
//! the figures of every stage are printed. docs/teacher-groups.md says what this proves, and what not.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a rehearsal stops at the first thing that is wrong

mod checkpoint;
mod watch;

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use retort_tests::{
    prompts::{self, Shape},
    retort::Up,
};
use rustix::process::Signal;

const STAGES: usize = 16;
const PATIENCE: Duration = Duration::from_secs(1200);
/// Stages that are killed: in the middle while it scores, the last while it generates.
const KILLED: [usize; 2] = [7, 15];

#[tokio::main]
async fn main() {
    let home = PathBuf::from(std::env::args().nth(1).expect("the folder to work in is the first argument"));
    if home.exists() {
        fs::remove_dir_all(&home).expect("the last rehearsal's folder can be removed");
    }
    fs::create_dir_all(&home).expect("a folder");
    let started = Instant::now();
    let written = checkpoint::write(&home.join("teacher"));
    println!(
        "checkpoint     126 layers, 128 heads, 8 KV heads, vocabulary 128,256, llama3 RoPE scaling; hidden {}, MLP {}",
        checkpoint::HIDDEN,
        checkpoint::INNER
    );
    println!(
        "               {} tensors, {:.1} M parameters, {} files, {:.0} MiB, written in {:.1} s",
        written.tensors,
        written.parameters as f64 / 1e6,
        checkpoint::FILES,
        mib(written.bytes),
        started.elapsed().as_secs_f64()
    );

    let started = Instant::now();
    let stages = STAGES.to_string();
    let mut up = Up::start(&home, &["--teacher-stages", &stages, "--students", "0", "--ready-timeout", "300"]);
    println!("group          {STAGES} stages stood after {:.1} s", started.elapsed().as_secs_f64());

    for (mode, killed) in ["score", "generate"].into_iter().zip(KILLED) {
        let shape = Shape { name: mode, train: 48, held_out: 8, shard_rows: 8, tokens: 16, passes: 1 };
        let spec = spec(&home, mode, &shape);
        let started = Instant::now();
        let job = up.create(&spec);
        watch::published(&mut up, &job, 2, PATIENCE).await;
        let name = format!("teacher-1-stage-{killed}");
        up.signal_process(&name, Signal::KILL);
        let at = Instant::now();
        up.wait_for_log(
            &["teacher-1"],
            &format!("lost stage {killed} of group \"teacher-1\""),
            Duration::from_secs(10),
        );
        let seen = at.elapsed().as_secs_f64();
        let shards = (shape.train.div_ceil(shape.shard_rows) + shape.held_out.div_ceil(shape.shard_rows)) as u32;
        watch::published(&mut up, &job, shards, PATIENCE).await;
        println!(
            "{mode:<15}{shards} shards, each published once, in {:.1} s; stage {killed} killed in the middle, seen after {seen:.2} s",
            started.elapsed().as_secs_f64()
        );
        watch::figures(&up, written.bytes);
    }
    println!("rehearsal passed");
}

/// A spec in a folder of its own, since each mode has its prompts.
fn spec(home: &Path, mode: &str, shape: &Shape) -> PathBuf {
    let folder = home.join(mode);
    fs::create_dir_all(&folder).expect("a folder");
    let path = prompts::spec(&folder, &home.join("teacher"), shape);
    if mode == "score" {
        let text = fs::read_to_string(&path).expect("the spec");
        fs::write(&path, text.replace("teacher:\n", "teacher:\n  mode: score\n")).expect("the spec");
        let lines = fs::read_to_string(folder.join("prompts.jsonl")).expect("the prompts");
        let completed = |line: &str| {
            let mut row: serde_json::Value = serde_json::from_str(line).expect("a row");
            row["completion"] = "We have found the order and will write to you before the end of the day.".into();
            row.to_string() + "\n"
        };
        fs::write(folder.join("prompts.jsonl"), lines.lines().map(completed).collect::<String>()).expect("the prompts");
    }
    path
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
