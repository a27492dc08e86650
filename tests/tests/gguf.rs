//! `retort model export --format gguf` of a real model's folder: what it says, and that a stopped one leaves nothing.

#![allow(clippy::unwrap_used)] // helpers of tests unwrap as tests do

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use retort_tests::{retort::retort, teacher};
use rustix::process::{Pid, Signal, kill_process};

fn export(kind: &str, out: &Path) -> Command {
    let mut command = retort();
    command.args(["model", "export", "--format", "gguf", "--type", kind, "--json"]);
    command.arg(teacher::smollm2()).arg("--out").arg(out);
    command
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn a_folder_becomes_a_file_that_is_imported_again() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("smollm2.gguf");
    let done = export("q8_0", &out).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let told: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!((&told["type"], &told["architecture"]), (&"q8_0".into(), &"LlamaForCausalLM".into()));
    assert_eq!(told["bytes"], fs::metadata(&out).unwrap().len());
    let again = export("q8_0", &out).output().unwrap();
    assert_eq!(again.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&again.stderr).contains("error[object-exists]"));
    let back = folder.path().join("back");
    let import = retort().args(["model", "import", "--json"]).arg(&out).arg("--out").arg(&back).output().unwrap();
    assert!(import.status.success(), "{}", String::from_utf8_lossy(&import.stderr));
    let read: serde_json::Value = serde_json::from_slice(&import.stdout).unwrap();
    assert_eq!((&read["parameters"], &read["tensors"]), (&told["parameters"], &told["tensors"]));
}

#[test]
fn an_export_that_is_interrupted_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("smollm2.gguf");
    let mut child = export("f32", &out).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let start = Instant::now();
    while names(folder.path()).is_empty() {
        assert!(start.elapsed() < Duration::from_secs(60), "nothing was begun");
        std::thread::sleep(Duration::from_millis(1));
    }
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let status = child.wait().unwrap();
    let stderr = std::io::read_to_string(child.stderr.take().unwrap()).unwrap();
    assert_eq!(status.code(), Some(130), "{stderr}");
    assert!(stderr.contains("was not written"), "{stderr}");
    assert_eq!(names(folder.path()), Vec::<String>::new());
}
