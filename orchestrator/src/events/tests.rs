mod failures;
mod replicas;
mod reuse;

use retort_artifact::paths;
use retort_bus::EventRecord;
use retort_core::{
    Code,
    id::{JobId, TaskId},
    state::{JobState, TaskState},
};
use retort_proto::{self as proto, job_event, worker_event};

use super::*;
use crate::{
    Settings,
    database::{shards, tasks},
    intake, leases,
    testing::*,
};

async fn next_offset(world: &World) -> i64 {
    offsets::list(&mut world.context.database.read().await.unwrap()).await.unwrap()[0].1
}

async fn skipped(world: &World) -> i64 {
    offsets::count_skipped(&mut world.context.database.read().await.unwrap()).await.unwrap()
}

#[tokio::test]
async fn a_shard_is_published_once_however_often_it_is_reported() {
    let world = World::new().await;
    let job = world.job().await;
    let task = TaskId::shard(&job, 2);
    let epoch = world.claim(&task, "a").await;
    let event = world.event(&task, epoch, shard_ready(&job, 2, epoch));
    assert_eq!(world.apply(event.clone()).await, Outcome::Applied);
    assert_eq!(world.apply(event).await, Outcome::Repeated);
    // The same news under another id: a worker whose acknowledgement was lost.
    assert_eq!(world.emit(&task, epoch, shard_ready(&job, 2, epoch)).await, Outcome::Repeated);

    let read = world.read_job(&job).await;
    assert_eq!((read.shards_published, read.target_tokens, read.store_bytes), (1, 20, 1000));
    assert_eq!(world.task_state(&task).await, TaskState::Done);
    let published = world.journal(&job).await.into_iter().filter(|event| {
        matches!(event.what, Some(job_event::What::ShardPublished(proto::ShardPublished { shard: 2, epoch: 1, .. })))
    });
    assert_eq!(published.count(), 1);
    assert_eq!(next_offset(&world).await, 3);
}

#[tokio::test]
async fn a_stale_attempt_changes_nothing() {
    let world = World::new().await;
    let job = world.job().await;
    let task = TaskId::shard(&job, 0);
    let old = world.claim(&task, "slow").await;
    world.clock.advance_ms(15_000);
    let new = world.claim(&task, "quick").await;
    assert_eq!(world.emit(&task, old, shard_ready(&job, 0, old)).await, Outcome::Stale);
    assert_eq!(world.emit(&task, old, task_failed(Code::Internal, false)).await, Outcome::Stale);
    assert_eq!(world.task_state(&task).await, TaskState::Leased);
    assert_eq!(world.emit(&task, new, shard_ready(&job, 0, new)).await, Outcome::Applied);
    assert_eq!(world.emit(&task, old, shard_ready(&job, 0, old)).await, Outcome::Stale);
    let found = shards::find(&mut world.context.database.read().await.unwrap(), &job, 0).await.unwrap().unwrap();
    assert_eq!(found.epoch, new);
    assert_eq!(world.read_job(&job).await.shards_published, 1);
}

#[tokio::test]
async fn a_result_that_comes_after_its_lease_is_taken_if_nobody_else_began() {
    let world = World::new().await;
    let job = world.job().await;
    let task = TaskId::shard(&job, 0);
    let epoch = world.claim(&task, "slow").await;
    world.clock.advance_ms(15_000);
    leases::reap(&world.context).await.unwrap();
    assert_eq!(world.emit(&task, epoch, shard_ready(&job, 0, epoch)).await, Outcome::Applied);
    assert_eq!(world.task_state(&task).await, TaskState::Done);
    let snapshot = &mut world.context.database.read().await.unwrap();
    assert_eq!(tasks::count_redone(snapshot, &job).await.unwrap(), 0);
}

#[tokio::test]
async fn records_that_make_no_sense_are_written_down_and_passed_over() {
    let world = World::new().await;
    let job = world.job().await;
    let task = TaskId::shard(&job, 0);
    let epoch = world.claim(&task, "a").await;

    let record = EventRecord { partition: 0, offset: 0, event: Err(Error::new(Code::BusMalformed, "no protobuf")) };
    assert_eq!(apply(&world.context, &record).await.unwrap(), Outcome::Skipped("no protobuf".into()));
    assert_eq!(next_offset(&world).await, 1);

    let good = shard_ready(&job, 0, epoch);
    let of_another_key = shard_ready(&job, 1, epoch);
    let mut nameless = world.event(&task, epoch, good.clone());
    nameless.event_id.clear();
    let mut empty = world.event(&task, epoch, good.clone());
    empty.what = None;
    let mut astray = train_finished(&job, 1);
    astray.checkpoint_key = "models/support/000001/".into();
    let train = TaskId::train(&job);
    let events = [
        nameless,
        empty,
        world.event(&task, 0, good.clone()),
        world.event(&task, epoch + 1, shard_ready(&job, 0, epoch + 1)),
        world.event(&task, epoch, of_another_key),
        world.event(&TaskId::shard(&job, 999), 1, shard_ready(&job, 999, 1)),
        world.event(&task, epoch, evaluation(0.1)),
        world.event(&train, epoch, worker_event::What::TrainFinished(astray)),
        world.event(&train, epoch, good.clone()),
    ];
    let count = events.len() as i64;
    for event in events {
        let outcome = world.apply(event).await;
        assert!(matches!(outcome, Outcome::Skipped(_)), "{outcome:?}");
    }
    // Record 0 was overwritten by the first of these: offsets began anew.
    assert_eq!((skipped(&world).await, next_offset(&world).await), (count, count));
    assert_eq!(world.emit(&task, epoch, good).await, Outcome::Applied);
}

#[tokio::test]
async fn the_evaluation_waits_for_training_and_every_held_out_shard() {
    let world = World::new().await;
    let job = world.job().await;
    let evaluate = TaskId::evaluate(&job);
    for shard in 0..4 {
        world.publish(&job, shard).await;
    }
    world.train(&job).await;
    assert_eq!(world.task_state(&evaluate).await, TaskState::Waiting);
    let epoch = world.publish(&job, 4).await;
    assert_eq!(world.task_state(&evaluate).await, TaskState::Ready);

    // A held-out shard that turns out corrupt makes it wait again.
    intake::withdraw(&world.context, &job, 4, epoch, "student", "wrong checksum").await.unwrap();
    assert_eq!(world.task_state(&evaluate).await, TaskState::Waiting);
    world.publish(&job, 4).await;
    assert_eq!(world.task_state(&evaluate).await, TaskState::Ready);
    world.evaluate(&job, 0.1).await;
    assert_eq!(world.read_job(&job).await.evaluation.unwrap().after.kl, 0.1);
}

#[tokio::test]
async fn training_shows_in_the_progress() {
    let world = World::new().await;
    let job = world.job().await;
    let task = TaskId::train(&job);
    let epoch = world.claim(&task, "student").await;
    for (step, loss) in [(1, 3.0), (2, 2.0), (4, 1.0), (3, 1.5)] {
        world.clock.advance_ms(500);
        assert_eq!(world.emit(&task, epoch, train_progress(step, loss)).await, Outcome::Applied);
    }
    let read = world.read_job(&job).await;
    assert_eq!((read.training.step, read.training.loss, read.training.held_out_kl), (4, Some(1.0), Some(0.5)));
    assert_eq!(read.training.processed_tokens, 40);
    let progress = world.journal(&job).await.pop().unwrap().progress.unwrap();
    assert_eq!((progress.step, progress.steps_total, progress.train_loss), (4, 6, 1.0));

    // Numbers that JSON and SQLite cannot hold do not stop anything.
    assert_eq!(world.emit(&task, epoch, train_progress(5, f64::NAN)).await, Outcome::Applied);
    assert_eq!(world.read_job(&job).await.training.loss, None);

    // Another attempt goes back to where it can.
    assert_eq!(world.emit(&task, epoch, task_failed(Code::WorkerStopped, true)).await, Outcome::Applied);
    let epoch = world.claim(&task, "student").await;
    assert_eq!(world.read_job(&job).await.training.step, 5, "until it says where that is");
    assert_eq!(world.emit(&task, epoch, train_progress(2, 2.5)).await, Outcome::Applied);
    let read = world.read_job(&job).await;
    assert_eq!((read.training.step, read.training.loss, read.training.processed_tokens), (2, Some(2.5), 20));
}

#[tokio::test]
async fn a_full_disk_applies_neither_the_event_nor_its_offset() {
    let world = World::new().await;
    let job = world.job().await;
    let task = TaskId::train(&job);
    let epoch = world.claim(&task, "student").await;
    let samples = vec![proto::Sample { prompt: "x".repeat(15_000), ..Default::default() }; 90];
    for shard in 0..5 {
        world.publish(&job, shard).await;
    }
    world.emit(&task, epoch, worker_event::What::TrainFinished(train_finished(&job, epoch))).await;
    let evaluate = TaskId::evaluate(&job);
    let epoch = world.claim(&evaluate, "student").await;
    let worker_event::What::EvaluationReady(mut ready) = evaluation(0.1) else { unreachable!() };
    ready.samples = samples;
    let event = world.event(&evaluate, epoch, worker_event::What::EvaluationReady(ready));

    let before = next_offset(&world).await;
    world.context.database.limit_pages(Some(0)).await;
    let record = EventRecord { partition: 0, offset: 100, event: Ok(event) };
    assert_eq!(apply(&world.context, &record).await.unwrap_err().code, Code::DiskFull);
    assert_eq!(next_offset(&world).await, before);
    assert_eq!(world.task_state(&evaluate).await, TaskState::Leased);

    world.context.database.limit_pages(None).await;
    assert_eq!(apply(&world.context, &record).await.unwrap(), Outcome::Applied);
    assert_eq!(next_offset(&world).await, 101);
}
