use retort_core::{Code, id::JobId, state::JobState};
use retort_proto::job_event;

use super::*;
use crate::{events::Outcome, intake, outbox, testing::*};

async fn refusal(world: &World, task: &TaskId) -> Reason {
    match claim(&world.context, task, "late").await.unwrap() {
        Claim::NotClaimable(reason) => reason,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_lease_is_exclusive_until_it_runs_out_and_each_claim_has_a_higher_epoch() {
    let world = World::new().await;
    let job = world.job().await;
    let task = TaskId::shard(&job, 0);
    assert_eq!(world.claim(&task, "a").await, 1);

    world.clock.advance_ms(5_000);
    match claim(&world.context, &task, "b").await.unwrap() {
        Claim::RetryAfter(wait) => assert_eq!(wait, Duration::from_secs(10)),
        other => panic!("{other:?}"),
    }
    // A heartbeat moves the end.
    assert_eq!(heartbeat(&world.context, &task, 1, "a").await.unwrap(), Beat::Extended);
    world.clock.advance_ms(14_999);
    assert!(matches!(claim(&world.context, &task, "b").await.unwrap(), Claim::RetryAfter(_)));
    world.clock.advance_ms(1);
    assert_eq!(world.claim(&task, "b").await, 2);

    let error = heartbeat(&world.context, &task, 1, "a").await.unwrap_err();
    assert_eq!(error.code, Code::AttemptFenced);
    // The right epoch from the wrong worker is fenced too.
    assert_eq!(heartbeat(&world.context, &task, 2, "a").await.unwrap_err().code, Code::AttemptFenced);
    assert_eq!(heartbeat(&world.context, &task, 2, "b").await.unwrap(), Beat::Extended);
}

#[tokio::test]
async fn the_first_claim_starts_the_job() {
    let world = World::new().await;
    let job = world.job().await;
    assert_eq!(world.read_job(&job).await.state, JobState::Queued);
    world.clock.advance_ms(1000);
    world.claim(&TaskId::train(&job), "student").await;
    world.clock.advance_ms(1000);
    world.claim(&TaskId::shard(&job, 1), "teacher").await;
    let read = world.read_job(&job).await;
    assert_eq!((read.state, read.start_ms), (JobState::Running, Some(START_MS + 1000)));
    assert_eq!(world.journal(&job).await.len(), 1);
}

#[tokio::test]
async fn a_training_makes_no_room_for_its_own_replicas() {
    let world = World::new().await;
    let mut spec = spec(std::path::Path::new("/nowhere"));
    spec.train.parallel = Some(retort_core::spec::Parallel::of(3));
    let job = world.job_with(spec).await;
    outbox::fill(&world.context).await.unwrap();
    let train = TaskId::train(&job);
    world.claim(&train, "lead").await;
    let replica = TaskId::replica(&job, 1);
    assert_eq!(world.task_state(&replica).await, TaskState::Queued);
    assert!(!others_wait(&world.context, &train).await.unwrap());
    world.claim(&replica, "follows").await;
    assert!(!others_wait(&world.context, &replica).await.unwrap());
    // Another job's training is another matter.
    world.job().await;
    outbox::fill(&world.context).await.unwrap();
    assert!(others_wait(&world.context, &train).await.unwrap());
    assert!(others_wait(&world.context, &replica).await.unwrap());
}

#[tokio::test]
async fn a_lost_lease_is_ready_again_and_said_so() {
    let world = World::new().await;
    let job = world.job().await;
    let task = TaskId::shard(&job, 1);
    world.claim(&task, "dies").await;
    assert_eq!(reap(&world.context).await.unwrap(), 0);
    world.clock.advance_ms(15_000);
    assert_eq!(reap(&world.context).await.unwrap(), 1);
    assert_eq!(reap(&world.context).await.unwrap(), 0);
    assert_eq!(world.task_state(&task).await, TaskState::Ready);

    let redone = tasks::list_redone(&mut world.context.database.read().await.unwrap(), &job).await.unwrap();
    let [lost] = redone.as_slice() else { panic!("{redone:?}") };
    assert_eq!((lost.task.as_str(), lost.epoch, lost.worker.as_str()), ("shard-00001", 1, "dies"));
    assert_eq!(lost.reason, "lease expired: no heartbeat for 15 s");
    let last = world.journal(&job).await.pop().unwrap();
    assert_eq!(last.progress.unwrap().attempts_redone, 1);
    match last.what.unwrap() {
        job_event::What::AttemptLost(lost) => assert_eq!(lost.redone.unwrap().worker, "dies"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_late_heartbeat_takes_its_work_back_unless_another_has_it() {
    let world = World::new().await;
    let job = world.job().await;
    let task = TaskId::shard(&job, 0);
    world.claim(&task, "slow").await;
    world.clock.advance_ms(15_000);
    reap(&world.context).await.unwrap();
    assert_eq!(heartbeat(&world.context, &task, 1, "slow").await.unwrap(), Beat::Extended);
    assert_eq!(world.task_state(&task).await, TaskState::Leased);
    let snapshot = &mut world.context.database.read().await.unwrap();
    assert_eq!(tasks::count_redone(snapshot, &job).await.unwrap(), 0);
}

#[tokio::test]
async fn the_last_attempt_lost_fails_the_job() {
    let world = World::new().await;
    let job = world.job().await;
    let task = TaskId::train(&job);
    for attempt in 1..=3 {
        assert_eq!(world.claim(&task, "dies").await, attempt);
        world.clock.advance_ms(15_000);
        reap(&world.context).await.unwrap();
    }
    let read = world.read_job(&job).await;
    assert_eq!(read.state, JobState::Failed);
    let (code, message) = read.error.unwrap();
    assert_eq!(code, "attempts-exhausted");
    assert_eq!(
        message,
        "train was attempted 3 times and never ended in its result; the last time: lease expired: no heartbeat for 15 s"
    );
    assert_eq!(refusal(&world, &task).await, Reason::Failed);
    assert_eq!(refusal(&world, &TaskId::shard(&job, 0)).await, Reason::Failed);
    assert_eq!(world.task_state(&TaskId::shard(&job, 0)).await, TaskState::Cancelled);
}

#[tokio::test]
async fn what_cannot_be_claimed_says_why() {
    let world = World::new().await;
    let job = world.job().await;
    assert_eq!(refusal(&world, &TaskId::shard(&JobId::generate(), 0)).await, Reason::UnknownTask);
    // Its record is a stray one: the evaluation is not due.
    assert_eq!(refusal(&world, &TaskId::evaluate(&job)).await, Reason::Done);
    world.publish(&job, 0).await;
    assert_eq!(refusal(&world, &TaskId::shard(&job, 0)).await, Reason::Done);
    intake::cancel(&world.context, &job).await.unwrap();
    assert_eq!(refusal(&world, &TaskId::shard(&job, 1)).await, Reason::Cancelled);
}

/// Four of the job's five shards are published, in this order of priority.
const PUBLISHED: [u32; 4] = [3, 4, 0, 1];

async fn published_world() -> (World, JobId) {
    let world = World::new().await;
    let job = world.job().await;
    outbox::fill(&world.context).await.unwrap();
    (world, job)
}

async fn given(world: &World, named: &TaskId, worker: &str) -> TaskId {
    match claim(&world.context, named, worker).await.unwrap() {
        Claim::Claimed(lease) => lease.task.id,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn records_in_any_order_give_tasks_in_the_order_of_priority() {
    let (world, job) = published_world().await;
    let mut found = Vec::new();
    for record in PUBLISHED.into_iter().rev() {
        let worker = format!("worker-{record}");
        found.push(given(&world, &TaskId::shard(&job, record), &worker).await);
    }
    assert_eq!(found, PUBLISHED.map(|shard| TaskId::shard(&job, shard)));
}

#[tokio::test]
async fn a_record_whose_task_is_taken_is_worth_another_task() {
    let (world, job) = published_world().await;
    let [first, second, third, fourth] = PUBLISHED.map(|shard| TaskId::shard(&job, shard));
    assert_eq!(given(&world, &first, "a").await, first);
    assert_eq!(given(&world, &first, "b").await, second);
    // The news that "b" is done with its task may still be on the bus: it is not taken back.
    assert_eq!(given(&world, &first, "b").await, third);
    assert_eq!(given(&world, &first, "c").await, fourth);
    assert_eq!(world.task_state(&second).await, TaskState::Leased);
    assert!(matches!(claim(&world.context, &first, "d").await.unwrap(), Claim::RetryAfter(_)));
}

#[tokio::test]
async fn another_jobs_record_is_worth_a_task_after_its_own_job_ended() {
    let (world, job) = published_world().await;
    let record = TaskId::shard(&job, 1);
    assert_eq!(given(&world, &record, "a").await, TaskId::shard(&job, 3));
    let other = world.job().await;
    intake::cancel(&world.context, &job).await.unwrap();
    outbox::fill(&world.context).await.unwrap();
    assert_eq!(given(&world, &record, "b").await, TaskId::shard(&other, 3));
}

#[tokio::test]
async fn what_a_worker_has_just_finished_is_not_done_again() {
    let world = World::new().await;
    let job = world.job().await;
    let task = TaskId::shard(&job, 0);
    let epoch = world.claim(&task, "late").await;
    // Its result is on the bus, and a second record of the task has come.
    assert_eq!(refusal(&world, &task).await, Reason::Done);
    assert_eq!(world.emit(&task, epoch, shard_ready(&job, 0, epoch)).await, Outcome::Applied);
    let snapshot = &mut world.context.database.read().await.unwrap();
    assert_eq!(tasks::count_redone(snapshot, &job).await.unwrap(), 0);
}

#[tokio::test]
async fn a_cancelled_jobs_attempts_hear_of_it() {
    let world = World::new().await;
    let job = world.job().await;
    let task = TaskId::shard(&job, 0);
    world.claim(&task, "a").await;
    intake::cancel(&world.context, &job).await.unwrap();
    assert_eq!(heartbeat(&world.context, &task, 1, "a").await.unwrap(), Beat::Cancelled);
    intake::delete(&world.context, &job).await.unwrap();
    assert_eq!(heartbeat(&world.context, &task, 1, "a").await.unwrap(), Beat::Cancelled);
}

#[tokio::test]
async fn after_a_restart_every_attempt_has_a_whole_lease() {
    let world = World::new().await;
    let job = world.job().await;
    world.claim(&TaskId::shard(&job, 0), "a").await;
    world.clock.advance_ms(60_000);
    assert_eq!(grant_grace(&world.context).await.unwrap(), 1);
    world.clock.advance_ms(14_000);
    assert_eq!(reap(&world.context).await.unwrap(), 0);
    world.clock.advance_ms(1_000);
    assert_eq!(reap(&world.context).await.unwrap(), 1);
}
