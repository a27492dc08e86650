//! Replicas, which a job can do without.

use super::*;

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
        leases::Beat::TrainingEnded
    );
    let evaluate = TaskId::evaluate(&job);
    let epoch = world.claim(&evaluate, "lead").await;
    world.emit(&evaluate, epoch, evaluation(0.25)).await;
    let ready = crate::database::jobs::judgeable(&mut world.context.database.read().await.unwrap()).await.unwrap();
    assert_eq!(ready, [job]);

    // Of a job that was cancelled it hears that.
    let job = replicated(&world).await;
    let replica = TaskId::replica(&job, 1);
    let epoch = world.claim(&replica, "helper").await;
    intake::cancel(&world.context, &job).await.unwrap();
    assert_eq!(leases::heartbeat(&world.context, &replica, epoch, "helper").await.unwrap(), leases::Beat::Cancelled);
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
