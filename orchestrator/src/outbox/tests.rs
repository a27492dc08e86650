use std::sync::atomic::Ordering;

use retort_core::{id::TaskId, state::TaskState};

use super::*;
use crate::{intake, testing::*};

async fn settle(world: &World) {
    fill(&world.context).await.unwrap();
    while send(&world.context, world.bus.as_ref()).await.unwrap() > 0 {}
}

#[tokio::test]
async fn a_window_of_tasks_goes_out_in_order_of_priority() {
    let world = World::new().await;
    let job = world.job().await;
    settle(&world).await;
    // The held-out shards 3 and 4 first; training has a topic and a window of its own.
    let mut sent = world.bus.tasks();
    let train = sent.iter().position(|task| task == "train").map(|at| sent.remove(at));
    assert_eq!(sent, ["shard-00003", "shard-00004", "shard-00000", "shard-00001"]);
    assert_eq!(train.as_deref(), Some("train"));
    let topics: Vec<_> = world.bus.sent.lock().unwrap().iter().map(|(topic, _)| topic.clone()).collect();
    assert_eq!(topics.iter().filter(|topic| *topic == "retort.tasks.teacher.default").count(), 4);
    assert_eq!(topics.iter().filter(|topic| *topic == "retort.tasks.student.default").count(), 1);

    // A claim frees nothing, a result does.
    let task = TaskId::shard(&job, 3);
    let epoch = world.claim(&task, "a").await;
    settle(&world).await;
    assert_eq!(world.bus.tasks().len(), 5);
    world.emit(&task, epoch, shard_ready(&job, 3, epoch)).await;
    settle(&world).await;
    assert_eq!(world.bus.tasks().last().unwrap(), "shard-00002");
}

#[tokio::test]
async fn a_crash_between_sending_and_striking_sends_twice_and_no_more() {
    let world = World::new().await;
    let job = world.job().await;
    fill(&world.context).await.unwrap();
    world.bus.lose_acknowledgements.store(true, Ordering::SeqCst);
    assert!(send(&world.context, world.bus.as_ref()).await.is_err());
    let first = world.bus.tasks();
    assert_eq!(first.len(), 1);
    world.bus.lose_acknowledgements.store(false, Ordering::SeqCst);
    settle(&world).await;
    let sent = world.bus.tasks();
    assert_eq!(sent.iter().filter(|task| **task == first[0]).count(), 2);
    assert_eq!(sent.len(), 6);

    // The second record finds its task taken.
    let task: TaskId = format!("{job}/{}", first[0]).parse().unwrap();
    world.claim(&task, "a").await;
    let again = crate::leases::claim(&world.context, &task, "b").await.unwrap();
    assert!(matches!(again, crate::leases::Claim::RetryAfter(_)));
}

#[tokio::test]
async fn a_record_that_a_broker_lost_is_sent_again() {
    let world = World::new().await;
    let job = world.job().await;
    settle(&world).await;
    let train = TaskId::train(&job);
    world.claim(&train, "student").await;
    let sent = world.bus.tasks().len();

    world.clock.advance_ms(29_999);
    settle(&world).await;
    assert_eq!(world.bus.tasks().len(), sent);
    // Four shards are queued; the training that runs is not sent again.
    world.clock.advance_ms(1);
    settle(&world).await;
    assert_eq!(world.bus.tasks().len(), sent + 4);
    assert!(!world.bus.tasks()[sent..].contains(&"train".to_owned()));
    // The next wait is twice as long.
    world.clock.advance_ms(30_000);
    settle(&world).await;
    assert_eq!(world.bus.tasks().len(), sent + 4);
    world.clock.advance_ms(30_000);
    settle(&world).await;
    assert_eq!(world.bus.tasks().len(), sent + 8);
}

#[tokio::test]
async fn records_that_wait_behind_a_busy_worker_are_not_hurried() {
    let world = World::new().await;
    let job = world.job().await;
    settle(&world).await;
    let sent = world.bus.tasks().len();
    let busy = TaskId::shard(&job, 3);
    let epoch = world.claim(&busy, "teacher").await;
    for _ in 0..47 {
        world.clock.advance_ms(10_000);
        crate::leases::heartbeat(&world.context, &busy, epoch, "teacher").await.unwrap();
        settle(&world).await;
    }
    // The train task's topic is idle: its record was sent again after 30, 60, 120 and 240 s.
    let again = world.bus.tasks().split_off(sent);
    assert_eq!(again, ["train"; 4]);
    // Once nothing is heard of the busy one, the records behind it may be lost.
    world.clock.advance_ms(30_000);
    settle(&world).await;
    assert_eq!(world.bus.tasks().split_off(sent + 4).len(), 3);
}

#[tokio::test]
async fn a_cancelled_jobs_records_are_struck_off() {
    let world = World::new().await;
    let job = world.job().await;
    fill(&world.context).await.unwrap();
    intake::cancel(&world.context, &job).await.unwrap();
    assert_eq!(send(&world.context, world.bus.as_ref()).await.unwrap(), 0);
    assert_eq!(fill(&world.context).await.unwrap(), 0);
    assert_eq!(world.task_state(&TaskId::train(&job)).await, TaskState::Cancelled);
}

#[tokio::test]
async fn a_task_that_backs_off_waits() {
    let world = World::new().await;
    let job = world.job().await;
    settle(&world).await;
    let task = TaskId::train(&job);
    let epoch = world.claim(&task, "a").await;
    world.emit(&task, epoch, task_failed(retort_core::Code::DiskFull, true)).await;
    let sent = world.bus.tasks().len();
    world.clock.advance_ms(999);
    settle(&world).await;
    assert_eq!(world.bus.tasks().len(), sent);
    world.clock.advance_ms(1);
    settle(&world).await;
    assert_eq!(world.bus.tasks().last().unwrap(), "train");
}

#[tokio::test]
async fn a_job_of_the_most_shards_is_stored_and_published_promptly() {
    let world = World::new().await;
    let mut spec = spec(std::path::Path::new("/nowhere"));
    spec.prompts.shard_rows = 1;
    let started = std::time::Instant::now();
    let job = world.job_of(spec, crate::planner::RowCounts::generated(99_000, 1_000, 8, 0)).await;
    settle(&world).await;
    // A guard against a scan or a statement a row, not a benchmark.
    assert!(started.elapsed() < std::time::Duration::from_secs(20), "{:?}", started.elapsed());
    assert_eq!(world.bus.tasks().len(), 5);
    let claimed = std::time::Instant::now();
    world.publish(&job, 99_000).await;
    assert!(claimed.elapsed() < std::time::Duration::from_secs(2), "{:?}", claimed.elapsed());
}

#[tokio::test]
async fn a_job_whose_pool_has_no_workers_says_so_once() {
    let world = World::new().await;
    let job = world.job().await;
    settle(&world).await;
    for _ in 0..10 {
        world.clock.advance_ms(60_000);
        settle(&world).await;
    }
    let told: Vec<_> = world
        .journal(&job)
        .await
        .into_iter()
        .filter_map(|event| match event.what {
            Some(job_event::What::TaskUnclaimed(unclaimed)) => Some((unclaimed.role, unclaimed.pool)),
            _ => None,
        })
        .collect();
    let default = || "default".to_owned();
    assert_eq!(told, [("teacher".to_owned(), default()), ("student".to_owned(), default())]);
}
