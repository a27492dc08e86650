//! `retort up` over small programs that stand in for the real ones.

#![allow(clippy::unwrap_used)] // helpers of tests unwrap as tests do

#[path = "support/fakes.rs"]
mod fakes;

use std::time::{Duration, Instant};

use fakes::{Bench, STUBBORN, kill};
use rustix::process::Signal;

#[test]
fn starts_all_in_order_and_one_signal_stops_all() {
    let bench = Bench::new();
    let mut up = bench.up(&["--teachers", "2", "--log", "debug"]);
    up.until_printed("retort is up in");
    let run = bench.run_json().unwrap();
    let names: Vec<&String> = run["processes"].as_object().unwrap().keys().collect();
    assert_eq!(names, ["broker", "orchestrator", "student-1", "teacher-1", "teacher-2"]);

    let brokers = run["brokers"].as_str().unwrap();
    let address = run["address"].as_str().unwrap();
    let store = bench.home().join("store").display().to_string();
    let home = bench.home().display().to_string();
    let end = "--log debug --die-with-parent";
    assert_eq!(bench.notes("broker.args"), [format!("--data {home}/broker {end} --listen 127.0.0.1:0")]);
    assert_eq!(
        bench.notes("orchestrator.args"),
        [format!("--database {home}/retort.sqlite --store {store} --brokers {brokers} {end} --listen 127.0.0.1:0")]
    );
    // Three workers share the cores.
    let threads = (std::thread::available_parallelism().unwrap().get() / 3).max(1);
    let worker = format!(
        "--orchestrator {address} --brokers {brokers} --store {store} --pool default --threads {threads} {end}"
    );
    assert_eq!(bench.notes("teacher.args"), [worker.clone(), worker.clone()]);
    assert_eq!(bench.notes("student.args"), [worker]);

    up.signal(Signal::INT);
    assert_eq!(up.ended().code(), Some(0), "{}", up.stderr());
    assert!(up.stdout().ends_with("stopped\n"), "{}", up.stdout());
    let stopped = bench.notes("stopped");
    assert_eq!(stopped[3..], ["orchestrator", "broker"], "{stopped:?}");
    bench.assert_nothing_left();
}

#[test]
fn what_dies_is_restarted_with_the_port_it_had() {
    let bench = Bench::new();
    let mut up = bench.up(&[]);
    up.until_printed("retort is up in");
    let brokers = bench.run_json().unwrap()["brokers"].as_str().unwrap().to_owned();
    for name in ["teacher-1", "broker"] {
        let pid = bench.pid(name).unwrap();
        kill(pid, Signal::KILL);
        up.until(&format!("another {name}"), || bench.pid(name).filter(|now| *now != pid));
        up.until_printed(&format!("{name} was killed by signal 9; restarting in 1 s (log: "));
        up.until_printed(&format!("{name} is back"));
    }
    assert!(
        bench.notes("broker.args")[1].ends_with(&format!("--listen {brokers}")),
        "{:?}",
        bench.notes("broker.args")
    );
    assert_eq!(bench.run_json().unwrap()["brokers"].as_str().unwrap(), brokers);
    up.signal(Signal::TERM);
    assert_eq!(up.ended().code(), Some(0));
    bench.assert_nothing_left();
}

#[test]
fn what_dies_again_waits_longer() {
    let bench = Bench::new();
    let mut up = bench.up(&["--json"]);
    up.until_printed("\"type\":\"up\"");
    bench.program("student", "note; exit 7");
    kill(bench.pid("student-1").unwrap(), Signal::KILL);
    up.until_printed("student-1 was killed by signal 9; restarting in 1 s");
    up.until_printed("student-1 did not come back: student-1 ended with exit code 7");
    up.until_printed("restarting in 2 s");
    // Stopping does not wait for the next attempt.
    let asked = Instant::now();
    up.signal(Signal::INT);
    assert_eq!(up.ended().code(), Some(0));
    assert!(asked.elapsed() < Duration::from_secs(4), "{:?}", asked.elapsed());
    for line in up.stdout().lines() {
        serde_json::from_str::<serde_json::Value>(line).unwrap();
    }
    bench.assert_nothing_left();
}

#[test]
fn a_program_that_is_never_ready_is_given_up_with_the_end_of_its_log() {
    let bench = Bench::new();
    bench.program("teacher", "note; echo 'loading for ever' >&2; sleep 1000 & echo $! >> \"$HERE/pids\"; wait");
    let mut up = bench.up(&["--ready-timeout", "1", "--json"]);
    assert_eq!(up.ended().code(), Some(1));
    let stderr = up.stderr();
    assert!(stderr.starts_with("error[component-failed]: teacher-1 was not ready after 1 s"), "{stderr}");
    assert!(stderr.contains("  | loading for ever"), "{stderr}");
    let line: serde_json::Value = serde_json::from_str(up.stdout().trim()).unwrap();
    assert_eq!((&line["type"], &line["code"]), (&"error".into(), &"component-failed".into()));
    bench.assert_nothing_left();
}

#[test]
fn a_program_that_dies_at_its_start_is_quoted() {
    let bench = Bench::new();
    bench.program("orchestrator", "note; echo 'error[database-unavailable]: retort.sqlite is no database' >&2; exit 1");
    let mut up = bench.up(&[]);
    assert_eq!(up.ended().code(), Some(1));
    let expected =
        "error[database-unavailable]: orchestrator ended with exit code 1: retort.sqlite is no database (log: ";
    assert!(up.stderr().starts_with(expected), "{}", up.stderr());
    bench.assert_nothing_left();
}

#[test]
fn a_second_signal_kills_at_once() {
    let bench = Bench::new();
    for name in ["broker", "orchestrator", "teacher", "student"] {
        bench.program(name, STUBBORN);
    }
    let mut up = bench.up(&[]);
    up.until_printed("retort is up in");
    up.signal(Signal::INT);
    up.until_printed("stopping; once more to stop at once");
    let asked = Instant::now();
    up.signal(Signal::INT);
    assert_eq!(up.ended().code(), Some(130));
    assert!(asked.elapsed() < Duration::from_secs(2), "{:?}", asked.elapsed());
    bench.assert_nothing_left();
}

#[test]
fn a_program_that_does_not_stop_is_killed_after_its_grace() {
    let bench = Bench::new();
    bench.program("student", STUBBORN);
    let mut up = bench.up(&[]);
    up.until_printed("retort is up in");
    let asked = Instant::now();
    up.signal(Signal::INT);
    assert_eq!(up.ended().code(), Some(0));
    assert!(asked.elapsed() >= Duration::from_secs(5), "{:?}", asked.elapsed());
    bench.assert_nothing_left();
}

#[test]
fn a_signal_during_the_start_stops_it() {
    let bench = Bench::new();
    bench.program("orchestrator", "note; sleep 1000 & echo $! >> \"$HERE/pids\"; wait");
    let mut up = bench.up(&[]);
    up.until("the orchestrator's start", || bench.notes("pids").get(3).cloned());
    up.signal(Signal::INT);
    assert_eq!(up.ended().code(), Some(130));
    bench.assert_nothing_left();
}

#[test]
fn one_home_holds_one_retort() {
    let bench = Bench::new();
    let mut up = bench.up(&[]);
    up.until_printed("retort is up in");
    let second = bench.retort(&["up", "--listen", "127.0.0.1:0"]).output().unwrap();
    let stderr = String::from_utf8_lossy(&second.stderr).into_owned();
    assert_eq!(second.status.code(), Some(1));
    assert!(stderr.starts_with("error[already-running]: "), "{stderr}");
    assert!(stderr.contains(&format!("process {}", up.child.id())), "{stderr}");
    // A killed holder leaves a lock that nobody holds.
    up.signal(Signal::KILL);
    up.ended();
    let mut third = bench.up(&[]);
    third.until_printed("retort is up in");
    third.signal(Signal::INT);
    assert_eq!(third.ended().code(), Some(0));
}

#[test]
fn a_port_in_use_and_a_missing_program_are_said_before_anything_starts() {
    let bench = Bench::new();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for flag in ["--listen", "--broker-listen"] {
        let other = if flag == "--listen" { "--broker-listen" } else { "--listen" };
        let output = bench.retort(&["up", flag, &address, other, "127.0.0.1:0"]).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(stderr.starts_with(&format!("error[port-in-use]: {address} is in use")), "{stderr}");
        assert!(stderr.contains(flag), "{stderr}");
        assert_eq!(output.status.code(), Some(1));
    }
    let wrong = bench.retort(&["up", "--listen", "nowhere"]).output().unwrap();
    assert_eq!(wrong.status.code(), Some(2), "{}", String::from_utf8_lossy(&wrong.stderr));
    std::fs::remove_file(bench.programs().join("retort-student")).unwrap();
    let output = bench.retort(&["up"]).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(stderr.starts_with("error[program-missing]: retort-student is not in"), "{stderr}");
    assert!(stderr.contains("cargo build -p retort-student"), "{stderr}");
    assert!(bench.notes("pids").is_empty());
}
