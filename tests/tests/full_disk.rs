//! A disk that fills up in mid-job: said so, nothing lost, and the job goes on when there is room again.

#![allow(clippy::unwrap_used)] // helpers of tests unwrap as tests do

use std::{
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use retort_proto::{self as proto, job_event::What};
use retort_tests::{
    prompts::{self, Shape},
    retort::Up,
    teacher,
};

/// Where the small file system lies, in the process that runs inside it.
const DISK: &str = "RETORT_TEST_DISK";

#[test]
fn a_job_outlives_a_full_store() {
    on_a_small_disk("full_store_body");
}

#[test]
fn a_job_outlives_a_full_home() {
    on_a_small_disk("full_home_body");
}

/// Runs one of the bodies below on a real file system of 256 MiB. Mounting one takes a namespace of its
/// own.
fn on_a_small_disk(body: &str) {
    let folder = tempfile::tempdir().unwrap();
    let script = r#"mount -t tmpfs -o size=256m tmpfs "$1" && exec "$2" --exact "$3" --ignored --nocapture"#;
    for namespace in [&["unshare", "--mount"][..], &["unshare", "--user", "--map-root-user", "--mount"][..]] {
        let in_namespace = || {
            let mut command = Command::new(namespace[0]);
            command.args(&namespace[1..]);
            command
        };
        let probe = in_namespace().args(["mount", "-t", "tmpfs", "tmpfs"]).arg(folder.path()).output();
        if !probe.is_ok_and(|output| output.status.success()) {
            continue;
        }
        let mut command = in_namespace();
        command.args(["sh", "-c", script, "sh"]).arg(folder.path()).arg(std::env::current_exe().unwrap()).arg(body);
        let output = command.env(DISK, folder.path()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && text.contains("1 passed"), "{text}\n{errors}");
        return;
    }
    eprintln!("SKIPPED: this machine lets nobody mount a file system");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a_job_outlives_a_full_store runs it inside a small file system"]
async fn full_store_body() {
    let disk = PathBuf::from(std::env::var_os(DISK).unwrap());
    let folder = tempfile::tempdir().unwrap();
    teacher::tiny(&folder.path().join("teacher"), 4);
    let shape = Shape { train: 16, held_out: 4, tokens: 24, passes: 1, ..Shape::default() };
    let spec = prompts::spec(folder.path(), &folder.path().join("teacher"), &shape);
    let store = disk.join("store");
    let mut up = Up::start(folder.path(), &["--store", store.to_str().unwrap()]);

    fill(&disk.join("filler"), u64::MAX);
    let output = up.command(&["job", "create", spec.to_str().unwrap()]);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("error[disk-full]") && error.contains("prompts/"), "{error}");

    // Room for the prompts, for no shard.
    fs::remove_file(disk.join("filler")).unwrap();
    let job = {
        let mut taken = fill(&disk.join("filler"), u64::MAX);
        taken -= 16 << 10;
        fill(&disk.join("filler"), taken);
        up.create(&spec)
    };
    let patience = Duration::from_secs(180);
    let full = |event: &proto::JobEvent| match &event.what {
        Some(What::AttemptLost(lost)) => {
            lost.redone.as_ref().is_some_and(|redone| redone.reason.starts_with("disk-full: "))
        }
        _ => false,
    };
    up.follow(&job, patience, |_, event| full(event)).await;
    fs::remove_file(disk.join("filler")).unwrap();

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
    assert_eq!(published, [0, 1, 2, 3, 4], "each shard once");
    let redone = end.report.unwrap().redone;
    assert!(redone.iter().any(|one| one.reason.starts_with("disk-full: ")), "{redone:?}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a_job_outlives_a_full_home runs it inside a small file system"]
async fn full_home_body() {
    let disk = PathBuf::from(std::env::var_os(DISK).unwrap());
    let folder = tempfile::tempdir().unwrap();
    teacher::tiny(&folder.path().join("teacher"), 4);
    let shape = Shape { train: 32, held_out: 4, tokens: 24, passes: 1, ..Shape::default() };
    let spec = prompts::spec(folder.path(), &folder.path().join("teacher"), &shape);
    let mut up = Up::start(&disk, &[]);
    let job = up.create(&spec);
    let patience = Duration::from_secs(180);
    up.follow(&job, patience, |_, event| matches!(event.what, Some(What::ShardPublished(_)))).await;
    fill(&disk.join("filler"), u64::MAX);
    up.wait_for("disk-full: no space is left in", patience);
    std::thread::sleep(Duration::from_secs(8));
    fs::remove_file(disk.join("filler")).unwrap();

    up.follow(&job, patience, |_, _| false).await;
    let end = up.jobs().await.get_job(proto::GetJobRequest { name: job.clone() }).await.unwrap().into_inner();
    assert_eq!(end.state, proto::JobState::Succeeded as i32, "{:?}\n{}", end.error, up.log());
    for death in ["exit code 101", "killed by signal 6"] {
        assert!(!up.log().contains(death), "a panic: {}", up.log());
    }
}

/// Writes zeros until `most` bytes are written or the disk is full; how many.
fn fill(path: &Path, most: u64) -> u64 {
    let mut file = File::create(path).unwrap();
    let (block, mut written) = ([0u8; 4096], 0);
    while written < most && file.write_all(&block).is_ok() {
        written += block.len() as u64;
    }
    written
}
