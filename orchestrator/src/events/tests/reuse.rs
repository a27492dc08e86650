//! Shards that another job has computed.

use super::*;

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
