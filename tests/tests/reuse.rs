//! A second job that asks for the same soft targets gets those that the first one had computed, and they
//! stay until no job holds them.

#![allow(clippy::unwrap_used)] // helpers of tests unwrap as tests do

use std::{fs, time::Duration};

use retort_proto::{self as proto, job_event::What};
use retort_tests::{
    prompts::{self, Shape},
    retort::Up,
    teacher,
};

const PATIENCE: Duration = Duration::from_secs(120);

async fn finished(up: &mut Up, job: &str) -> (proto::Job, Vec<proto::JobEvent>) {
    let events = up.follow(job, PATIENCE, |_, _| false).await;
    let end = up.jobs().await.get_job(proto::GetJobRequest { name: job.to_owned() }).await.unwrap().into_inner();
    assert_eq!(end.state, proto::JobState::Succeeded as i32, "{:?}\n{}", end.error, up.log());
    (end, events)
}

async fn delete(up: &Up, job: &str) {
    up.jobs().await.delete_job(proto::DeleteJobRequest { name: job.to_owned() }).await.unwrap();
}

/// Waits until the store has exactly these objects below `jobs/`.
async fn left(up: &Up, expected: &[String]) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while up.objects("jobs") != expected {
        assert!(std::time::Instant::now() < deadline, "{:?} are left\n{}", up.objects("jobs"), up.log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_job_computes_no_shard_again() {
    let folder = tempfile::tempdir().unwrap();
    teacher::tiny(&folder.path().join("teacher"), 4);
    let shape = Shape { train: 16, held_out: 4, tokens: 24, passes: 1, ..Shape::default() };
    let spec = prompts::spec(folder.path(), &folder.path().join("teacher"), &shape);
    let other = folder.path().join("other.yaml");
    let text = fs::read_to_string(&spec).unwrap();
    let changed = text
        .replace("name: tiny", "name: other")
        .replace("{layers: 2}", "{layers: 3}")
        .replace("learning_rate: 0.001", "learning_rate: 0.002");
    assert_ne!(changed, text);
    fs::write(&other, changed).unwrap();

    let mut up = Up::start(folder.path(), &[]);
    let first = up.create(&spec);
    let (computed, _) = finished(&mut up, &first).await;
    assert_eq!(computed.report.as_ref().unwrap().reused, 0);
    let shards = up.objects(&format!("{first}/shards"));
    assert_eq!(shards.len(), 5);

    let second = up.create(&other);
    let (reused, events) = finished(&mut up, &second).await;
    let (plan, report) = (reused.plan.unwrap(), reused.report.unwrap());
    assert_eq!(report.reused, plan.train_shards + plan.held_out_shards);
    assert_eq!(report.teacher_tokens_per_second, 0.0);
    assert_eq!(report.target_tokens, computed.report.unwrap().target_tokens);
    assert!(report.redone.is_empty(), "{:?}", report.redone);
    let published = events.iter().filter(|event| matches!(&event.what, Some(What::ShardPublished(s)) if s.reused));
    assert_eq!(published.count(), 5);
    assert_eq!(up.objects(&format!("{second}/shards")), Vec::<String>::new());
    let text = up.command(&["job", "get", &second]);
    assert!(String::from_utf8_lossy(&text.stdout).contains("5 of 5 shards, computed for other jobs"), "{text:?}");

    // The second job's shards outlive the job that computed them, and nothing else of it does.
    delete(&up, &first).await;
    let kept: Vec<String> = shards.into_iter().chain(up.objects(&second)).collect();
    let mut kept = kept;
    kept.sort();
    left(&up, &kept).await;
    // They can be reused still.
    let third = up.create(&spec);
    let (reused, _) = finished(&mut up, &third).await;
    assert_eq!(reused.report.unwrap().reused, 5);

    delete(&up, &second).await;
    delete(&up, &third).await;
    left(&up, &[]).await;
}
