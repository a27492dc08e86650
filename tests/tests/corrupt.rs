//! Bytes that rot in the store after they were published are refused by their checksum and computed again.

#![allow(clippy::unwrap_used)] // helpers of tests unwrap as tests do

use std::{fs, time::Duration};

use retort_proto::{self as proto, job_event::What};
use retort_tests::{
    prompts::{self, Shape},
    retort::Up,
    teacher,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_corrupt_shard_is_computed_again() {
    let folder = tempfile::tempdir().unwrap();
    teacher::tiny(&folder.path().join("teacher"), 4);
    let shape = Shape { train: 16, held_out: 4, tokens: 24, passes: 1, ..Shape::default() };
    let spec = prompts::spec(folder.path(), &folder.path().join("teacher"), &shape);

    let mut up = Up::start(folder.path(), &["--students", "0"]);
    let job = up.create(&spec);
    let patience = Duration::from_secs(120);
    up.follow(&job, patience, |_, event| event.progress.as_ref().is_some_and(|p| p.shards_published == p.shards_total))
        .await;
    let rotten = up.objects(&format!("{job}/shards/00002"));
    assert_eq!(rotten.len(), 1);
    let path = folder.path().join("store").join(&rotten[0]);
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x40;
    fs::write(&path, bytes).unwrap();
    drop(up);

    let mut up = Up::start(folder.path(), &[]);
    let events = up.follow(&job, patience, |_, _| false).await;
    let end = up.jobs().await.get_job(proto::GetJobRequest { name: job.clone() }).await.unwrap().into_inner();
    assert_eq!(end.state, proto::JobState::Succeeded as i32, "{:?}\n{}", end.error, up.log());
    let redone = end.report.unwrap().redone;
    assert!(redone.iter().any(|one| one.task.ends_with("shard-00002") && one.reason.contains("corrupt")), "{redone:?}");
    let again =
        events.iter().filter(|event| matches!(&event.what, Some(What::ShardPublished(s)) if s.shard == 2)).count();
    assert_eq!(again, 2, "published, withdrawn, published again");
}
