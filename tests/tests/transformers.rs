//! A student distilled by `retort run` and exported is a model to transformers: it loads, and it
//! answers with the same greedy tokens there as here.

#![allow(clippy::unwrap_used)] // helpers of tests unwrap as tests do

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use retort_tests::{
    prompts::{self, Shape},
    retort::{programs, retort},
    teacher,
};

fn succeeded(what: &str, output: Output) -> Vec<u8> {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{what}: {}\n{stderr}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout)
    );
    output.stdout
}

fn python() -> PathBuf {
    let cache = std::env::var_os("RETORT_CACHE").map(PathBuf::from);
    let cache = cache.unwrap_or_else(|| std::env::home_dir().expect("a home").join(".cache").join("retort"));
    let python = cache.join("venv-transformers").join("bin").join("python");
    assert!(python.exists(), "{} is not there: run `make test-parity`", python.display());
    python
}

#[test]
fn an_exported_student_answers_alike_in_transformers() {
    let folder = tempfile::tempdir().unwrap();
    let shape = Shape { name: "parity", train: 6, held_out: 2, shard_rows: 3, tokens: 12, passes: 1 };
    let spec = prompts::spec(folder.path(), &teacher::smollm2(), &shape);
    let out = folder.path().join("export");
    let run = retort()
        .arg("run")
        .arg(&spec)
        .arg("--home")
        .arg(folder.path().join("home"))
        .arg("--out")
        .arg(&out)
        .output()
        .unwrap();
    succeeded("retort run", run);

    let prompts = folder.path().join("held-out.jsonl");
    let lines = [
        r#"{"id":"a","messages":[{"role":"user","content":"Where is my parcel?"}]}"#,
        r#"{"id":"b","messages":[{"role":"system","content":"Be brief."},{"role":"user","content":"Name a colour — any: é, 日本."}]}"#,
        r#"{"id":"c","messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Hello!"},{"role":"user","content":"Count to 12."}]}"#,
    ];
    fs::write(&prompts, lines.join("\n")).unwrap();
    let common = |command: &mut Command| -> Output {
        command
            .arg("--model")
            .arg(&out)
            .arg("--prompts")
            .arg(&prompts)
            .args(["--max-new-tokens", "24"])
            .output()
            .unwrap()
    };
    let student = programs().join("retort-student");
    let ours = common(Command::new(student).args(["generate", "--json", "--dtype", "f32"]));
    fs::write(folder.path().join("ours.jsonl"), succeeded("retort-student generate", ours)).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("parity").join("check_export.py");
    let theirs = common(Command::new(python()).arg(&script));
    fs::write(folder.path().join("theirs.jsonl"), succeeded("transformers", theirs)).unwrap();
    let compare = Command::new(python())
        .arg(&script)
        .arg("--compare")
        .arg(folder.path().join("ours.jsonl"))
        .arg(folder.path().join("theirs.jsonl"))
        .output()
        .unwrap();
    succeeded("the comparison", compare);
}
