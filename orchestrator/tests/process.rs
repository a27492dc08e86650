//! The program as a supervisor sees it: its ready line, its refusals, its end.

#![allow(clippy::unwrap_used)] // helpers of tests unwrap as tests do

use std::{
    io::{BufRead as _, BufReader, Read as _},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// Started and ready; killed when dropped.
struct Running {
    child: Child,
    /// `host:port` of its ready line.
    listen: String,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn command(folder: &Path, listen: &str, database: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_retort-orchestrator"));
    command
        .arg("--listen")
        .arg(listen)
        .arg("--database")
        .arg(folder.join(database))
        .arg("--store")
        .arg(folder.join("store"))
        // Nobody listens there: the API must serve all the same.
        .args(["--brokers", "127.0.0.1:9", "--log", "warn"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn start(folder: &Path) -> Running {
    let mut child = command(folder, "127.0.0.1:0", "retort.sqlite").spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let ready: retort_process::Ready = serde_json::from_str(&line).unwrap();
    assert_eq!(ready.ready, "orchestrator");
    Running { child, listen: ready.listen.unwrap() }
}

/// Runs until it refuses to; its exit code and what it said.
fn refused(mut command: Command) -> (Option<i32>, String) {
    let mut child = command.spawn().unwrap();
    let status = child.wait().unwrap();
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    (status.code(), said)
}

#[test]
fn it_stops_within_three_seconds_without_a_broker_and_starts_again() {
    let folder = tempfile::tempdir().unwrap();
    for signal in ["-TERM", "-INT"] {
        let mut running = start(folder.path());
        let started = Instant::now();
        let killed = Command::new("kill").args([signal, &running.child.id().to_string()]).status().unwrap();
        assert!(killed.success());
        assert_eq!(running.child.wait().unwrap().code(), Some(0));
        assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    }
    // Killed hard, it leaves nothing that keeps the next one out.
    drop(start(folder.path()));
    start(folder.path());
}

#[test]
fn what_it_cannot_have_is_refused_with_its_code() {
    let folder = tempfile::tempdir().unwrap();
    let running = start(folder.path());

    let (code, said) = refused(command(folder.path(), "127.0.0.1:0", "retort.sqlite"));
    assert_eq!(code, Some(1));
    assert!(said.contains("error[already-running]") && said.contains("retort.sqlite"), "{said}");

    let (code, said) = refused(command(folder.path(), &running.listen, "other.sqlite"));
    assert_eq!(code, Some(1));
    assert!(said.contains("error[port-in-use]") && said.contains(&running.listen), "{said}");

    let (code, said) = refused(command(folder.path(), "127.0.0.1:0", ""));
    assert_eq!(code, Some(2));
    assert!(said.contains("error[request-invalid]") && said.contains("is a folder"), "{said}");

    let mut short = command(folder.path(), "127.0.0.1:0", "third.sqlite");
    short.args(["--lease-seconds", "0.01"]);
    let (code, said) = refused(short);
    assert_eq!(code, Some(2));
    assert!(said.contains("--lease-seconds is 0.01"), "{said}");
}
