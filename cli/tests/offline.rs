//! Commands while no orchestrator is up, on paths and streams that do not do what they should.

#![allow(clippy::unwrap_used)] // helpers of tests unwrap as tests do

#[path = "support/fakes.rs"]
mod fakes;

use std::{
    fs::{self, File},
    path::Path,
    process::{Command, Output},
};

use fakes::Bench;

/// A home whose store holds one promoted model.
fn bench() -> Bench {
    let bench = Bench::new();
    let models = bench.home().join("store/models/support");
    fs::create_dir_all(models.join("versions")).unwrap();
    fs::create_dir_all(models.join("000001")).unwrap();
    fs::write(models.join("000001/config.json"), "{}").unwrap();
    let pointer = r#"{"job":"0198c1d2e3f4a5b6c7d8e9f0a1b2c3d4","quality":{"kl":1.0,"top1_agreement":0.5}}"#;
    fs::write(models.join("versions/000001.json"), pointer).unwrap();
    bench
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn refused(output: &Output, code: i32, says: &[&str]) {
    let stderr = stderr(output);
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    for part in says {
        assert!(stderr.contains(part), "{part:?} in {stderr}");
    }
}

fn full() -> File {
    File::options().write(true).open("/dev/full").unwrap()
}

#[test]
fn models_are_listed_from_the_store() {
    let bench = bench();
    let row = "support@1  1.000  50.0 %  jobs/0198c1d2e3f4a5b6c7d8e9f0a1b2c3d4";
    let store = bench.home().join("store").display().to_string();
    for args in [&["model", "list"][..], &["model", "list", "--home", "/no/such/home", "--store", &store]] {
        let output = bench.retort(args).output().unwrap();
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(stdout.contains(row), "{stdout}{}", stderr(&output));
    }
    // Where there is no store either, nobody can say, and none is made.
    let empty = bench.folder.path().join("empty").display().to_string();
    let output = bench.retort(&["model", "list", "--home", &empty]).output().unwrap();
    refused(
        &output,
        1,
        &["error[orchestrator-unavailable]: no retort is up in", &format!("`retort up --home {empty}`")],
    );
    let output = bench.retort(&["model", "export", "support", "--home", &empty, "--out", "o"]).output().unwrap();
    refused(&output, 2, &["error[file-not-found]: ", "no object store is there"]);
    assert!(!Path::new(&empty).exists());
}

#[test]
fn an_export_says_what_it_cannot_do_and_leaves_nothing() {
    let bench = bench();
    let out = bench.folder.path().join("support.gguf");
    let (out, folder) = (out.to_str().unwrap(), bench.folder.path().to_str().unwrap());
    let cases: [(&[&str], i32, &str); 5] = [
        (&["support", "--type", "f16"], 2, "error[request-invalid]: --type goes with --format gguf"),
        (&["support", "--format", "gguf", "--type", "q4_0"], 2, "[possible values: q8_0, f16, bf16, f32]"),
        (&["support@2", "--format", "gguf"], 1, "error[model-not-found]: "),
        // What the store holds under that name is `{}`.
        (&["support", "--format", "gguf"], 2, "models/support/000001/config.json"),
        (&[folder], 2, "--format gguf makes a file of it"),
    ];
    for (args, code, says) in cases {
        let output = bench.retort(&[&["model", "export", "--output", out], args].concat()).output().unwrap();
        refused(&output, code, &[says]);
        assert!(!Path::new(out).exists());
    }
}

#[test]
fn a_home_that_was_named_is_the_only_one_asked() {
    let bench = bench();
    let home = bench.home().display().to_string();
    for args in [&["job", "list"][..], &["job", "cancel", "0198c1d2e3f4a5b6c7d8e9f0a1b2c3d4"]] {
        let output = bench.retort(args).output().unwrap();
        refused(&output, 1, &["error[orchestrator-unavailable]: ", &format!("no retort is up in {home}")]);
    }
}

#[test]
fn output_that_a_full_disk_refuses_fails_the_command() {
    let bench = bench();
    let says = ["error[disk-full]: the output is incomplete"];
    for args in [&["--help"][..], &["run", "--help"], &["--version"], &["completions", "bash"], &["model", "list"]] {
        for more in [&[][..], &["--json"]] {
            let output = bench.retort(args).args(more).stdout(full()).output().unwrap();
            refused(&output, 1, &says);
        }
    }
    // Remarks and errors that nobody can read change no exit code.
    let missing = bench.retort(&["shard", "show", "/no/such/file"]).stderr(full()).output().unwrap();
    assert_eq!(missing.status.code(), Some(2));
    let wrong = bench.retort(&["rum"]).stderr(full()).output().unwrap();
    assert_eq!(wrong.status.code(), Some(2));
}

#[test]
fn a_reader_that_has_gone_is_no_error() {
    let bench = bench();
    for args in [&["--help"][..], &["completions", "bash"], &["model", "list"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = bench.retort(args).stdout(writer).output().unwrap();
        assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""), "{args:?}");
    }
}

#[test]
fn homes_and_folders_that_can_be_none_are_named() {
    let bench = bench();
    for home in ["/dev/null", "/dev/null/below"] {
        for command in ["up", "run"] {
            let spec = ["job.yaml"];
            fs::write(bench.folder.path().join("job.yaml"), SPEC).unwrap();
            let mut retort = bench.retort(&[command, "--home", home]);
            retort.current_dir(bench.folder.path()).args(if command == "run" { &spec[..] } else { &[] });
            refused(&retort.output().unwrap(), 2, &[&format!("error[request-invalid]: --home {home} is no folder")]);
        }
    }
    let output = bench.retort(&["up", "--home", "/proc/nope"]).output().unwrap();
    refused(&output, 2, &["error[file-unreadable]: /proc/nope: no folder can be made there"]);
    let output = bench.retort(&["model", "export", "support", "--out", "/proc/x"]).output().unwrap();
    refused(&output, 2, &["error[file-unreadable]: /proc/x: no folder can be made there"]);
    let output = bench.retort(&["up", "--store", "s3://bucket"]).output().unwrap();
    refused(&output, 2, &["error[store-unsupported]: "]);
    assert!(bench.notes("pids").is_empty());
}

const SPEC: &str =
    "name: a\nprompts: { path: p }\nteacher: { model: t }\nstudent: { init: { prune: { layers: 2 } } }\n";

#[test]
fn a_shard_that_is_no_regular_file_is_refused() {
    let bench = bench();
    let pipe = bench.folder.path().join("pipe").display().to_string();
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    for path in [pipe.as_str(), "/dev/zero", "/"] {
        let mut show = bench.start(&["shard", "show", path]);
        assert_eq!(show.ended().code(), Some(2), "{path}");
        assert!(show.stderr().contains("a shard is a regular file"), "{}", show.stderr());
    }
}
