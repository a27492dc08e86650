//! `kill -9` of each process in mid-job: the job succeeds, every shard is published once, nothing
//! stays behind, and the report says what was redone.

#![allow(clippy::unwrap_used)] // helpers of tests unwrap as tests do

use std::{collections::BTreeMap, time::Duration};

use retort_proto::{self as proto, job_event::What};
use retort_tests::{
    prompts::{self, Shape},
    retort::Up,
    teacher,
};

const PATIENCE: Duration = Duration::from_secs(300);

/// Kills `name` once `when` holds for an event of the job, and again after every third shard until it was
/// killed `kills` times; then follows the job to its end.
async fn survives(
    name: &str,
    kills: u32,
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
    up.kill(name);
    for kill in 1..kills {
        up.follow(&job, PATIENCE, |_, event| shards_published(event) >= 3 + 3 * kill).await;
        up.kill(name);
    }
    let events = up.follow(&job, PATIENCE, |_, _| false).await;

    let end = up.jobs().await.get_job(proto::GetJobRequest { name: job.clone() }).await.unwrap().into_inner();
    assert_eq!(end.state, proto::JobState::Succeeded as i32, "{:?}\n{}", end.error, up.log());
    published_once(&up, &job, &shape, &events);
    (end, events)
}

fn published_once(up: &Up, job: &str, shape: &Shape, events: &[proto::JobEvent]) {
    let mut published: BTreeMap<u32, u64> = BTreeMap::new();
    for event in events {
        if let Some(What::ShardPublished(shard)) = &event.what {
            assert!(published.insert(shard.shard, shard.epoch).is_none(), "shard {} was published twice", shard.shard);
        }
    }
    let shards = shape.train.div_ceil(shape.shard_rows) + shape.held_out.div_ceil(shape.shard_rows);
    assert_eq!(published.len(), shards, "every shard is published");
    let expected: Vec<String> =
        published.iter().map(|(shard, epoch)| format!("{job}/shards/{shard:05}/{epoch}.parquet")).collect();
    // The janitor removes superseded objects right after the job's end.
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while up.objects(&format!("{job}/shards")) != expected && std::time::Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(200));
    }
    assert_eq!(up.objects(&format!("{job}/shards")), expected, "the store holds what was published and nothing else");
}

fn shards_published(event: &proto::JobEvent) -> u32 {
    event.progress.as_ref().map_or(0, |progress| progress.shards_published)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_teacher() {
    // Between two shards it holds none, and nothing is redone: so it is killed more than once.
    let (job, _) = survives("teacher-1", 4, |event| shards_published(event) >= 3).await;
    let redone = job.report.unwrap().redone;
    assert!(redone.iter().any(|one| one.task.contains("shard-")), "the report names the shard redone: {redone:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_student() {
    let (job, _) = survives("student-1", 1, |event| matches!(event.what, Some(What::CheckpointSaved(_)))).await;
    let redone = job.report.unwrap().redone;
    assert!(redone.iter().any(|one| one.task.ends_with("train")), "the report names the train run: {redone:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_broker() {
    survives("broker", 1, |event| shards_published(event) >= 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_orchestrator() {
    survives("orchestrator", 1, |event| shards_published(event) >= 3).await;
}
