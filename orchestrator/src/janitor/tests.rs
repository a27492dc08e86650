use bytes::Bytes;
use retort_core::id::TaskId;

use super::*;
use crate::{intake, promotion, testing::*};

#[tokio::test]
async fn what_was_staged_and_never_published_goes_after_the_job() {
    let world = World::new().await;
    let job = world.job().await;
    let dead = world.claim(&TaskId::shard(&job, 0), "dies").await;
    let staged = paths::shard(job.as_str(), 0, dead);
    world.context.store.put_new(&staged, Bytes::from_static(b"never published")).await.unwrap();
    world.clock.advance_ms(15_000);
    world.complete(&job, 0.1).await;
    promotion::judge_ready(&world.context).await.unwrap();

    // Not yet: an attempt may still be running somewhere.
    assert_eq!(tidy(&world.context).await.unwrap(), 0);
    world.clock.advance_ms(30_001);
    assert_eq!(tidy(&world.context).await.unwrap(), 1);
    assert!(!world.context.store.exists(&staged).await.unwrap());
    let left = world.context.store.list(&paths::shards_prefix(job.as_str())).await.unwrap();
    assert_eq!(left.len(), 5);
    assert_eq!(tidy(&world.context).await.unwrap(), 0);
}

#[tokio::test]
async fn a_deleted_jobs_objects_go_and_its_model_stays() {
    let world = World::new().await;
    let (job, other) = (world.job().await, world.job().await);
    let prompts = paths::prompt_set("ab");
    world.context.store.put_new(&prompts, Bytes::from_static(b"{}")).await.unwrap();
    world.complete(&job, 0.1).await;
    promotion::judge_ready(&world.context).await.unwrap();
    intake::delete(&world.context, &job).await.unwrap();
    tidy(&world.context).await.unwrap();
    assert_eq!(world.context.store.list(&paths::job_prefix(job.as_str())).await.unwrap().len(), 0);
    assert!(world.context.store.exists("models/support/versions/000001.json").await.unwrap());
    // The other job has the same prompt set.
    assert!(world.context.store.exists(&prompts).await.unwrap());

    // An attempt that had not heard of the end writes once more.
    let late = paths::shard(job.as_str(), 0, 9);
    world.context.store.put_new(&late, Bytes::from_static(b"late")).await.unwrap();
    world.clock.advance_ms(60_000);
    tidy(&world.context).await.unwrap();
    assert!(!world.context.store.exists(&late).await.unwrap());

    intake::cancel(&world.context, &other).await.unwrap();
    intake::delete(&world.context, &other).await.unwrap();
    tidy(&world.context).await.unwrap();
    assert!(!world.context.store.exists(&prompts).await.unwrap());
}
