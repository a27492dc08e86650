//! Attempts that fail: which are tried again, when, and what fails the job.

use super::*;

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
async fn a_full_disk_costs_no_attempt_for_a_day() {
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
        assert!(outages < 1000);
    }
    assert_eq!(outages, apply::MAX_OUTAGES + 3);
    assert!(waited_ms > 24 * 3600 * 1000, "{waited_ms} ms");
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
