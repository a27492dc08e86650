use bytes::Bytes;
use retort_core::{id::TaskId, state::JobState};

use super::*;
use crate::{intake, promotion, testing::*};

#[tokio::test]
async fn what_was_staged_and_never_published_goes_after_the_job() {
    let world = World::new().await;
    let job = world.job().await;
    let dead = world.claim(&TaskId::shard(&job, 0), "dies").await;
    let staged = paths::shard(job.as_str(), 0, dead);
    // A replica that had not heard of the training's end delivered once more.
    let exchanged = format!("{}late", paths::exchange_delta(job.as_str(), 1, 3, (1, 1)));
    for key in [&staged, &exchanged] {
        world.context.store.put_new(key, Bytes::from_static(b"never published")).await.unwrap();
    }
    world.clock.advance_ms(15_000);
    world.complete(&job, 0.1).await;
    promotion::judge_ready(&world.context).await.unwrap();

    // Not yet: an attempt may still be running somewhere.
    assert_eq!(tidy(&world.context).await.unwrap(), 0);
    world.clock.advance_ms(30_001);
    assert_eq!(tidy(&world.context).await.unwrap(), 2);
    for key in [&staged, &exchanged] {
        assert!(!world.context.store.exists(key).await.unwrap());
    }
    let left = world.context.store.list(&paths::shards_prefix(job.as_str())).await.unwrap();
    assert_eq!(left.len(), 5);
    assert_eq!(tidy(&world.context).await.unwrap(), 0);
}

/// However a job ends, what its workers had left to each other goes; that of a job that trains stays.
#[tokio::test]
async fn what_workers_left_to_each_other_goes_with_the_end_of_the_job() {
    let world = World::new().await;
    let (succeeded, failed, cancelled, running) =
        (world.job().await, world.job().await, world.job().await, world.job().await);
    let of = |job: &JobId| {
        let (job, lead) = (job.as_str(), 3);
        [
            paths::lead(job, lead),
            paths::exchange_open(job, lead),
            paths::exchange_replica(job, lead, (1, 2), 5),
            paths::manifest(&paths::exchange_weights(job, lead, 5)),
            // A difference whose manifest was never written.
            format!("{}weights.safetensors", paths::exchange_delta(job, lead, 5, (1, 2))),
        ]
    };
    for key in [&succeeded, &failed, &cancelled, &running].into_iter().flat_map(of) {
        world.context.store.put_new(&key, Bytes::from_static(b"left")).await.unwrap();
    }
    world.complete(&succeeded, 0.1).await;
    promotion::judge_ready(&world.context).await.unwrap();
    let shard = TaskId::shard(&failed, 0);
    let epoch = world.claim(&shard, "teacher-1").await;
    world.emit(&shard, epoch, task_failed(Code::PromptTooLong, false)).await;
    intake::cancel(&world.context, &cancelled).await.unwrap();
    world.claim(&TaskId::train(&running), "student-1").await;
    for (job, state) in [
        (&succeeded, JobState::Succeeded),
        (&failed, JobState::Failed),
        (&cancelled, JobState::Cancelled),
        (&running, JobState::Running),
    ] {
        assert_eq!(world.read_job(job).await.state, state);
    }

    // An attempt that has not heard of the end may still be writing.
    assert_eq!(tidy(&world.context).await.unwrap(), 0);
    world.clock.advance_ms(30_001);
    assert_eq!(tidy(&world.context).await.unwrap(), 15);
    for (job, stays) in [(&succeeded, false), (&failed, false), (&cancelled, false), (&running, true)] {
        for key in of(job) {
            assert_eq!(world.context.store.exists(&key).await.unwrap(), stays, "{key}");
        }
    }
    // What the job is for is there still.
    assert!(!world.context.store.list(&paths::checkpoints_prefix(succeeded.as_str())).await.unwrap().is_empty());
    assert!(!world.context.store.list(&paths::shards_prefix(succeeded.as_str())).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_deleted_jobs_objects_go_and_its_model_stays() {
    let world = World::new().await;
    let (job, other) = (world.job().await, world.job().await);
    let prompts = paths::prompt_set("ab");
    world.context.store.put_new(&prompts, Bytes::from_static(b"{}")).await.unwrap();
    world.complete(&job, 0.1).await;
    promotion::judge_ready(&world.context).await.unwrap();
    let aside = paths::quarantined(job.as_str(), 0, 1);
    let aside_of_other = paths::quarantined(other.as_str(), 0, 1);
    for key in [&aside, &aside_of_other] {
        world.context.store.put_new(key, Bytes::from_static(b"unfaithful")).await.unwrap();
    }
    intake::delete(&world.context, &job).await.unwrap();
    tidy(&world.context).await.unwrap();
    assert!(!world.context.store.exists(&aside).await.unwrap());
    assert!(world.context.store.exists(&aside_of_other).await.unwrap());
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

/// Two jobs, the second with the first one's shards 0 and 1; the keys of both.
async fn sharing(world: &World) -> ([JobId; 2], [String; 2]) {
    let (first, second) = (world.job().await, world.job().await);
    let mut keys = Vec::new();
    for shard in [0, 1] {
        let work = shard.to_string().repeat(64);
        let epoch = world.publish_work(&first, shard, &work).await;
        let key = paths::shard(first.as_str(), shard, epoch);
        world.reuse(&second, shard, &work, &key).await;
        keys.push(key);
    }
    world.publish(&first, 2).await;
    ([first, second], keys.try_into().unwrap())
}

async fn end(world: &World, job: &JobId) {
    intake::cancel(&world.context, job).await.unwrap();
    intake::delete(&world.context, job).await.unwrap();
    tidy(&world.context).await.unwrap();
}

async fn left(world: &World) -> Vec<String> {
    let entries = world.context.store.list("jobs/").await.unwrap();
    let mut keys: Vec<_> = entries.into_iter().map(|entry| entry.key).collect();
    keys.sort();
    keys
}

#[tokio::test]
async fn a_shard_goes_with_the_last_job_that_holds_it() {
    let world = World::new().await;
    let ([first, second], keys) = sharing(&world).await;
    end(&world, &first).await;
    assert_eq!(left(&world).await, keys);
    // The second sweep, and the tidying of ended jobs, spare them too.
    world.clock.advance_ms(60_000);
    tidy(&world.context).await.unwrap();
    assert_eq!(left(&world).await, keys);
    end(&world, &second).await;
    assert_eq!(left(&world).await, Vec::<String>::new());
}

#[tokio::test]
async fn a_job_that_reused_goes_and_leaves_the_others_shards() {
    let world = World::new().await;
    let ([first, second], _) = sharing(&world).await;
    let before = left(&world).await;
    end(&world, &second).await;
    assert_eq!(left(&world).await, before);
    end(&world, &first).await;
    assert_eq!(left(&world).await, Vec::<String>::new());
}

#[tokio::test]
async fn a_shard_withdrawn_by_the_last_job_that_holds_it_goes() {
    let world = World::new().await;
    let ([first, second], [gone, kept]) = sharing(&world).await;
    end(&world, &first).await;
    let epoch =
        shards::find(&mut world.context.database.read().await.unwrap(), &second, 0).await.unwrap().unwrap().epoch;
    intake::withdraw(&world.context, &second, 0, epoch, "student-1", "wrong checksum").await.unwrap();
    tidy(&world.context).await.unwrap();
    assert_eq!(left(&world).await, [kept]);
    assert!(!world.context.store.exists(&gone).await.unwrap());
}

#[tokio::test]
async fn the_newest_and_the_best_checkpoint_outlive_the_job() {
    let world = World::new().await;
    let job = world.job().await;
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("weights"), b"w").unwrap();
    for (step, kl) in [(1, 3.0), (2, 1.0), (3, 2.0), (4, 1.5)] {
        let judged = checkpoint::HeldOut { step, kl, tokens: 9, ..Default::default() };
        let mut manifest = checkpoint::Manifest { step, ..Default::default() };
        manifest.extra.insert(checkpoint::HELD_OUT.to_owned(), serde_json::to_value(judged).unwrap());
        let prefix = paths::checkpoint(job.as_str(), step, 1);
        checkpoint::publish(&world.context.store, &prefix, folder.path(), manifest).await.unwrap();
    }
    intake::cancel(&world.context, &job).await.unwrap();
    world.clock.advance_ms(60_000);
    tidy(&world.context).await.unwrap();
    let left = world.context.store.list(&paths::checkpoints_prefix(job.as_str())).await.unwrap();
    let steps: std::collections::BTreeSet<u32> =
        left.iter().filter_map(|entry| Some(paths::parse_checkpoint(job.as_str(), &entry.key)?.0)).collect();
    assert_eq!(steps, [2, 4].into());
}
