//! A student distilled by `retort run` and exported is a model to transformers: it loads, and it
//! answers with the same greedy tokens there as here. A GGUF file is to the gguf package what it would have
//! written itself, and to transformers the same model. Its adapters are such to PEFT.

#![allow(clippy::unwrap_used)] // helpers of tests unwrap as tests do

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use retort_core::spec::Lora;
use retort_llama::Model;
use retort_tests::{
    prompts::{self, Shape},
    retort::{programs, retort},
    teacher,
};
use tch::{Device, Kind, Tensor, no_grad};

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

fn cache() -> PathBuf {
    let cache = std::env::var_os("RETORT_CACHE").map(PathBuf::from);
    cache.unwrap_or_else(|| std::env::home_dir().expect("a home").join(".cache").join("retort"))
}

/// With transformers, and what PEFT brings: transformers reads GGUF files through accelerate.
fn python() -> Command {
    let (python, peft) = (cache().join("venv-transformers").join("bin").join("python"), cache().join("peft"));
    for place in [&python, &peft] {
        assert!(place.exists(), "{} is not there: run `make test-parity`", place.display());
    }
    let mut command = Command::new(python);
    command.env("PYTHONPATH", peft);
    command
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("parity").join(name)
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
    let script = script("check_export.py");
    let theirs = common(python().arg(&script));
    fs::write(folder.path().join("theirs.jsonl"), succeeded("transformers", theirs)).unwrap();
    let compare = python()
        .arg(&script)
        .arg("--compare")
        .arg(folder.path().join("ours.jsonl"))
        .arg(folder.path().join("theirs.jsonl"))
        .output()
        .unwrap();
    succeeded("the comparison", compare);
}

/// Exports the folder as a GGUF file of each type and lets the others look at it.
fn checked_as_gguf(model: &Path, kinds: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    for kind in kinds {
        let out = folder.path().join(format!("{kind}.gguf"));
        let export = retort()
            .args(["model", "export", "--format", "gguf", "--type", kind])
            .arg(model)
            .arg("--out")
            .arg(&out)
            .output()
            .unwrap();
        succeeded("retort model export", export);
        let check = python()
            .arg(script("check_gguf.py"))
            .arg("--model")
            .arg(model)
            .arg("--gguf")
            .arg(&out)
            .args(["--type", kind])
            .output()
            .unwrap();
        println!("{}: {}", model.display(), String::from_utf8_lossy(&succeeded("the check", check)).trim());
        fs::remove_file(out).unwrap();
    }
}

#[test]
fn an_exported_gguf_file_is_what_others_would_have_written() {
    checked_as_gguf(&teacher::smollm2(), &["q8_0", "f16"]);
}

#[test]
fn a_qwen2_and_a_llama_with_scaled_frequencies_too() {
    let folder = tempfile::tempdir().unwrap();
    for kind in ["qwen2", "llama3"] {
        let model = folder.path().join(kind);
        let make = python()
            .arg(script("check_gguf.py"))
            .args(["--make", kind, "--tokenizer"])
            .arg(teacher::smollm2())
            .arg("--model")
            .arg(&model)
            .output()
            .unwrap();
        succeeded("the making of a model", make);
        // Random weights of this size say nothing of what fewer bits cost.
        checked_as_gguf(&model, &["f32"]);
    }
}

/// PEFT takes `adapter/` as its own, and merges it to the weights of `model/`.
#[test]
fn adapters_are_adapters_in_peft() {
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| folder.path().join(name);
    let plain = Model::load(&teacher::smollm2(), Device::Cpu, Kind::Float).unwrap().prune_layers(&[0, 1, 29]).unwrap();
    plain.save(&place("base"), Kind::Float).unwrap();
    let model = plain.adapt(&Lora { rank: 8, alpha: 12.0, ..Lora::default() }, 3).unwrap();
    for (name, mut tensor) in model.adapters() {
        if name.contains("lora_B") {
            let numbers = Tensor::arange(tensor.numel() as i64, (Kind::Float, Device::Cpu)).sin() * 0.05;
            no_grad(|| tensor.copy_(&numbers.view_(tensor.size())));
        }
    }
    model.save_adapters(&place("adapter")).unwrap();
    model.save(&place("merged"), Kind::Float).unwrap();
    let ids = (Tensor::arange(2 * 24, (Kind::Int64, Device::Cpu)) * 977).remainder(49_000).view([2, 24]);
    let logits = no_grad(|| model.head(&model.hidden(&ids).unwrap()).unwrap());
    Tensor::write_safetensors(&[("ids", &ids), ("logits", &logits)], place("ours.safetensors")).unwrap();

    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("parity").join("check_adapter.py");
    let mut check = python();
    check.arg(script);
    for (option, name) in
        [("--base", "base"), ("--adapter", "adapter"), ("--merged", "merged"), ("--ours", "ours.safetensors")]
    {
        check.arg(option).arg(place(name));
    }
    let said = succeeded("peft", check.output().unwrap());
    println!("{}", String::from_utf8_lossy(&said));
}
