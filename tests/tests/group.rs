//! Teacher groups: a job over several stages succeeds, and whatever happens to a stage is seen within ten
//! seconds, named, and outlived; every shard is published once.

#![allow(clippy::unwrap_used)] // helpers of tests unwrap as tests do

use std::{
    path::Path,
    time::{Duration, Instant},
};

use retort_proto::{self as proto, job_event::What};
use retort_tests::{
    prompts::{self, Shape},
    published::published_once,
    retort::Up,
    teacher,
};
use rustix::process::Signal;

const PATIENCE: Duration = Duration::from_secs(300);
/// Within this long a fault must be seen.
const SEEN_WITHIN: Duration = Duration::from_secs(10);

fn shape() -> Shape {
    Shape { name: "group", train: 40, ..Shape::default() }
}

/// A running group of `stages`, and its job.
fn start(folder: &Path, stages: &str) -> (Up, String) {
    teacher::tiny(&folder.join("teacher"), 4);
    let spec = prompts::spec(folder, &folder.join("teacher"), &shape());
    let up = Up::start(folder, &["--teacher-stages", stages]);
    let job = up.create(&spec);
    (up, job)
}

async fn end(mut up: Up, job: &str) -> (Up, proto::Job, Vec<proto::JobEvent>) {
    let events = up.follow(job, PATIENCE, |_, _| false).await;
    let end = up.jobs().await.get_job(proto::GetJobRequest { name: job.to_owned() }).await.unwrap().into_inner();
    assert_eq!(end.state, proto::JobState::Succeeded as i32, "{:?}\n{}", end.error, up.log());
    published_once(&up, job, &shape(), &events);
    (up, end, events)
}

/// Sends `signal` to a stage in mid-job; the attempt is lost with what was seen of `seen`, the group
/// starts again, the job succeeds.
async fn outlives(name: &str, stages: &str, signal: Signal, seen: &str) {
    let folder = tempfile::tempdir().unwrap();
    let (mut up, job) = start(folder.path(), stages);
    up.follow(&job, PATIENCE, |_, event| published(event) >= 2).await;
    let before = up.processes();
    let at = Instant::now();
    up.signal_process(name, signal);
    up.wait_for_log(&["teacher-1"], &format!("{seen} of group \"teacher-1\""), SEEN_WITHIN);
    println!("{name}, {signal:?}: seen after {:.1} s", at.elapsed().as_secs_f64());
    let (up, _, _) = end(up, &job).await;
    let after = up.processes();
    for process in before.keys().filter(|name| name.starts_with("teacher-1")) {
        assert_ne!(before[process], after[process], "{process} was started again with its group");
    }
}

fn published(event: &proto::JobEvent) -> u32 {
    event.progress.as_ref().map_or(0, |progress| progress.shards_published)
}

#[tokio::test(flavor = "multi_thread")]
async fn three_stages_do_a_job() {
    let folder = tempfile::tempdir().unwrap();
    let (up, job) = start(folder.path(), "3");
    let (up, _, events) = end(up, &job).await;
    assert!(!events.iter().any(|event| matches!(event.what, Some(What::AttemptLost(_)))), "{}", up.log());
    let log = std::fs::read_to_string(folder.path().join("logs/teacher-1.log")).unwrap();
    assert!(log.contains("stage utilisation"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_middle_stage_is_killed() {
    outlives("teacher-1-stage-1", "3", Signal::KILL, "lost stage 1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_stage_is_killed() {
    outlives("teacher-1-stage-2", "3", Signal::KILL, "lost stage 2").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stage_hangs() {
    outlives("teacher-1-stage-1", "3", Signal::STOP, "lost stage 1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_stage_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let (mut up, job) = start(folder.path(), "3");
    up.follow(&job, PATIENCE, |_, event| published(event) >= 2).await;
    up.signal_process("teacher-1", Signal::KILL);
    for stage in ["teacher-1-stage-1", "teacher-1-stage-2"] {
        up.wait_for_log(&[stage], "lost stage", SEEN_WITHIN);
    }
    end(up, &job).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_stage_hangs() {
    let folder = tempfile::tempdir().unwrap();
    let (mut up, job) = start(folder.path(), "2");
    up.follow(&job, PATIENCE, |_, event| published(event) >= 2).await;
    up.signal_process("teacher-1", Signal::STOP);
    up.wait_for_log(&["teacher-1-stage-1"], "lost stage 0 of group \"teacher-1\"", SEEN_WITHIN);
    end(up, &job).await;
}
