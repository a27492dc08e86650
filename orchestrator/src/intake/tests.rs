use retort_core::{Code, id::JobId, state::TaskState};
use retort_proto::job_event;

use super::*;
use crate::testing::*;

#[tokio::test]
async fn a_corrupt_shard_is_withdrawn_and_computed_again() {
    let world = World::new().await;
    let job = world.job().await;
    let epoch = world.publish(&job, 0).await;
    let report = |epoch| withdraw(&world.context, &job, 0, epoch, "student-1", "sha256 is other than published");

    report(epoch).await.unwrap();
    // A second student finds the same: nothing more happens.
    report(epoch).await.unwrap();
    let read = world.read_job(&job).await;
    assert_eq!((read.shards_published, read.target_tokens, read.store_bytes), (0, 0, 0));
    assert_eq!(world.task_state(&TaskId::shard(&job, 0)).await, TaskState::Ready);
    let redone = tasks::list_redone(&mut world.context.database.read().await.unwrap(), &job).await.unwrap();
    assert_eq!(redone.len(), 1);
    assert_eq!(redone[0].reason, "corrupt: sha256 is other than published");
    assert_eq!(redone[0].worker, "teacher-1");
    assert!(matches!(world.journal(&job).await.pop().unwrap().what, Some(job_event::What::AttemptLost(_))));

    // The withdrawn attempt's own event, repeated under another id, does not bring it back.
    let task = TaskId::shard(&job, 0);
    assert_eq!(world.emit(&task, epoch, shard_ready(&job, 0, epoch)).await, crate::events::Outcome::Stale);
    assert_eq!(world.publish(&job, 0).await, epoch + 1);
    report(epoch).await.unwrap();
    assert_eq!(world.read_job(&job).await.shards_published, 1);
}

#[tokio::test]
async fn cancelling_is_idempotent_and_ends_everything() {
    let world = World::new().await;
    let job = world.job().await;
    world.claim(&TaskId::shard(&job, 0), "a").await;
    for _ in 0..2 {
        assert_eq!(cancel(&world.context, &job).await.unwrap().state, JobState::Cancelled);
    }
    for shard in 0..5 {
        assert_eq!(world.task_state(&TaskId::shard(&job, shard)).await, TaskState::Cancelled);
    }
    let changes = world.journal(&job).await;
    assert_eq!(changes.len(), 2, "running, cancelled");
    assert_eq!(cancel(&world.context, &JobId::generate()).await.unwrap_err().code, Code::JobNotFound);
}

#[tokio::test]
async fn only_an_ended_job_is_deleted() {
    let world = World::new().await;
    let job = world.job().await;
    assert_eq!(delete(&world.context, &job).await.unwrap_err().code, Code::JobNotFinal);
    cancel(&world.context, &job).await.unwrap();
    delete(&world.context, &job).await.unwrap();
    assert_eq!(delete(&world.context, &job).await.unwrap_err().code, Code::JobNotFound);
}

#[tokio::test]
async fn a_shard_found_corrupt_is_told_to_no_further_job() {
    let world = World::new().await;
    let (first, second) = (world.job().await, world.job().await);
    let work = "c".repeat(64);
    let epoch = world.publish_work(&first, 0, &work).await;
    let key = paths::shard(first.as_str(), 0, epoch);
    let reused = world.reuse(&second, 0, &work, &key).await;
    let find = async || {
        let found = shards::find_work(&mut world.context.database.read().await.unwrap(), &work).await.unwrap();
        found.map(|(shard, _)| shard.key)
    };
    assert_eq!(find().await, Some(key.clone()));

    withdraw(&world.context, &second, 0, reused, "student-1", "wrong checksum").await.unwrap();
    assert_eq!(world.task_state(&TaskId::shard(&second, 0)).await, TaskState::Ready);
    // The first job keeps what it has until its own student complains.
    assert_eq!(world.task_state(&TaskId::shard(&first, 0)).await, TaskState::Done);
    assert_eq!(world.read_job(&first).await.shards_published, 1);
    assert_eq!(find().await, None);
    let task = TaskId::shard(&second, 0);
    let again = world.claim(&task, "teacher-1").await;
    let outcome = world.emit(&task, again, shard_reused(&second, 0, &work, &key)).await;
    assert_eq!(outcome, crate::events::Outcome::Applied);
    assert_eq!(world.task_state(&task).await, TaskState::Ready, "it is done again");
    let again = world.claim(&task, "teacher-1").await;

    // The second job's own shard is the one to reuse from here on.
    let retort_proto::worker_event::What::ShardReady(ready) = shard_ready(&second, 0, again) else { unreachable!() };
    let ready = retort_proto::ShardReady { work_sha256: work.clone(), ..ready };
    world.emit(&task, again, retort_proto::worker_event::What::ShardReady(ready)).await;
    assert_eq!(find().await, Some(paths::shard(second.as_str(), 0, again)));

    withdraw(&world.context, &first, 0, epoch, "student-1", "wrong checksum").await.unwrap();
    assert_eq!(world.read_job(&second).await.shards_published, 1);
}
