//! `kill -9` of each process in mid-job: the job succeeds, every shard is published once, nothing
//! stays behind, and the report says what was redone.

#![allow(clippy::unwrap_used)] // helpers of tests unwrap as tests do

use std::time::Duration;

use retort_proto::{self as proto, job_event::What};
use retort_tests::{
    prompts::{self, Shape},
    published::published_once,
    retort::Up,
    teacher,
};

const PATIENCE: Duration = Duration::from_secs(300);

/// Kills `name` once `when` holds for an event of the job, and follows the job to its end.
async fn survives(
    name: &str,
    kill: fn(&mut Up, &str),
    when: impl Fn(&proto::JobEvent) -> bool,
) -> (proto::Job, Vec<proto::JobEvent>) {
    let folder = tempfile::tempdir().unwrap();
    teacher::tiny(&folder.path().join("teacher"), 4);
    let shape = Shape::default();
    let spec = prompts::spec(folder.path(), &folder.path().join("teacher"), &shape);
    let mut up = Up::start(folder.path(), &[]);
    let job = up.create(&spec);

    let before = up.follow(&job, PATIENCE, |_, event| when(event)).await;
    assert_eq!(
        before.last().unwrap().state,
        proto::JobState::Running as i32,
        "the job must still run when {name} is killed"
    );
    kill(&mut up, name);
    let events = up.follow(&job, PATIENCE, |_, _| false).await;

    let end = up.jobs().await.get_job(proto::GetJobRequest { name: job.clone() }).await.unwrap().into_inner();
    assert_eq!(end.state, proto::JobState::Succeeded as i32, "{:?}\n{}", end.error, up.log());
    published_once(&up, &job, &shape, &events);
    (end, events)
}

fn shards_published(event: &proto::JobEvent) -> u32 {
    event.progress.as_ref().map_or(0, |progress| progress.shards_published)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_teacher() {
    // A task whose result was just accepted is held and not redone: so it is killed three times.
    let three_times = |up: &mut Up, name: &str| (0..3).for_each(|_| up.kill_at_work(name));
    let (job, _) = survives("teacher-1", three_times, |event| shards_published(event) >= 3).await;
    let redone = job.report.unwrap().redone;
    assert!(redone.iter().any(|one| one.task.contains("shard-")), "the report names the shard redone: {redone:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_student() {
    let (job, _) = survives("student-1", Up::kill, |event| matches!(event.what, Some(What::CheckpointSaved(_)))).await;
    let redone = job.report.unwrap().redone;
    assert!(redone.iter().any(|one| one.task.ends_with("train")), "the report names the train run: {redone:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_broker() {
    survives("broker", Up::kill, |event| shards_published(event) >= 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_orchestrator() {
    survives("orchestrator", Up::kill, |event| shards_published(event) >= 3).await;
}
