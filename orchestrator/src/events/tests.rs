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
async fn a_failure_that_may_pass_is_tried_again_after_a_while() {
    let world = World::new().await;
    let job = world.job().await;
    let task = TaskId::shard(&job, 0);
    for (attempt, wait_ms) in [(1, 1000), (2, 2000)] {
        let epoch = world.claim(&task, "a").await;
        assert_eq!(epoch, attempt);
        assert_eq!(world.emit(&task, epoch, task_failed(Code::Internal, true)).await, Outcome::Applied);
        // Its own late result counts no more.
        assert_eq!(world.emit(&task, epoch, shard_ready(&job, 0, epoch)).await, Outcome::Stale);
        let read = world.read_task(&task).await;
        assert_eq!((read.state, read.not_before_ms), (TaskState::Ready, world.context.now_ms() + wait_ms));
        world.clock.advance_ms(wait_ms);
    }
    let epoch = world.claim(&task, "a").await;
    world.emit(&task, epoch, task_failed(Code::Internal, true)).await;
    let (code, message) = world.read_job(&job).await.error.unwrap();
    assert_eq!(code, "attempts-exhausted");
    assert!(message.ends_with("the last time: internal: it broke"), "{message}");
}

#[tokio::test]
async fn a_full_disk_costs_no_attempt_for_half_an_hour() {
    let world = World::new().await;
    let job = world.job().await;
    let task = TaskId::shard(&job, 0);
    let (mut outages, mut waited_ms) = (0, 0);
    while world.read_job(&job).await.error.is_none() {
        let epoch = world.claim(&task, "a").await;
        assert_eq!(world.emit(&task, epoch, task_failed(Code::DiskFull, true)).await, Outcome::Applied);
        let wait_ms = (world.read_task(&task).await.not_before_ms - world.context.now_ms()).max(0);
        world.clock.advance_ms(wait_ms);
        waited_ms += wait_ms;
        outages += 1;
        assert!(outages < 100);
    }
    assert_eq!(outages, apply::MAX_OUTAGES + 3);
    assert!(waited_ms > 25 * 60 * 1000, "{waited_ms} ms");
    let (code, message) = world.read_job(&job).await.error.unwrap();
    assert_eq!(code, "attempts-exhausted");
    assert!(message.ends_with("the last time: disk-full: it broke"), "{message}");
}

#[tokio::test]
async fn a_stopped_worker_costs_no_attempt() {
    let world = World::new().await;
    let job = world.job().await;
    let task = TaskId::shard(&job, 0);
    for _ in 0..10 {
        let epoch = world.claim(&task, "a").await;
        world.emit(&task, epoch, task_failed(Code::WorkerStopped, true)).await;
    }
    assert_eq!(world.read_job(&job).await.state, JobState::Running);
    assert_eq!(world.task_state(&task).await, TaskState::Ready);
}

#[tokio::test]
async fn a_student_that_made_room_goes_on_when_there_are_shards() {
    let world = World::new().await;
    let job = world.job().await;
    let task = TaskId::train(&job);
    let epoch = world.claim(&task, "student").await;
    assert_eq!(world.emit(&task, epoch, task_failed(Code::AttemptYielded, true)).await, Outcome::Applied);
    assert_eq!(world.task_state(&task).await, TaskState::Waiting);
    world.publish(&job, 0).await;
    assert_eq!(world.task_state(&task).await, TaskState::Ready);
    assert_eq!(world.read_task(&task).await.attempts, 0);
    let snapshot = &mut world.context.database.read().await.unwrap();
    assert_eq!(tasks::count_redone(snapshot, &job).await.unwrap(), 0);

    // The last shard came while it said so: nothing more will wake it.
    let epoch = world.claim(&task, "student").await;
    world.publish(&job, 1).await;
    world.publish(&job, 2).await;
    world.emit(&task, epoch, task_failed(Code::AttemptYielded, true)).await;
    assert_eq!(world.task_state(&task).await, TaskState::Ready);
}

#[tokio::test]
async fn a_failure_that_stays_fails_the_job_with_its_own_code() {
    let world = World::new().await;
    let job = world.job().await;
    let task = TaskId::shard(&job, 0);
    let epoch = world.claim(&task, "a").await;
    world.emit(&task, epoch, task_failed(Code::PromptTooLong, false)).await;
    let read = world.read_job(&job).await;
    assert_eq!(read.state, JobState::Failed);
    assert_eq!(read.error.unwrap(), ("prompt-too-long".to_owned(), "shard-00000: it broke".to_owned()));
    let last = world.journal(&job).await.pop().unwrap();
    assert_eq!(last.state, proto::JobState::Failed as i32);
    // Whatever still arrives comes too late.
    let other = TaskId::train(&job);
    assert_eq!(leases::heartbeat(&world.context, &other, 0, "x").await.unwrap(), leases::Beat::Cancelled);
}

#[tokio::test]
async fn an_unfaithful_shard_is_computed_once_more() {
    let world = World::new().await;
    let job = world.job().await;
    let (once, twice) = (TaskId::shard(&job, 0), TaskId::shard(&job, 1));
    for task in [&once, &twice] {
        let epoch = world.claim(task, "a").await;
        world.emit(task, epoch, task_failed(Code::ShardUnfaithful, false)).await;
        let read = world.read_task(task).await;
        assert_eq!((read.state, read.attempts), (TaskState::Ready, 0));
        world.clock.advance_ms(read.not_before_ms - world.context.now_ms());
    }
    let epoch = world.claim(&once, "a").await;
    assert_eq!(world.emit(&once, epoch, shard_ready(&job, 0, epoch)).await, Outcome::Applied);
    assert_eq!(world.read_job(&job).await.state, JobState::Running);
    let epoch = world.claim(&twice, "a").await;
    world.emit(&twice, epoch, task_failed(Code::ShardUnfaithful, false)).await;
    let read = world.read_job(&job).await;
    assert_eq!(read.error.unwrap(), ("shard-unfaithful".to_owned(), "shard-00001: it broke".to_owned()));
}

#[tokio::test]
async fn an_unfaithful_shard_is_told_as_one_however_few_attempts_are_left() {
    let world = World::with(Settings { window: 4, max_attempts: 1, ..Settings::default() }).await;
    let job = world.job().await;
    let task = TaskId::shard(&job, 0);
    for attempt in 1..=2 {
        let epoch = world.claim(&task, "a").await;
        assert_eq!(epoch, attempt);
        world.emit(&task, epoch, task_failed(Code::ShardUnfaithful, false)).await;
        world.clock.advance_ms(1000);
    }
    let (code, _) = world.read_job(&job).await.error.unwrap();
    assert_eq!(code, "shard-unfaithful");

    // The first is told only after its lease has run out, on the way to the last attempt.
    let world = World::new().await;
    let job = world.job().await;
    let task = TaskId::shard(&job, 0);
    world.claim(&task, "a").await;
    world.clock.advance_ms(15_000);
    let epoch = world.claim(&task, "a").await;
    world.clock.advance_ms(15_000);
    leases::reap(&world.context).await.unwrap();
    world.emit(&task, epoch, task_failed(Code::ShardUnfaithful, false)).await;
    let read = world.read_task(&task).await;
    assert_eq!((read.state, read.attempts), (TaskState::Ready, 1));
    world.clock.advance_ms(read.not_before_ms - world.context.now_ms());
    let snapshot = &mut world.context.database.read().await.unwrap();
    let reasons: Vec<String> =
        tasks::list_redone(snapshot, &job).await.unwrap().into_iter().map(|redone| redone.reason).collect();
    assert!(reasons.len() == 2 && reasons[1] == "shard-unfaithful: it broke", "{reasons:?}");
    let epoch = world.claim(&task, "a").await;
    world.emit(&task, epoch, task_failed(Code::ShardUnfaithful, false)).await;
    let (code, _) = world.read_job(&job).await.error.unwrap();
    assert_eq!(code, "shard-unfaithful");
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
    assert_eq!(read.training.trained_tokens, 40);
    let progress = world.journal(&job).await.pop().unwrap().progress.unwrap();
    assert_eq!((progress.step, progress.steps_total, progress.train_loss), (4, 6, 1.0));

    // Numbers that JSON and SQLite cannot hold do not stop anything.
    assert_eq!(world.emit(&task, epoch, train_progress(5, f64::NAN)).await, Outcome::Applied);
    assert_eq!(world.read_job(&job).await.training.loss, None);
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

#[tokio::test]
async fn a_reused_shard_is_published_at_the_key_it_has() {
    let world = World::new().await;
    let (first, second) = (world.job().await, world.job().await);
    let work = "c".repeat(64);
    let epoch = world.publish_work(&first, 2, &work).await;
    let key = paths::shard(first.as_str(), 2, epoch);
    let of_second = world.reuse(&second, 2, &work, &key).await;
    let found = shards::find(&mut world.context.database.read().await.unwrap(), &second, 2).await.unwrap().unwrap();
    assert_eq!((found.key, found.epoch, found.reused), (key, of_second, true));
    assert_eq!(found.work_sha256.unwrap(), work);

    let read = world.read_job(&second).await;
    assert_eq!((read.shards_published, read.target_tokens, read.store_bytes), (1, 20, 1000));
    // What was not computed says nothing of the teacher's speed.
    let progress = world.journal(&second).await.pop().unwrap().progress.unwrap();
    assert_eq!(progress.teacher_tokens_per_second, 0.0);
    let told = world.journal(&second).await.into_iter().find_map(|event| match event.what {
        Some(job_event::What::ShardPublished(published)) => Some(published.reused),
        _ => None,
    });
    assert_eq!(told, Some(true));
}

#[tokio::test]
async fn only_a_published_shard_of_the_same_work_can_be_reused() {
    let world = World::new().await;
    let (first, second) = (world.job().await, world.job().await);
    let work = "c".repeat(64);
    let epoch = world.publish_work(&first, 2, &work).await;
    let key = paths::shard(first.as_str(), 2, epoch);
    let task = TaskId::shard(&second, 2);
    let own = world.claim(&task, "teacher-1").await;

    let changed = |job: &JobId, change: fn(&mut proto::ShardReady)| {
        let worker_event::What::ShardReady(mut ready) = shard_reused(job, 2, &work, &key) else { unreachable!() };
        change(&mut ready);
        worker_event::What::ShardReady(ready)
    };
    let impossible: [fn(&mut proto::ShardReady); 5] = [
        |ready| ready.work_sha256.clear(),
        |ready| ready.work_sha256 = "c".repeat(63),
        |ready| ready.reused = false,
        |ready| ready.key = "models/support/000001/model.safetensors".to_owned(),
        |ready| ready.key = format!("jobs/../{}", ready.key),
    ];
    for (index, change) in impossible.into_iter().enumerate() {
        let outcome = world.emit(&task, own, changed(&second, change)).await;
        assert!(matches!(outcome, Outcome::Skipped(_)), "{index}: {outcome:?}");
    }
    assert_eq!(skipped(&world).await, impossible.len() as i64);
    assert_eq!(world.task_state(&task).await, TaskState::Leased);
    assert_eq!(world.emit(&task, own, changed(&second, |_| {})).await, Outcome::Applied);

    // What no job has published is not taken.
    let unpublished: [fn(&mut proto::ShardReady); 5] = [
        |ready| ready.work_sha256 = "d".repeat(64),
        |ready| ready.sha256 = "b".repeat(64),
        |ready| ready.bytes += 1,
        |ready| ready.target_tokens += 1,
        |ready| ready.key = ready.key.replace("/1.parquet", "/2.parquet"),
    ];
    for change in unpublished {
        let other = world.job().await;
        let task = TaskId::shard(&other, 2);
        let epoch = world.claim(&task, "teacher-1").await;
        assert_eq!(world.emit(&task, epoch, changed(&other, change)).await, Outcome::Applied);
        assert_eq!(world.task_state(&task).await, TaskState::Ready);
        assert_eq!(world.read_job(&other).await.shards_published, 0);
    }
}

#[tokio::test]
async fn a_reused_shard_whose_job_was_deleted_is_done_again_at_once() {
    let world = World::with(Settings { window: 4, max_attempts: 1, ..Settings::default() }).await;
    let (first, second) = (world.job().await, world.job().await);
    let work = "c".repeat(64);
    let epoch = world.publish_work(&first, 2, &work).await;
    let key = paths::shard(first.as_str(), 2, epoch);
    let task = TaskId::shard(&second, 2);
    let own = world.claim(&task, "teacher-1").await;
    // Between the teacher's check and its event.
    intake::cancel(&world.context, &first).await.unwrap();
    intake::delete(&world.context, &first).await.unwrap();
    assert_eq!(world.emit(&task, own, shard_reused(&second, 2, &work, &key)).await, Outcome::Applied);
    let read = world.read_task(&task).await;
    assert_eq!((read.state, read.not_before_ms), (TaskState::Ready, world.context.now_ms()));
    let snapshot = &mut world.context.database.read().await.unwrap();
    let redone = tasks::list_redone(snapshot, &second).await.unwrap();
    assert_eq!(redone[0].reason, format!("it reused {key}, and no job has published that as this work"));
    // Its own late word counts no more, and the next attempt computes the shard.
    assert_eq!(world.emit(&task, own, shard_ready(&second, 2, own)).await, Outcome::Stale);
    let next = world.claim(&task, "teacher-1").await;
    assert_eq!(world.emit(&task, next, shard_ready(&second, 2, next)).await, Outcome::Applied);
}

#[tokio::test]
async fn shards_of_a_job_have_one_teacher() {
    let world = World::new().await;
    let job = world.job().await;
    let of = |shard: u32, epoch: u64, teacher: &str| {
        let worker_event::What::ShardReady(ready) = shard_ready(&job, shard, epoch) else { unreachable!() };
        worker_event::What::ShardReady(proto::ShardReady { teacher_sha256: teacher.to_owned(), ..ready })
    };
    world.publish(&job, 0).await;
    let task = TaskId::shard(&job, 1);
    let epoch = world.claim(&task, "teacher-2").await;
    assert_eq!(world.emit(&task, epoch, of(1, epoch, &"f".repeat(64))).await, Outcome::Applied);
    // The attempt has failed and is done again a little later, most often by another teacher.
    let read = world.read_task(&task).await;
    assert_eq!(read.state, TaskState::Ready);
    assert!(read.not_before_ms > world.context.now_ms());
    assert_eq!(world.read_job(&job).await.shards_published, 1);
    let snapshot = &mut world.context.database.read().await.unwrap();
    let redone = tasks::list_redone(snapshot, &job).await.unwrap();
    let (theirs, of_job) = ("f".repeat(64), "e".repeat(64));
    let expected = format!(
        "teacher-mismatch: shard 1 was computed with the teacher weights {theirs}, and shard 0 of the same job with {of_job}; \
         give every teacher of the pool the same model"
    );
    assert_eq!(redone[0].reason, expected);

    // A teacher that does not say is believed, and another job may have another one.
    let task = TaskId::shard(&job, 2);
    let epoch = world.claim(&task, "teacher-1").await;
    assert_eq!(world.emit(&task, epoch, of(2, epoch, "")).await, Outcome::Applied);
    assert_eq!(world.read_job(&job).await.shards_published, 2);
    let found = shards::find(&mut world.context.database.read().await.unwrap(), &job, 0).await.unwrap().unwrap();
    assert_eq!(found.teacher_sha256, Some(of_job));
    let other = world.job().await;
    let task = TaskId::shard(&other, 0);
    let epoch = world.claim(&task, "teacher-2").await;
    let worker_event::What::ShardReady(ready) = shard_ready(&other, 0, epoch) else { unreachable!() };
    let what = worker_event::What::ShardReady(proto::ShardReady { teacher_sha256: theirs, ..ready });
    assert_eq!(world.emit(&task, epoch, what).await, Outcome::Applied);
    assert_eq!(world.read_job(&other).await.shards_published, 1);
}

/// A job of three student workers.
async fn replicated(world: &World) -> JobId {
    let mut spec = spec(std::path::Path::new("/nowhere"));
    spec.train.parallel = Some(retort_core::spec::Parallel::of(3));
    world.job_with(spec).await
}

#[tokio::test]
async fn replicas_end_with_their_train_task_and_hold_nothing_up() {
    let world = World::new().await;
    let job = replicated(&world).await;
    for shard in 0..5 {
        let task = TaskId::shard(&job, shard);
        let epoch = world.claim(&task, "teacher").await;
        world.emit(&task, epoch, shard_ready(&job, shard, epoch)).await;
    }
    let (train, replica) = (TaskId::train(&job), TaskId::replica(&job, 1));
    assert_eq!(replica.replica_number(), Some(1));
    let epoch = world.claim(&train, "lead").await;
    let of_replica = world.claim(&replica, "helper").await;
    assert_eq!(world.task_state(&TaskId::replica(&job, 2)).await, TaskState::Ready, "nobody has taken the other one");
    // A replica cannot say that the training is done.
    let outcome =
        world.emit(&replica, of_replica, worker_event::What::TrainFinished(train_finished(&job, of_replica))).await;
    assert!(matches!(outcome, Outcome::Skipped(_)), "{outcome:?}");

    assert_eq!(
        leases::heartbeat(&world.context, &replica, of_replica, "helper").await.unwrap(),
        leases::Beat::Extended
    );
    world.emit(&train, epoch, worker_event::What::TrainFinished(train_finished(&job, epoch))).await;
    for number in [1, 2] {
        assert_eq!(world.task_state(&TaskId::replica(&job, number)).await, TaskState::Cancelled);
    }
    assert_eq!(
        leases::heartbeat(&world.context, &replica, of_replica, "helper").await.unwrap(),
        leases::Beat::Cancelled
    );
    let evaluate = TaskId::evaluate(&job);
    let epoch = world.claim(&evaluate, "lead").await;
    world.emit(&evaluate, epoch, evaluation(0.25)).await;
    let ready = crate::database::jobs::judgeable(&mut world.context.database.read().await.unwrap()).await.unwrap();
    assert_eq!(ready, [job]);
}

#[tokio::test]
async fn a_replica_may_fail_for_good_and_its_job_goes_on() {
    let world = World::new().await;
    let job = replicated(&world).await;
    let (one, two) = (TaskId::replica(&job, 1), TaskId::replica(&job, 2));
    let epoch = world.claim(&one, "a").await;
    world.emit(&one, epoch, task_failed(Code::Internal, false)).await;
    assert_eq!(world.task_state(&one).await, TaskState::Failed);
    // Lost as often as a task may be.
    for _ in 0..world.context.settings.max_attempts {
        world.claim(&two, "b").await;
        world.clock.advance_ms(world.context.settings.lease_ms());
        leases::reap(&world.context).await.unwrap();
    }
    assert_eq!(world.task_state(&two).await, TaskState::Failed);
    assert!(!world.read_job(&job).await.state.is_final());
    // One that made room for others asks again in a while.
    let job = replicated(&world).await;
    let replica = TaskId::replica(&job, 1);
    let epoch = world.claim(&replica, "c").await;
    world.emit(&replica, epoch, task_failed(Code::AttemptYielded, true)).await;
    let task = world.read_task(&replica).await;
    assert_eq!((task.state, task.attempts), (TaskState::Ready, 0));
    assert!(task.not_before_ms > world.context.now_ms());
}
