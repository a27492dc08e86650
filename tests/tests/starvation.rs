//! One student, and a job that cannot train: the others get it.

#![allow(clippy::unwrap_used)] // helpers of tests unwrap as tests do

use std::{fs, time::Duration};

use retort_proto::{self as proto, job_event::What};
use retort_tests::{
    prompts::{self, Shape},
    retort::Up,
    teacher,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_job_without_a_teacher_does_not_hold_the_only_student() {
    let folder = tempfile::tempdir().unwrap();
    teacher::tiny(&folder.path().join("teacher"), 4);
    let shape = Shape { train: 8, held_out: 4, tokens: 8, passes: 1, ..Shape::default() };
    let spec = prompts::spec(folder.path(), &folder.path().join("teacher"), &shape);
    let text = fs::read_to_string(&spec).unwrap();
    let lonely = folder.path().join("lonely.yaml");
    fs::write(&lonely, text.replace("teacher:\n", "teacher:\n  pool: nobody\n")).unwrap();

    let mut up = Up::start(folder.path(), &[]);
    let patience = Duration::from_secs(120);
    let waiting = up.create(&lonely);
    up.follow(&waiting, patience, |_, event| matches!(event.what, Some(What::StateChanged(_)))).await;
    let job = up.create(&spec);
    up.follow(&job, patience, |_, _| false).await;
    let end = up.jobs().await.get_job(proto::GetJobRequest { name: job.clone() }).await.unwrap().into_inner();
    assert_eq!(end.state, proto::JobState::Succeeded as i32, "{:?}\n{}", end.error, up.log());
    // And it is said why the other one stands still.
    let events = up.follow(&waiting, patience, |_, event| matches!(event.what, Some(What::TaskUnclaimed(_)))).await;
    match events.last().and_then(|event| event.what.clone()) {
        Some(What::TaskUnclaimed(unclaimed)) => {
            assert_eq!((unclaimed.role.as_str(), unclaimed.pool.as_str()), ("teacher", "nobody"));
        }
        other => panic!("{other:?}"),
    }
}
