//! Ctrl-C: once, everything stops and nothing stays behind; twice, it is over at once.

#![allow(clippy::unwrap_used)] // helpers of tests unwrap as tests do

use std::time::{Duration, Instant};

use retort_tests::retort::Up;
use rustix::process::{Pid, Signal, test_kill_process};

fn gone(pids: &[i32], within: Duration) {
    let deadline = Instant::now() + within;
    for pid in pids {
        let pid = Pid::from_raw(*pid).unwrap();
        while test_kill_process(pid).is_ok() {
            assert!(Instant::now() < deadline, "process {pid:?} is still there");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[test]
fn one_ctrl_c_stops_everything_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let mut up = Up::start(folder.path(), &[]);
    let pids: Vec<i32> = up.processes().into_values().collect();
    assert_eq!(pids.len(), 4, "broker, orchestrator, teacher, student");
    up.signal(Signal::INT);
    let status = up.ended(Duration::from_secs(20));
    assert!(status.success() || status.code() == Some(130), "{status}");
    gone(&pids, Duration::from_secs(1));
    assert!(!folder.path().join("run.json").exists());
}

#[test]
fn a_second_ctrl_c_ends_it_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let mut up = Up::start(folder.path(), &[]);
    let pids: Vec<i32> = up.processes().into_values().collect();
    // A stopped process cannot obey the first signal.
    for pid in &pids {
        rustix::process::kill_process(Pid::from_raw(*pid).unwrap(), Signal::STOP).unwrap();
    }
    up.signal(Signal::INT);
    std::thread::sleep(Duration::from_millis(300));
    up.signal(Signal::INT);
    let asked = Instant::now();
    let status = up.ended(Duration::from_secs(2));
    assert_eq!(status.code(), Some(130), "after {:?}", asked.elapsed());
    gone(&pids, Duration::from_secs(2));
}

#[test]
fn a_killed_retort_leaves_no_orphans() {
    let folder = tempfile::tempdir().unwrap();
    let mut up = Up::start(folder.path(), &[]);
    let pids: Vec<i32> = up.processes().into_values().collect();
    up.signal(Signal::KILL);
    up.ended(Duration::from_secs(5));
    gone(&pids, Duration::from_secs(15));
}
