//! What the rehearsal sees of a running group.

use std::{
    collections::BTreeMap,
    fs,
    process::Command,
    time::{Duration, Instant},
};

use retort_proto::{self as proto, job_event::What};
use retort_tests::retort::{Up, programs};

/// Follows the job from its beginning until this many shards are published, each once.
pub async fn published(up: &mut Up, job: &str, shards: u32, within: Duration) {
    let deadline = Instant::now() + within;
    let reached = |_: &mut Up, event: &proto::JobEvent| {
        let failed = [proto::JobState::Failed as i32, proto::JobState::Cancelled as i32];
        assert!(!failed.contains(&event.state), "the job failed: {event:?}");
        event.progress.as_ref().is_some_and(|progress| progress.shards_published >= shards)
    };
    let events = up.follow(job, deadline - Instant::now(), reached).await;
    let mut times: BTreeMap<u32, u32> = BTreeMap::new();
    for event in &events {
        if let Some(What::ShardPublished(shard)) = &event.what {
            *times.entry(shard.shard).or_default() += 1;
        }
    }
    assert!(times.values().all(|times| *times == 1), "shards published more than once: {times:?}");
}

/// Prints what `retort-teacher stats` says of each stage, and their memory.
pub fn figures(up: &Up, checkpoint_bytes: u64) {
    let processes = up.processes();
    let arguments = fs::read(format!("/proc/{}/cmdline", processes["teacher-1"])).expect("the first stage runs");
    let arguments: Vec<String> =
        arguments.split(|&byte| byte == 0).map(|text| String::from_utf8_lossy(text).into_owned()).collect();
    let peers = arguments.iter().position(|flag| flag == "--peers").map(|at| arguments[at + 1].clone()).expect("peers");
    let first = peers.split(',').next().expect("an address").to_owned();
    let output = Command::new(programs().join("retort-teacher"))
        .args(["stats", "--json", "--peer", &first])
        .output()
        .expect("retort-teacher runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let stats: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");

    println!("  stage   layers  MiB read  steps  tokens   busy  waits for input  for output  memory, MiB");
    let (mut read, mut memory) = (0, 0);
    for stage in stats["stages"].as_array().expect("stages") {
        let number = stage["stage"].as_u64().expect("a number");
        let name = if number == 0 { "teacher-1".to_owned() } else { format!("teacher-1-stage-{number}") };
        let own = own_memory(processes[&name]);
        memory += own;
        read += stage["bytes_read"].as_u64().expect("bytes");
        println!(
            "  {number:>5}  {:>3}-{:<3}  {:>8.1}  {:>5}  {:>6}  {:>4.1}%  {:>13.1} s  {:>8.1} s  {:>11.0}",
            stage["layers"][0].as_u64().expect("a layer"),
            stage["layers"][1].as_u64().expect("a layer") - 1,
            stage["bytes_read"].as_f64().expect("bytes") / f64::from(1 << 20),
            stage["steps"],
            stage["tokens"],
            100.0 * stage["busy"].as_f64().expect("a share"),
            stage["waiting_for_input_seconds"].as_f64().expect("seconds"),
            stage["waiting_for_output_seconds"].as_f64().expect("seconds"),
            own as f64 / 1024.0,
        );
    }
    assert_eq!(read, checkpoint_bytes, "between them the stages read every tensor, each once");
    println!(
        "  between them the stages read each tensor once; memory of all {:.1} GiB",
        memory as f64 / (1 << 20) as f64
    );
}

/// A process's share of memory, KiB: pages that several map are divided among them.
fn own_memory(pid: i32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}
