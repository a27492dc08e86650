//! That every shard of a job is published exactly once.

use std::{collections::BTreeMap, time::Duration};

use retort_proto::{self as proto, job_event::What};

use crate::{prompts::Shape, retort::Up};

/// Asserts it of a finished job, and that the store holds what was published and nothing else.
pub fn published_once(up: &Up, job: &str, shape: &Shape, events: &[proto::JobEvent]) {
    let mut published: BTreeMap<u32, u64> = BTreeMap::new();
    for event in events {
        if let Some(What::ShardPublished(shard)) = &event.what {
            assert!(published.insert(shard.shard, shard.epoch).is_none(), "shard {} was published twice", shard.shard);
        }
    }
    let shards = shape.train.div_ceil(shape.shard_rows) + shape.held_out.div_ceil(shape.shard_rows);
    assert_eq!(published.len(), shards, "every shard is published");
    let expected: Vec<String> =
        published.iter().map(|(shard, epoch)| format!("{job}/shards/{shard:05}/{epoch}.parquet")).collect();
    // The janitor removes superseded objects right after the job's end.
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while up.objects(&format!("{job}/shards")) != expected && std::time::Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(200));
    }
    assert_eq!(up.objects(&format!("{job}/shards")), expected, "the store holds what was published and nothing else");
}
