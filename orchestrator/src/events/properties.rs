//! Whatever the order in which a job's events arrive, and however often, the end is the same.

use proptest::prelude::*;
use retort_core::{
    id::{JobId, TaskId},
    random::{Counter, Purpose},
};
use retort_proto::{WorkerEvent, worker_event::What};

use crate::{
    database::{jobs, shards, tasks},
    testing::*,
};

/// What a user would see of a job, and every task's standing.
async fn digest(world: &World, job: &JobId) -> String {
    let mut snapshot = world.context.database.read().await.unwrap();
    let mut read = jobs::get(&mut snapshot, job).await.unwrap();
    // How often it was reported may differ; what was reported must not.
    read.last_sequence = 0;
    let mut text = format!("{read:?}\n");
    let ids = (0..read.plan.shards()).map(|shard| TaskId::shard(job, shard));
    for id in ids.chain([TaskId::train(job), TaskId::evaluate(job)]) {
        let task = tasks::find(&mut snapshot, &id).await.unwrap().unwrap();
        text.push_str(&format!("{} {:?} {} {}\n", id.short(), task.state, task.epoch, task.attempts));
    }
    for shard in 0..read.plan.shards() {
        text.push_str(&format!("{:?}\n", shards::find(&mut snapshot, job, shard).await.unwrap()));
    }
    text.replace(job.as_str(), "JOB")
}

/// Attempts at every task but the evaluation: shard 1's first one is lost and fenced.
async fn history(world: &World) -> (JobId, Vec<WorkerEvent>) {
    let job = world.job().await;
    let mut events = Vec::new();
    let lost = TaskId::shard(&job, 1);
    let stale = world.claim(&lost, "dies").await;
    world.clock.advance_ms(15_000);
    events.push(world.event(&lost, stale, shard_ready(&job, 1, stale)));
    events.push(world.event(&lost, stale, task_failed(retort_core::Code::Internal, false)));
    for shard in 0..5 {
        let task = TaskId::shard(&job, shard);
        let epoch = world.claim(&task, "teacher").await;
        let progress = retort_proto::ShardProgress { target_tokens: 7, seconds: 1.0 };
        events.push(world.event(&task, epoch, What::ShardProgress(progress)));
        events.push(world.event(&task, epoch, shard_ready(&job, shard, epoch)));
    }
    let task = TaskId::train(&job);
    let epoch = world.claim(&task, "student").await;
    for step in 1..=6 {
        world.clock.advance_ms(100);
        events.push(world.event(&task, epoch, train_progress(step, 6.0 / f64::from(step))));
    }
    let finished = train_finished(&job, epoch);
    let written = retort_proto::CheckpointWritten { step: 6, key: finished.checkpoint_key.clone(), held_out: None };
    events.push(world.event(&task, epoch, What::CheckpointWritten(written)));
    events.push(world.event(&task, epoch, What::TrainFinished(finished)));
    (job, events)
}

async fn end_of(shuffle: Option<(u64, usize)>) -> String {
    let world = World::new().await;
    let (job, mut events) = history(&world).await;
    if let Some((seed, repeats)) = shuffle {
        let mut draws = Counter::new(seed, Purpose::Shuffle, 0, 0);
        for _ in 0..repeats {
            let again = events[draws.below(events.len() as u64) as usize].clone();
            events.push(again);
        }
        draws.shuffle(&mut events);
    }
    for event in events {
        world.apply(event).await;
    }
    digest(&world, &job).await
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn any_order_and_any_repetition_ends_the_same(seed: u64, repeats in 0usize..12) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (expected, found) = runtime.block_on(async { (end_of(None).await, end_of(Some((seed, repeats))).await) });
        prop_assert_eq!(expected, found);
    }
}
