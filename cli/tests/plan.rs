//! `retort plan`, as a user runs it. The whole text of the 405B's plans is kept in `golden/`: what
//! changes there changes what people buy.

#![allow(clippy::unwrap_used)] // helpers of tests unwrap as tests do

use std::process::{Command, Output};

use serde_json::Value;

fn plan(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_retort")).arg("plan").args(args).output().unwrap()
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn refused(args: &[&str], says: &str) {
    let output = plan(args);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains(says), "{says:?} in {stderr}");
}

#[test]
fn the_405b_on_two_nodes() {
    let large = ["--teacher", "llama-3.1-405b", "--nodes", "2", "--gpus", "8", "--gpu-memory", "80GiB"];
    let bf16 = plan(&[&large[..], &["--dtype", "bf16", "--price-per-gpu-hour", "2.5"]].concat());
    assert_eq!(stdout(&bf16), include_str!("golden/plan-405b-bf16.txt"));
    let fp8 = plan(&[&large[..], &["--dtype", "fp8"]].concat());
    assert_eq!(stdout(&fp8), include_str!("golden/plan-405b-fp8.txt"));
}

#[test]
fn what_does_not_fit_says_why_and_the_way_out() {
    let text = stdout(&plan(&["--teacher", "llama-3.1-405b", "--nodes", "1", "--mode", "score"]));
    assert_eq!(text, include_str!("golden/plan-405b-too-small.txt"));
}

#[test]
fn json_has_every_stage() {
    let text = stdout(&plan(&["--teacher", "llama-3.1-405b", "--nodes", "2", "--json"]));
    let plan: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(plan["teacher"]["parameters"], 405_853_388_800_u64);
    let score = &plan["score"]["recommended"];
    let stages = score["stages"].as_array().unwrap();
    assert_eq!((stages.len(), score["speed"]["hops"].as_array().unwrap().len()), (16, 15));
    let weights: u64 = stages.iter().map(|stage| stage["weight_bytes"].as_u64().unwrap()).sum();
    assert_eq!(weights, plan["teacher"]["weight_bytes"].as_u64().unwrap());
    assert!(plan["generate"]["recommended"]["speed"]["decode_tokens_per_second"].as_f64().unwrap() > 0.0);
}

#[test]
fn a_teacher_is_a_name_a_folder_or_a_config() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    let config = r#"{"architectures":["LlamaForCausalLM"],"hidden_size":4096,"intermediate_size":14336,
        "num_hidden_layers":32,"num_attention_heads":32,"num_key_value_heads":8,"vocab_size":128256,
        "max_position_embeddings":8192,"rms_norm_eps":1e-5,"rope_theta":500000.0}"#;
    std::fs::write(&path, config).unwrap();
    let figures = |teacher: &str| {
        let text = stdout(&plan(&["--teacher", teacher, "--gpus", "1", "--json"]));
        let mut plan: Value = serde_json::from_str(&text).unwrap();
        plan["teacher"]["name"].take();
        plan
    };
    let known = figures("llama-3-8b");
    assert_eq!(figures(&folder.path().display().to_string()), known);
    assert_eq!(figures(&path.display().to_string()), known);

    std::fs::write(&path, "{").unwrap();
    refused(&["--teacher", &path.display().to_string()], "error[model-malformed]");
    refused(&["--teacher", "/no/such/config.json"], "error[file-not-found]");
}

#[test]
fn tokens_stand_for_rows() {
    let rows = |more: &[&str]| {
        let text = stdout(&plan(&[&["--teacher", "llama-3-8b", "--json", "--new-tokens", "300"], more].concat()));
        serde_json::from_str::<Value>(&text).unwrap()["work"]["rows"].as_u64().unwrap()
    };
    assert_eq!(rows(&["--tokens", "1000"]), 4);
    assert_eq!(rows(&["--rows", "7"]), 7);
}

#[test]
fn what_makes_no_plan_is_refused() {
    refused(&["--teacher", "llama-3-8b", "--nodes", "0"], "error[spec-invalid]: --nodes is 0; it must be 1 to 1024");
    refused(&["--teacher", "llama-3-8b", "--gpu-memory", "80"], "--gpu-memory (bytes) is 80");
    refused(&["--teacher", "llama-3-8b", "--gpu-memory", "much"], "write a number and a unit, such as 80GiB");
    refused(&["--teacher", "llama-3-8b", "--gpu", "h1000"], "take one of a100-40g, a100-80g, h100-sxm");
    refused(&["--teacher", "llama-3-8b", "--tflops", "nan"], "--tflops (operations a second) is NaN");
    refused(&["--teacher", "llama-3-8b", "--prompt-tokens", "8000"], "the context of llama-3-8b is 8192");
    refused(&["--teacher", "lama-3-8b"], "error[spec-invalid]: --teacher \"lama-3-8b\" is neither a known teacher");
    refused(&["--teacher", "lama-3-8b"], "nearest are llama-3-8b, ");
}
