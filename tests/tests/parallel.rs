//! Several student workers train one model: it ends where one worker's does, and a worker that is killed in
//! between changes nothing but rounding.

#![allow(clippy::unwrap_used)] // helpers of tests unwrap as tests do

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use retort_proto::{self as proto, job_event::What};
use retort_tests::{
    prompts::{self, Shape},
    retort::{Up, programs},
    teacher,
};
use tch::{Kind, Tensor};

const PATIENCE: Duration = Duration::from_secs(300);

/// The spec beside `job.yaml` that has `workers` students train.
fn with_workers(spec: &Path, workers: u32) -> std::path::PathBuf {
    let text = fs::read_to_string(spec).unwrap();
    let changed =
        text.replace("checkpoint_steps: 5}", &format!("checkpoint_steps: 5, parallel: {{workers: {workers}}}}}"));
    assert_ne!(changed, text);
    let path = spec.with_file_name(format!("workers-{workers}.yaml"));
    fs::write(&path, changed).unwrap();
    path
}

/// Weights of the job's last checkpoint, in the order of their names.
fn weights(up: &Up, job: &str) -> Vec<(String, Tensor)> {
    let keys = up.objects(&format!("{job}/checkpoints"));
    let last = keys.iter().filter(|key| key.ends_with("model/model.safetensors")).max().expect("a checkpoint");
    let mut weights = Tensor::read_safetensors(up.home.join("store").join(last)).unwrap();
    weights.sort_by(|a, b| a.0.cmp(&b.0));
    weights
}

/// How far `b` lies from `a`, relative to it, in Euclidean norm.
fn difference(a: &[(String, Tensor)], b: &[(String, Tensor)]) -> f64 {
    let square = |tensor: &Tensor| tensor.to_kind(Kind::Double).square().sum(Kind::Double).double_value(&[]);
    let mut far = 0.0;
    for ((name, a), (other, b)) in a.iter().zip(b) {
        assert_eq!((name, a.size()), (other, b.size()));
        far += square(&(a - b));
    }
    (far / a.iter().map(|(_, tensor)| square(tensor)).sum::<f64>()).sqrt()
}

async fn succeeded(up: &mut Up, job: &str) {
    let end = up.jobs().await.get_job(proto::GetJobRequest { name: job.to_owned() }).await.unwrap().into_inner();
    assert_eq!(end.state, proto::JobState::Succeeded as i32, "{:?}\n{}", end.error, up.log());
}

/// The worker whose log says `text` last.
fn worker_that_says(up: &Up, text: &str) -> Option<String> {
    ["student-1", "student-2"].into_iter().map(str::to_owned).find(|name| {
        let log = fs::read_to_string(up.home.join("logs").join(format!("{name}.log"))).unwrap_or_default();
        log.contains(text)
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn two_students_train_what_one_does_and_a_killed_one_is_done_without() {
    let folder = tempfile::tempdir().unwrap();
    teacher::tiny(&folder.path().join("teacher"), 4);
    let shape = Shape { train: 40, held_out: 4, tokens: 24, passes: 6, ..Shape::default() };
    let one = prompts::spec(folder.path(), &folder.path().join("teacher"), &shape);
    // Where the CPU multiplies bf16 that is the default, and rounds far more coarsely than what is compared here.
    let mut up = Up::start(folder.path(), &["--students", "2", "--dtype", "f32"]);

    let alone = up.create(&one);
    up.follow(&alone, PATIENCE, |_, _| false).await;
    succeeded(&mut up, &alone).await;
    let expected = weights(&up, &alone);

    // The shards are there: what is left to do is training.
    let two = up.create(&with_workers(&one, 2));
    up.follow(&two, PATIENCE, |_, _| false).await;
    succeeded(&mut up, &two).await;
    assert!(worker_that_says(&up, "workers=2").is_some(), "both students took part\n{}", up.log());
    let replica = up.wait("the replica's end", PATIENCE, |up| said(up, job_id(&two), "done: the training has ended"));
    for wrong in ["the job was cancelled", "group-broken"] {
        assert!(said(&up, job_id(&two), wrong).is_none(), "{replica} says {wrong:?}\n{}", up.log());
    }
    let end = up.jobs().await.get_job(proto::GetJobRequest { name: two.clone() }).await.unwrap().into_inner();
    let report = end.report.unwrap();
    assert_eq!((report.workers, report.trained_parameters), (2, end.plan.unwrap().student_parameters));
    assert!(report.trained_target_tokens > 0 && report.trained_target_tokens < report.processed_tokens);
    let together = difference(&expected, &weights(&up, &two));
    assert!(together < 1e-4, "{together}");
    assert_eq!(up.objects(&format!("{two}/train")), Vec::<String>::new(), "the lead took back where it was");

    let three = up.create(&with_workers(&one, 3));
    let job = job_id(&three).to_owned();
    let mut killed = false;
    up.follow(&three, PATIENCE, |up, event| {
        if !killed && matches!(event.what, Some(What::CheckpointSaved(_))) {
            killed = true;
            let replica = up.wait("a replica", PATIENCE, |up| replica_of(up, &job));
            up.kill(&replica);
        }
        false
    })
    .await;
    succeeded(&mut up, &three).await;
    assert!(killed);
    assert!(worker_that_says(&up, "a replica has gone").is_some(), "the lead noticed\n{}", up.log());
    let without = difference(&expected, &weights(&up, &three));
    assert!(without < 1e-4, "{without}");
}

/// Through the store: every batch counts once, also when a replica is killed in a round.
#[tokio::test(flavor = "multi_thread")]
async fn two_students_exchange_weights_and_a_killed_one_costs_no_batch() {
    let folder = tempfile::tempdir().unwrap();
    teacher::tiny(&folder.path().join("teacher"), 4);
    let shape = Shape { train: 40, held_out: 4, tokens: 24, passes: 16, ..Shape::default() };
    let one = prompts::spec(folder.path(), &folder.path().join("teacher"), &shape);
    let text = fs::read_to_string(&one).unwrap();
    let parallel = "checkpoint_steps: 5, parallel: {workers: 2, mode: diloco, inner_steps: 3}}";
    let spec = one.with_file_name("diloco.yaml");
    fs::write(&spec, text.replace("checkpoint_steps: 5}", parallel)).unwrap();
    let mut up = Up::start(folder.path(), &["--students", "2"]);

    let job = up.create(&spec);
    let id = job_id(&job).to_owned();
    let mut killed = false;
    up.follow(&job, PATIENCE, |up, _| {
        if !killed && let Some(replica) = said(up, &id, "a round's part is done") {
            killed = true;
            up.kill(&replica);
        }
        false
    })
    .await;
    succeeded(&mut up, &job).await;
    assert!(killed, "a replica took part\n{}", up.log());
    let end = up.jobs().await.get_job(proto::GetJobRequest { name: job.clone() }).await.unwrap().into_inner();
    let (plan, report) = (end.plan.unwrap(), end.report.unwrap());
    assert_eq!(end.progress.unwrap().step, plan.optimizer_steps);
    assert_eq!(up.objects(&format!("{job}/exchange")), Vec::<String>::new(), "what was exchanged is gone");

    // One worker sees as many tokens: each batch counted once.
    let alone = up.create(&one);
    up.follow(&alone, PATIENCE, |_, _| false).await;
    succeeded(&mut up, &alone).await;
    let end = up.jobs().await.get_job(proto::GetJobRequest { name: alone }).await.unwrap().into_inner();
    assert_eq!(end.report.unwrap().processed_tokens, report.processed_tokens);
}

fn job_id(name: &str) -> &str {
    name.trim_start_matches("jobs/")
}

/// A replica is help: a training of another job goes before it, and when that is done it comes back.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_makes_room_for_another_jobs_training() {
    let folder = tempfile::tempdir().unwrap();
    teacher::tiny(&folder.path().join("teacher"), 4);
    // Far longer than all else here: it is cancelled.
    let shape = Shape { train: 40, held_out: 4, tokens: 24, passes: 3000, ..Shape::default() };
    let spec = prompts::spec(folder.path(), &folder.path().join("teacher"), &shape);
    let other = spec.with_file_name("other.yaml");
    let text = fs::read_to_string(&spec).unwrap();
    fs::write(&other, text.replace("passes: 3000", "passes: 1").replace("name: tiny", "name: other")).unwrap();
    let mut up = Up::start(folder.path(), &["--students", "2"]);

    let long = up.create(&with_workers(&spec, 2));
    let id = long.trim_start_matches("jobs/").to_owned();
    let replica = up.wait("a replica", PATIENCE, |up| replica_of(up, &id));
    let short = up.create(&other);
    up.follow(&short, PATIENCE, |_, _| false).await;
    succeeded(&mut up, &short).await;
    let state = async |up: &Up| {
        let request = proto::GetJobRequest { name: long.clone() };
        up.jobs().await.get_job(request).await.unwrap().into_inner().state
    };
    assert_eq!(state(&up).await, proto::JobState::Running as i32, "{}", up.log());
    assert_eq!(said(&up, &id, "a replica makes room: another job's task waits"), Some(replica.clone()));
    let of_short = short.trim_start_matches("jobs/");
    assert_eq!(said(&up, of_short, "trained to the end"), Some(replica.clone()), "{}", up.log());
    // Both students are free for it again.
    up.wait("the replica again", PATIENCE, |up| {
        let log = fs::read_to_string(up.home.join("logs").join(format!("{replica}.log"))).unwrap();
        let room = log.find("a replica makes room")?;
        log[room..].lines().any(|line| line.contains(&id) && line.contains("follows a lead")).then_some(())
    });
    assert_eq!(state(&up).await, proto::JobState::Running as i32, "{}", up.log());
    up.jobs().await.cancel_job(proto::CancelJobRequest { name: long.clone() }).await.unwrap();
}

/// Of a pool whose students were not started alike.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_of_another_dtype_is_refused_and_the_job_succeeds() {
    let folder = tempfile::tempdir().unwrap();
    teacher::tiny(&folder.path().join("teacher"), 4);
    let shape = Shape { train: 40, held_out: 4, tokens: 24, passes: 60, ..Shape::default() };
    let spec = prompts::spec(folder.path(), &folder.path().join("teacher"), &shape);
    let mut up = Up::start(folder.path(), &["--dtype", "f32"]);
    let job = up.create(&with_workers(&spec, 2));
    up.wait_for_log(&["student-1"], "leads a training", PATIENCE);

    let (running, log) = (up.running(), folder.path().join("odd.log"));
    let odd = Command::new(programs().join("retort-student"))
        .args(["--orchestrator", &running.address, "--brokers", &running.brokers, "--store", &running.store])
        .args(["--threads", "1", "--dtype", "bf16", "--die-with-parent"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let _odd = Ended(odd);
    let refused = up.wait("the refusal", PATIENCE, |_| {
        let log = fs::read_to_string(&log).unwrap();
        log.lines().find(|line| line.contains("failed: ")).map(str::to_owned)
    });
    let why = r#"dtype: replica 1 has "bf16" and the lead "f32"; start every student of the pool alike"#;
    assert!(refused.contains("code=replica-mismatch") && refused.contains(why), "{refused}");
    up.follow(&job, PATIENCE, |_, _| false).await;
    succeeded(&mut up, &job).await;
}

/// Dropped, it is killed.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The worker that follows the lead of this job.
fn replica_of(up: &Up, job: &str) -> Option<String> {
    said(up, job, "follows a lead")
}

/// The worker that has said this of the job.
fn said(up: &Up, job: &str, text: &str) -> Option<String> {
    ["student-1", "student-2"].into_iter().map(str::to_owned).find(|name| {
        let log = fs::read_to_string(up.home.join("logs").join(format!("{name}.log"))).unwrap_or_default();
        log.lines().any(|line| line.contains(job) && line.contains(text))
    })
}
