//! `kill -9` of each process in mid-job: the job succeeds, every shard is published once, nothing
//! stays behind, and the report says what was redone.

#![allow(clippy::unwrap_used)] // helpers of tests unwrap as tests do

use std::time::Duration;

use retort_artifact::paths;
use retort_core::random::{Counter, Purpose};
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

/// The weights of the job's last checkpoint, as they lie in the store.
fn weights(up: &Up, job: &str) -> Vec<u8> {
    let id = job.strip_prefix("jobs/").unwrap();
    let keys = up.objects(&format!("{job}/checkpoints"));
    let weights = keys.iter().filter(|key| key.ends_with("model/model.safetensors"));
    let last = weights.max_by_key(|key| paths::parse_checkpoint(id, key).unwrap()).expect("a checkpoint");
    std::fs::read(up.home.join("store").join(last)).unwrap()
}

const KILLS: usize = 3;

/// Three times, at steps drawn from a seed (`RETORT_TEST_SEED`, or else the clock's) out of the first three quarters
/// of the run, so that the last kill too finds it training.
#[tokio::test(flavor = "multi_thread")]
async fn a_student_killed_at_random_steps_ends_with_the_same_bytes() {
    let clock = || std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    let seed = std::env::var("RETORT_TEST_SEED").map_or_else(|_| clock(), |seed| seed.parse().unwrap());
    println!("RETORT_TEST_SEED={seed}");
    let folder = tempfile::tempdir().unwrap();
    teacher::tiny(&folder.path().join("teacher"), 4);
    let shape = Shape { train: 40, held_out: 4, tokens: 24, passes: 16, ..Shape::default() };
    let spec = prompts::spec(folder.path(), &folder.path().join("teacher"), &shape);
    let mut up = Up::start(folder.path(), &[]);

    let straight = up.create(&spec);
    up.follow(&straight, PATIENCE, |_, _| false).await;
    let end = up.jobs().await.get_job(proto::GetJobRequest { name: straight.clone() }).await.unwrap().into_inner();
    assert_eq!(end.state, proto::JobState::Succeeded as i32, "{:?}\n{}", end.error, up.log());
    let steps = end.plan.unwrap().optimizer_steps;
    let mut random = Counter::new(seed, Purpose::Sample, 0, 0);
    let mut at: Vec<u32> = (0..KILLS).map(|_| 1 + random.below(u64::from(steps) * 3 / 4) as u32).collect();
    at.sort_unstable();

    // Its shards are those of the first job.
    let killed = up.create(&spec);
    let mut at = at.into_iter().peekable();
    let (mut kills, mut lost) = (0, 0);
    up.follow(&killed, PATIENCE, |up, event| {
        let step = match &event.what {
            Some(What::TrainStepped(stepped)) => stepped.step,
            Some(What::CheckpointSaved(saved)) => saved.step,
            Some(What::AttemptLost(attempt)) => {
                lost += usize::from(attempt.redone.as_ref().is_some_and(|redone| redone.task.ends_with("train")));
                0
            }
            _ => 0,
        };
        // What comes before the news of the last kill was said by who was killed.
        if kills == lost && at.next_if(|&at| step >= at && step < steps).is_some() {
            kills += 1;
            up.kill("student-1");
        }
        false
    })
    .await;
    let end = up.jobs().await.get_job(proto::GetJobRequest { name: killed.clone() }).await.unwrap().into_inner();
    assert_eq!(end.state, proto::JobState::Succeeded as i32, "{:?}\n{}", end.error, up.log());
    let redone = end.report.unwrap().redone.into_iter().filter(|redone| redone.task.ends_with("train"));
    assert_eq!((kills, lost, redone.count()), (KILLS, KILLS, KILLS), "seed {seed}\n{}", up.log());
    assert!(weights(&up, &killed) == weights(&up, &straight), "seed {seed}: {kills} kills changed the student");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_broker() {
    survives("broker", Up::kill, |event| shards_published(event) >= 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_orchestrator() {
    survives("orchestrator", Up::kill, |event| shards_published(event) >= 3).await;
}
