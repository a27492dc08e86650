//! What a group's stages hold and have done: by their own account, by the checkpoint's index and by the
//! kernel's.

use std::{collections::BTreeMap, fs, process::Command};

use retort_llama::Part;
use retort_tests::retort::{Up, programs};
use serde_json::Value;

use crate::checkpoint::Checkpoint;

/// Seconds of each stage since its layers were loaded: computing, and waiting.
pub struct Reading {
    incarnation: String,
    spent: Vec<(f64, f64)>,
}

/// One stage of a group that has loaded its layers.
pub struct Stage {
    pub layers: (u64, u64),
    pub bytes_read: u64,
    /// Files of the checkpoint that are mapped, and their bytes in memory.
    pub files: usize,
    /// All of the process that is in memory, bytes.
    pub resident: u64,
}

impl Reading {
    pub fn of(up: &Up) -> Self {
        let stats = stats(up, 0);
        let seconds = |stage: &Value, of: &str| stage[of].as_f64().expect("seconds");
        let spent = |stage: &Value| {
            let waiting = seconds(stage, "waiting_for_input_seconds") + seconds(stage, "waiting_for_output_seconds");
            (seconds(stage, "busy_seconds"), waiting)
        };
        Self { incarnation: text(&stats["incarnation"]), spent: list(&stats["stages"]).iter().map(spent).collect() }
    }

    /// Share of the time that each stage computed, between the first and the last reading of the group's
    /// last life.
    pub fn busy(readings: &[Self]) -> Vec<f64> {
        let Some(last) = readings.last() else { return Vec::new() };
        let first = readings.iter().find(|reading| reading.incarnation == last.incarnation).unwrap_or(last);
        let share = |((busy_then, waited_then), (busy, waited)): (&(f64, f64), &(f64, f64))| {
            let (busy, waited) = (busy - busy_then, waited - waited_then);
            busy / (busy + waited)
        };
        first.spent.iter().zip(&last.spent).map(share).collect()
    }
}

/// Every stage of the running group. That each has its own tensors and no other is asserted twice: the bytes
/// it says it read are those of its layers in the checkpoint, and of the checkpoint's files the kernel has
/// mapped none into it that holds nothing of its layers.
pub fn look(up: &Up, checkpoint: &Checkpoint) -> Vec<Stage> {
    let stats = stats(up, 0);
    let told = list(&stats["stages"]);
    let processes = up.processes();
    let stage = |(index, told): (usize, &Value)| {
        let name = if index == 0 { "teacher-1".to_owned() } else { format!("teacher-1-stage-{index}") };
        let number = |value: &Value| value.as_u64().expect("a number");
        let layers = (number(&told["layers"][0]), number(&told["layers"][1]));
        let part = Part {
            layers: layers.0 as usize..layers.1 as usize,
            embeds: index == 0,
            heads: index + 1 == list(&stats["stages"]).len(),
        };
        let (bytes, own) = checkpoint.of(&part);
        let bytes_read = number(&told["bytes_read"]);
        assert_eq!(bytes_read, bytes, "{name}: bytes read, and bytes of layers {layers:?} in the checkpoint");
        let mapped = mapped(processes[&name]);
        assert!(!mapped.is_empty(), "{name} has mapped no file of the checkpoint");
        let others: Vec<_> = mapped.iter().filter(|file| !own.contains(file)).collect();
        assert!(others.is_empty(), "{name} has mapped files without layers of its own: {others:?}");
        Stage { layers, bytes_read, files: mapped.len(), resident: status(processes[&name], "VmRSS:") }
    };
    let stages: Vec<Stage> = told.iter().enumerate().map(stage).collect();
    let ends: Vec<u64> = stages.iter().map(|stage| stage.layers.1).collect();
    let begins: Vec<u64> = stages.iter().map(|stage| stage.layers.0).collect();
    assert_eq!(
        (begins[0], &begins[1..], ends.last()),
        (0, &ends[..ends.len() - 1], Some(&126)),
        "all layers, in order"
    );
    stages
}

/// Prints the stages, and how busy they were in either job.
pub fn table(stages: &[Stage], scoring: &[f64], generating: &[f64]) {
    println!("\n  stage   layers  MiB read  files mapped  RSS, MiB  busy scoring  busy generating");
    for (index, stage) in stages.iter().enumerate() {
        println!(
            "  {index:>5}  {:>3}-{:<3}  {:>8.1}  {:>12}  {:>8.0}  {:>11.1}%  {:>14.1}%",
            stage.layers.0,
            stage.layers.1 - 1,
            mib(stage.bytes_read),
            stage.files,
            mib(stage.resident),
            100.0 * scoring[index],
            100.0 * generating[index],
        );
    }
    let mean = |of: &[f64]| 100.0 * of.iter().sum::<f64>() / of.len() as f64;
    println!(
        "  {:>5}  {:>7}  {:>8.1}  {:>12}  {:>8.0}  {:>11.1}%  {:>14.1}%\n",
        "all",
        "0-125",
        mib(stages.iter().map(|stage| stage.bytes_read).sum()),
        "",
        mib(stages.iter().map(|stage| stage.resident).sum()),
        mean(scoring),
        mean(generating),
    );
}

/// What `retort-teacher stats` says when a stage is asked; stage 0 answers for all.
pub fn stats(up: &Up, stage: usize) -> Value {
    let arguments = fs::read(format!("/proc/{}/cmdline", up.processes()["teacher-1"])).expect("the first stage runs");
    let arguments: Vec<String> =
        arguments.split(|&byte| byte == 0).map(|text| String::from_utf8_lossy(text).into_owned()).collect();
    let peers = arguments.iter().position(|flag| flag == "--peers").map(|at| arguments[at + 1].clone()).expect("peers");
    let peer = peers.split(',').nth(stage).expect("an address").to_owned();
    let output = Command::new(programs().join("retort-teacher"))
        .args(["stats", "--json", "--peer", &peer])
        .output()
        .expect("retort-teacher runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// Sum over all processes of the most memory that each has ever had, bytes.
pub fn peaks(up: &Up) -> u64 {
    up.processes().values().map(|pid| status(*pid, "VmHWM:")).sum()
}

/// Names of the checkpoint's files that a process has mapped.
fn mapped(pid: i32) -> Vec<String> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("the stage runs");
    let names = maps.lines().filter_map(|line| Some(line.rsplit_once('/')?.1.to_owned()));
    let files = names.filter(|name| name.ends_with(".safetensors"));
    files.map(|name| (name, ())).collect::<BTreeMap<_, _>>().into_keys().collect()
}

/// A line of `/proc/PID/status`, in bytes.
fn status(pid: i32, field: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) << 10
}

fn list(value: &Value) -> &[Value] {
    value.as_array().expect("a list")
}

fn text(value: &Value) -> String {
    value.as_str().expect("a text").to_owned()
}

pub fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
