//! `retort run`: real processes around an orchestrator that tells a story.

#![allow(clippy::unwrap_used)] // helpers of tests unwrap as tests do

#[path = "support/fakes.rs"]
mod fakes;
#[path = "support/orchestrator.rs"]
mod orchestrator;

use std::fs;

use fakes::Bench;
use orchestrator::{EVENTS, Fake};
use rustix::process::Signal;
use serde_json::Value;

/// Not a test: becomes the orchestrator's process when the fake program starts this binary.
#[test]
fn serve_as_orchestrator() {
    let (Ok(notes), Ok(flags)) = (std::env::var("FAKE_NOTES"), std::env::var("FAKE_FLAGS")) else { return };
    let flags: Vec<&str> = flags.split(' ').collect();
    let flag = |name: &str| flags.iter().position(|flag| *flag == name).map(|at| flags[at + 1]).unwrap();
    let fake = Fake { notes: notes.into(), store: flag("--store").into() };
    tokio::runtime::Runtime::new().unwrap().block_on(fake.serve(flag("--listen")));
}

fn bench() -> Bench {
    let bench = Bench::new();
    let this = std::env::current_exe().unwrap();
    let script = format!(
        "note; FAKE_NOTES=\"$HERE\" FAKE_FLAGS=\"$ARGS\" exec '{}' --exact serve_as_orchestrator --nocapture",
        this.display()
    );
    bench.program("orchestrator", &script);
    fs::create_dir(bench.folder.path().join("teacher")).unwrap();
    fs::write(bench.folder.path().join("prompts.jsonl"), "").unwrap();
    let spec = "name: support\nprompts: { path: prompts.jsonl }\n\
                teacher: { model: teacher, pool: big }\nstudent: { pool: small, init: { prune: { layers: 2 } } }\n";
    fs::write(bench.folder.path().join("job.yaml"), spec).unwrap();
    bench
}

fn spec(bench: &Bench) -> String {
    bench.folder.path().join("job.yaml").display().to_string()
}

fn json_lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"))).collect()
}

#[test]
fn a_job_runs_to_its_exported_model() {
    let bench = bench();
    let mut run = bench.start(&["run", &spec(&bench), "--plain"]);
    assert_eq!(run.ended().code(), Some(0), "{}\n{}", run.stdout(), run.stderr());
    let stdout = run.stdout();
    for expected in [
        "is submitted\n  rows             48 for training, 16 held out\n",
        "  optimiser steps  0, of 8 rows each\n  micro-batches    512 tokens, as the spec says\n",
        "teach     shard 1 of 4",
        "redone    shard-00001, attempt 1: lease expired\n",
        "train     step 4 of 8, loss 1.5000",
        "evaluate  step 8: held-out KL 1.0000",
        "support  jobs/00000000000000000000000000000001  SUCCEEDED\n",
        "KL is 25.0 % of what it was",
    ] {
        assert!(stdout.contains(expected), "{expected:?} in\n{stdout}");
    }
    let exported = bench.home().join("exports/support");
    assert!(stdout.contains(&format!("{}\n", exported.display())), "{stdout}");
    assert_eq!(fs::read_to_string(exported.join("config.json")).unwrap(), "{}");
    // Workers serve the pools of the spec.
    assert!(bench.notes("teacher.args")[0].contains("--pool big"), "{:?}", bench.notes("teacher.args"));
    assert!(bench.notes("student.args")[0].contains("--pool small"));
    bench.assert_nothing_left();

    // A finished job is not gone on with; its export is replaced.
    let mut again = bench.start(&["run", &spec(&bench), "--plain"]);
    assert_eq!(again.ended().code(), Some(0), "{}", again.stderr());
    assert_eq!(bench.notes("requests").len(), 2);
}

#[test]
fn off_a_terminal_events_are_json_lines_and_a_crash_of_the_orchestrator_repeats_none() {
    let bench = bench();
    fs::write(bench.folder.path().join("crash"), "").unwrap();
    let mut run = bench.start(&["run", &spec(&bench)]);
    assert_eq!(run.ended().code(), Some(0), "{}\n{}", run.stdout(), run.stderr());
    let lines = json_lines(&run.stdout());
    let sequences: Vec<u64> =
        lines.iter().filter(|line| line["type"] == "event").filter_map(|line| line["sequence"].as_u64()).collect();
    assert_eq!(sequences, (1..=EVENTS).collect::<Vec<_>>());
    let submitted = lines.iter().find(|line| line["type"] == "submitted").unwrap();
    assert_eq!(submitted["plan"]["training"]["batch_rows"], 8);
    let notices: Vec<&str> = lines.iter().filter_map(|line| line["message"].as_str()).collect();
    let lost = notices.iter().filter(|notice| notice.contains("does not answer")).count();
    assert_eq!(lost, 1, "{notices:?}");
    assert!(
        notices.iter().any(|notice| notice.starts_with("orchestrator ended with exit code 9; restarting in 1 s")),
        "{notices:?}"
    );
    let result = lines.last().unwrap();
    assert_eq!(result["type"], "result");
    assert_eq!(result["job"]["state"], "succeeded");
    assert_eq!(result["export"]["candidate"], false);
    bench.assert_nothing_left();
}

#[test]
fn a_run_that_was_stopped_goes_on_with_its_job() {
    let bench = bench();
    let hold = bench.folder.path().join("hold");
    fs::write(&hold, "").unwrap();
    for (signal, code) in [(Signal::INT, Some(130)), (Signal::KILL, None)] {
        let mut run = bench.start(&["run", &spec(&bench), "--plain"]);
        run.until_printed("redone");
        run.signal(signal);
        assert_eq!(run.ended().code(), code, "{}\n{}", run.stdout(), run.stderr());
        if signal == Signal::INT {
            assert!(run.stderr().contains("To go on: retort run"), "{}", run.stderr());
            bench.assert_nothing_left();
        }
    }
    fs::remove_file(&hold).unwrap();
    let mut run = bench.start(&["run", &spec(&bench), "--plain"]);
    assert_eq!(run.ended().code(), Some(0), "{}\n{}", run.stdout(), run.stderr());
    assert!(run.stdout().contains("going on with jobs/00000000000000000000000000000001"), "{}", run.stdout());
    assert_eq!(bench.notes("requests").len(), 1);
}

#[test]
fn a_run_that_was_stopped_says_so_in_its_last_line_of_json() {
    let bench = bench();
    fs::write(bench.folder.path().join("hold"), "").unwrap();
    for signal in [Signal::INT, Signal::TERM] {
        let mut run = bench.start(&["run", &spec(&bench), "--json"]);
        run.until_printed("attempt_lost");
        run.signal(signal);
        assert_eq!(run.ended().code(), Some(130), "{}\n{}", run.stdout(), run.stderr());
        let lines = json_lines(&run.stdout());
        let last = lines.last().unwrap();
        assert_eq!((&last["type"], &last["code"]), (&"error".into(), &"interrupted".into()));
        assert!(last["message"].as_str().unwrap().contains("To go on: retort run"), "{last}");
        bench.assert_nothing_left();
    }
}

#[test]
fn a_home_that_another_run_has_is_left_to_it() {
    let bench = bench();
    fs::write(bench.folder.path().join("hold"), "").unwrap();
    let mut run = bench.start(&["run", &spec(&bench), "--plain"]);
    run.until_printed("redone");
    let second = bench.retort(&["run", &spec(&bench), "--plain"]).output().unwrap();
    let stderr = String::from_utf8_lossy(&second.stderr).into_owned();
    assert_eq!(second.status.code(), Some(1), "{stderr}");
    assert!(stderr.starts_with("error[already-running]: another `retort run` has "), "{stderr}");
    assert!(stderr.contains(&format!("process {}", run.child.id())), "{stderr}");
    run.signal(Signal::INT);
    assert_eq!(run.ended().code(), Some(130), "{}\n{}", run.stdout(), run.stderr());
    bench.assert_nothing_left();
}

#[test]
fn a_result_that_was_not_delivered_is_delivered_and_not_redone() {
    let job = "jobs/00000000000000000000000000000001";
    for (signal, reject) in [(Signal::INT, false), (Signal::KILL, false), (Signal::INT, true)] {
        let bench = bench();
        let hold = bench.folder.path().join("hold");
        fs::write(&hold, "").unwrap();
        let mut run = bench.start(&["run", &spec(&bench), "--plain"]);
        run.until_printed("redone");
        // The job ends, and the run is stopped before it hears of it.
        if reject {
            fs::write(bench.folder.path().join("reject"), "").unwrap();
        }
        fs::write(bench.folder.path().join("final"), job).unwrap();
        fs::create_dir_all(bench.home().join("store").join(job)).unwrap();
        fs::write(bench.home().join("store").join(job).join("report.json"), "{}").unwrap();
        run.signal(signal);
        run.ended();
        if signal == Signal::INT {
            assert!(run.stderr().contains(&format!("{job} has just ended")), "{}", run.stderr());
        }
        fs::remove_file(&hold).unwrap();

        let mut run = bench.start(&["run", &spec(&bench), "--plain"]);
        assert_eq!(run.ended().code(), Some(if reject { 3 } else { 0 }), "{}\n{}", run.stdout(), run.stderr());
        for expected in [&format!("{job} has ended, and this is its result"), "KL is 25.0 % of what it was"] {
            assert!(run.stdout().contains(expected), "{expected:?} in\n{}", run.stdout());
        }
        assert!(bench.home().join("exports/support/config.json").exists());
        assert_eq!(bench.notes("requests").len(), 1);

        // Delivered, it is over: the same command is another job.
        bench.start(&["run", &spec(&bench), "--plain"]).ended();
        assert_eq!(bench.notes("requests").len(), 2);
    }
}

#[test]
fn a_report_that_could_not_be_written_is_not_delivered() {
    let bench = bench();
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let output = bench.retort(&["run", &spec(&bench), "--plain"]).stdout(full).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("error[disk-full]: the output is incomplete"), "{stderr}");
    let mut run = bench.start(&["run", &spec(&bench), "--plain"]);
    assert_eq!(run.ended().code(), Some(0), "{}", run.stderr());
    assert!(run.stdout().contains("SUCCEEDED"), "{}", run.stdout());
    assert_eq!(bench.notes("requests").len(), 1);
}

#[test]
fn a_job_that_failed_is_begun_anew() {
    let bench = bench();
    fs::write(bench.folder.path().join("fail"), "").unwrap();
    for jobs in [1, 2] {
        let mut run = bench.start(&["run", &spec(&bench), "--plain"]);
        assert_eq!(run.ended().code(), Some(4), "{}\n{}", run.stdout(), run.stderr());
        assert_eq!(bench.notes("requests").len(), jobs);
    }
}

#[test]
fn a_run_file_that_a_killed_retort_left_is_not_believed() {
    let bench = bench();
    let stale = r#"{"command":"up","pid":1,"address":"http://127.0.0.1:1","brokers":"127.0.0.1:1","store":"/s"}"#;
    fs::create_dir_all(bench.home()).unwrap();
    fs::write(bench.home().join("lock"), "1\n").unwrap();
    fs::write(bench.home().join("run.json"), stale).unwrap();
    let mut run = bench.start(&["run", &spec(&bench), "--plain"]);
    assert_eq!(run.ended().code(), Some(0), "{}\n{}", run.stdout(), run.stderr());
    bench.assert_nothing_left();
}

#[test]
fn new_begins_another_job() {
    let bench = bench();
    fs::write(bench.folder.path().join("hold"), "").unwrap();
    let mut run = bench.start(&["run", &spec(&bench), "--plain"]);
    run.until_printed("redone");
    run.signal(Signal::INT);
    run.ended();
    fs::remove_file(bench.folder.path().join("hold")).unwrap();
    let mut run = bench.start(&["run", &spec(&bench), "--plain", "--new"]);
    assert_eq!(run.ended().code(), Some(0), "{}\n{}", run.stdout(), run.stderr());
    assert!(run.stdout().contains("jobs/00000000000000000000000000000002 is submitted"), "{}", run.stdout());
    let other =
        "jobs/00000000000000000000000000000001 is not finished and goes on too, maybe first; `retort job cancel ";
    assert!(run.stdout().contains(other), "{}", run.stdout());
}

#[test]
fn a_rejected_job_exports_its_candidate_and_says_so() {
    let bench = bench();
    fs::write(bench.folder.path().join("reject"), "").unwrap();
    let out = bench.folder.path().join("student");
    let mut run = bench.start(&["run", &spec(&bench), "--plain", "--out", &out.display().to_string()]);
    assert_eq!(run.ended().code(), Some(3), "{}\n{}", run.stdout(), run.stderr());
    assert!(run.stdout().contains("REJECTED"), "{}", run.stdout());
    assert!(run.stdout().contains(&format!("exported (a candidate)  {}", out.display())), "{}", run.stdout());
    assert!(out.join("config.json").exists());
}

#[test]
fn a_retort_that_is_up_is_used_and_left_up() {
    let bench = bench();
    let mut up = bench.up(&[]);
    up.until_printed("retort is up in");
    let output = bench.retort(&["run", &spec(&bench), "--plain"]).output().unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{stdout}{}", String::from_utf8_lossy(&output.stderr));
    assert!(stdout.contains("using the retort that is up in"), "{stdout}");
    assert!(bench.home().join("exports/support/config.json").exists());
    let list = bench.retort(&["job", "list"]).output().unwrap();
    assert!(String::from_utf8_lossy(&list.stdout).contains("support"), "the address is found in run.json");
    up.signal(Signal::INT);
    assert_eq!(up.ended().code(), Some(0));
    bench.assert_nothing_left();
}

#[test]
fn bad_input_is_refused_before_anything_starts() {
    let bench = bench();
    let check = |args: &[&str], expected: &str| {
        let output = bench.retort(args).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(stderr.starts_with(expected), "{stderr}");
        let stdout = json_lines(&String::from_utf8_lossy(&output.stdout));
        assert!(stdout.iter().any(|line| line["type"] == "error"), "{stdout:?}");
        output.status.code()
    };
    let at = |name: &str| bench.folder.path().join(name).display().to_string();
    fs::write(at("typo.yaml"), "name: a\npromts: {}\n").unwrap();
    assert_eq!(check(&["run", &at("typo.yaml"), "--json"], "error[spec-unknown-key]: "), Some(2));
    assert_eq!(check(&["run", &at("no.yaml"), "--json"], "error[file-not-found]: "), Some(2));
    for flag in ["--teachers", "--students"] {
        let expected = format!("error[request-invalid]: {flag} 0: ");
        assert_eq!(check(&["run", &spec(&bench), "--json", flag, "0"], &expected), Some(2));
    }
    let cloud = ["run", &spec(&bench), "--json", "--store", "s3://bucket"];
    assert_eq!(check(&cloud, "error[store-unsupported]: --store \"s3://bucket\""), Some(2));
    fs::remove_file(at("prompts.jsonl")).unwrap();
    assert_eq!(check(&["run", &spec(&bench), "--json"], "error[file-not-found]: "), Some(2));
    fs::create_dir_all(at("full")).unwrap();
    fs::write(at("full/mine"), "").unwrap();
    assert_eq!(check(&["run", &spec(&bench), "--json", "--out", &at("full")], "error[object-exists]: "), Some(1));
    let nowhere = ["run", &spec(&bench), "--json", "--out", "/proc/x/y"];
    assert_eq!(check(&nowhere, "error[file-unreadable]: /proc/x: no folder can be made there"), Some(2));
    assert!(bench.notes("pids").is_empty());
}
