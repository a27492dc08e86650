//! What a user sees when the input is wrong: a stable code, the place, and exit status 2 (or 1).

#![allow(clippy::unwrap_used)] // helpers of tests unwrap as tests do

use std::{fs, path::Path, process::Output};

use retort_tests::{
    prompts::{self, Shape},
    retort::{Up, retort},
    teacher,
};

fn refused(output: &Output, code: &str, says: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "it should have been refused with {code}");
    assert!(stderr.contains(&format!("error[{code}]: ")), "expected {code}, got: {stderr}");
    for part in says {
        assert!(stderr.contains(part), "expected {part:?} in: {stderr}");
    }
    assert!(!stderr.contains("panicked"), "{stderr}");
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

#[test]
fn specs_prompts_and_models() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    teacher::tiny(&at("teacher"), 4);
    let shape = Shape { train: 8, held_out: 2, ..Shape::default() };
    let spec = prompts::spec(folder.path(), &at("teacher"), &shape);
    let good_spec = fs::read_to_string(&spec).unwrap();
    let good_prompts = fs::read_to_string(at("prompts.jsonl")).unwrap();
    let up = Up::start(folder.path(), &["--teachers", "0", "--students", "0"]);
    let create = || up.command(&["job", "create", spec.to_str().unwrap()]);
    let with_spec = |from: &str, to: &str| {
        assert!(good_spec.contains(from), "the test's own spec has {from:?}");
        fs::write(&spec, good_spec.replace(from, to)).unwrap();
        let output = create();
        fs::write(&spec, &good_spec).unwrap();
        output
    };
    let with_line = |number: usize, line: &str| {
        let mut lines: Vec<&str> = good_prompts.lines().collect();
        lines[number - 1] = line;
        fs::write(at("prompts.jsonl"), lines.join("\n")).unwrap();
        let output = create();
        fs::write(at("prompts.jsonl"), &good_prompts).unwrap();
        output
    };

    refused(&with_spec("model:", "modle:"), "spec-unknown-key", &["job.yaml line", "did you mean \"model\"?"]);
    refused(&with_spec("passes: 2", "passes: two"), "spec-malformed", &["job.yaml line"]);
    refused(&with_spec("path: prompts.jsonl", "path: nowhere.jsonl"), "file-not-found", &["nowhere.jsonl"]);
    refused(&with_spec("layers: 2", "layers: 9"), "spec-invalid", &["9", "4"]);
    refused(&with_line(3, "{\"messages\": [}"), "prompt-malformed", &["prompts.jsonl line 3"]);
    refused(
        &with_line(5, r#"{"messages":[{"role":"user","content":"  "}]}"#),
        "prompt-empty",
        &["prompts.jsonl line 5"],
    );
    let long = format!(r#"{{"messages":[{{"role":"user","content":"{}"}}]}}"#, "word ".repeat(9000));
    refused(&with_line(7, &long), "prompt-too-long", &["prompts.jsonl line 7"]);

    // A student of another vocabulary.
    copy_folder(&at("teacher"), &at("other"));
    let config = fs::read_to_string(at("other/config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    config["vocab_size"] = 1000.into();
    fs::write(at("other/config.json"), config.to_string()).unwrap();
    let other = format!("checkpoint: {{model: {}}}", at("other").display());
    refused(&with_spec("prune: {layers: 2}", &other), "vocabulary-mismatch", &["1000", "49151"]);

    // A teacher whose download broke off.
    let weights = at("teacher/model.safetensors");
    let whole = fs::read(&weights).unwrap();
    fs::write(&weights, &whole[..whole.len() / 2]).unwrap();
    refused(&create(), "weights-truncated", &["model.safetensors"]);
    fs::write(&weights, &whole).unwrap();

    let output = create();
    assert!(output.status.success(), "the good spec is accepted: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_truncated_gguf() {
    let folder = tempfile::tempdir().unwrap();
    let file = teacher::smollm2().parent().unwrap().join("src").join("SmolLM2-135M-Instruct.Q4_1.gguf");
    let whole = fs::read(file).unwrap();
    let short = folder.path().join("short.gguf");
    let out = folder.path().join("out");
    for length in [20, 5_000, whole.len() / 2, whole.len() - 1] {
        fs::write(&short, &whole[..length]).unwrap();
        let output = retort().args(["model", "import"]).arg(&short).arg("--out").arg(&out).output().unwrap();
        refused(&output, "gguf-truncated", &["short.gguf"]);
        assert!(!out.exists(), "a failed import leaves nothing");
    }
    for bytes in ["", "GGU", "not a model at all"] {
        fs::write(&short, bytes).unwrap();
        let output = retort().args(["model", "import"]).arg(&short).arg("--out").arg(&out).output().unwrap();
        refused(&output, "gguf-malformed", &["short.gguf"]);
    }
}

#[test]
fn a_port_in_use() {
    let folder = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for flag in ["--listen", "--broker-listen"] {
        let other = if flag == "--listen" { "--broker-listen" } else { "--listen" };
        let output =
            retort().args(["up", flag, &address, other, "127.0.0.1:0", "--home"]).arg(folder.path()).output().unwrap();
        refused(&output, "port-in-use", &[&address]);
    }
}

#[test]
fn nobody_at_the_address() {
    let folder = tempfile::tempdir().unwrap();
    let output = retort()
        .args(["job", "list", "--address", "http://127.0.0.1:9", "--home"])
        .arg(folder.path())
        .output()
        .unwrap();
    refused(&output, "orchestrator-unavailable", &["127.0.0.1:9", "retort up"]);
}
