//! A store that is away, as on a disk that is not mounted: said so, nothing made in its place, and the job goes on when
//! it is back.

#![allow(clippy::unwrap_used)] // helpers of tests unwrap as tests do

use std::{fs, time::Duration};

use retort_proto::{self as proto, job_event::What};
use retort_tests::{
    prompts::{self, Shape},
    retort::{Up, retort},
    teacher,
};
use rustix::process::Signal;

#[tokio::test(flavor = "multi_thread")]
async fn a_job_outlives_a_store_that_is_away() {
    let folder = tempfile::tempdir().unwrap();
    teacher::tiny(&folder.path().join("teacher"), 4);
    let shape = Shape { train: 32, held_out: 4, tokens: 24, passes: 1, ..Shape::default() };
    let spec = prompts::spec(folder.path(), &folder.path().join("teacher"), &shape);
    let (store, aside) = (folder.path().join("store"), folder.path().join("aside"));
    let mut up = Up::start(folder.path(), &[]);
    let job = up.create(&spec);
    let patience = Duration::from_secs(180);
    up.follow(&job, patience, |_, event| matches!(event.what, Some(What::ShardPublished(_)))).await;
    fs::rename(&store, &aside).unwrap();
    let mut lost = 0;
    up.follow(&job, patience, |_, event| {
        if let Some(What::AttemptLost(attempt)) = &event.what {
            let reason = &attempt.redone.as_ref().unwrap().reason;
            assert!(
                reason.starts_with("store-unavailable: ") && reason.contains("there is no such folder"),
                "{reason}"
            );
            lost += 1;
        }
        lost == 3
    })
    .await;
    assert!(!store.exists(), "another was made");
    fs::rename(&aside, &store).unwrap();

    let events = up.follow(&job, patience, |_, _| false).await;
    let end = up.jobs().await.get_job(proto::GetJobRequest { name: job.clone() }).await.unwrap().into_inner();
    assert_eq!(end.state, proto::JobState::Succeeded as i32, "{:?}\n{}", end.error, up.log());
    let mut published: Vec<u32> = events
        .iter()
        .filter_map(|event| match &event.what {
            Some(What::ShardPublished(shard)) => Some(shard.shard),
            _ => None,
        })
        .collect();
    published.sort_unstable();
    assert_eq!(published, (0..9).collect::<Vec<_>>(), "each shard once");

    // Nor does a start take an empty store for the jobs' own.
    up.signal(Signal::INT);
    up.ended(Duration::from_secs(20));
    fs::rename(&store, &aside).unwrap();
    let mut again = retort();
    again.args(["up", "--listen", "127.0.0.1:0", "--broker-listen", "127.0.0.1:0", "--home"]).arg(folder.path());
    let output = again.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    for part in ["error[store-unavailable]: ", "there is no such folder", "retort.sqlite has jobs", "another home"] {
        assert!(stderr.contains(part), "{part:?} in {stderr}");
    }
    assert!(!store.exists(), "another was made");
}
