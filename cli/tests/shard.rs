//! `retort shard` on the golden shard, as a user types it.

#![allow(clippy::unwrap_used)] // helpers of tests unwrap as tests do

use std::{fs, path::PathBuf, process::Command};

use serde_json::Value;

fn golden() -> PathBuf {
    PathBuf::from("../crates/artifact/tests/golden/soft-targets-v1.parquet")
}

/// Exit code, standard output and standard error.
fn retort(args: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_retort")).args(args).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

/// A folder with the golden shard, whole and damaged.
fn folder() -> (tempfile::TempDir, String, String) {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir_all(folder.path().join("shards/00000")).unwrap();
    let (sound, damaged) = (folder.path().join("shards/00000/1.parquet"), folder.path().join("shards/damaged.parquet"));
    let mut bytes = fs::read(golden()).unwrap();
    fs::write(&sound, &bytes).unwrap();
    bytes[40] ^= 1;
    fs::write(&damaged, bytes).unwrap();
    (folder, sound.display().to_string(), damaged.display().to_string())
}

#[test]
fn verify_names_each_file_that_is_not_sound() {
    let (folder, sound, damaged) = folder();
    let (code, stdout, _) = retort(&["shard", "verify", &sound]);
    assert_eq!((code, stdout.as_str()), (0, "1 shards are sound: 4 target tokens\n"));
    let (code, stdout, stderr) = retort(&["shard", "verify", folder.path().to_str().unwrap()]);
    assert_eq!(code, 1, "{stderr}");
    assert!(
        stdout.starts_with(&format!("shard-corrupt  {damaged}: the shard is corrupt: its content has sha256")),
        "{stdout}"
    );
    assert!(stderr.contains("error[shard-corrupt]: 1 of 2 shards are not sound"), "{stderr}");
    let (_, stdout, _) = retort(&["--json", "shard", "verify", &damaged, &sound]);
    let lines: Vec<Value> = stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((&lines[0]["sound"], &lines[1]["sound"]), (&Value::Bool(false), &Value::Bool(true)));
    assert_eq!(lines[0]["code"], "shard-corrupt");
    let (code, stdout, _) = retort(&["shard", "verify", "/no/such/file"]);
    assert!(code == 2 && stdout.starts_with("file-not-found  /no/such/file: "), "{stdout}");
    let empty = tempfile::tempdir().unwrap();
    let (code, _, stderr) = retort(&["shard", "verify", empty.path().to_str().unwrap()]);
    assert!(code == 2 && stderr.contains("no *.parquet lies below it"), "{stderr}");
}

#[test]
fn stats_sum_up_whole_folders() {
    let (folder, sound, damaged) = folder();
    fs::remove_file(damaged).unwrap();
    fs::copy(&sound, folder.path().join("shards/again.parquet")).unwrap();
    let (code, one, _) = retort(&["--json", "shard", "stats", &sound]);
    assert_eq!(code, 0);
    let (_, two, _) = retort(&["--json", "shard", "stats", folder.path().to_str().unwrap()]);
    let (one, two): (Value, Value) = (serde_json::from_str(&one).unwrap(), serde_json::from_str(&two).unwrap());
    for key in ["files", "bytes", "rows", "tokens", "target_tokens"] {
        assert_eq!(two[key].as_u64().unwrap(), 2 * one[key].as_u64().unwrap(), "{key}");
    }
    for key in ["bytes_per_token", "mean_support", "mean_tail_mass", "teacher_perplexity"] {
        let (one, two) = (one[key].as_f64().unwrap(), two[key].as_f64().unwrap());
        assert!((one - two).abs() < 1e-9 * one.abs(), "{key}: {one} {two}");
    }
    // exp((0.5 + 0.9 + 0.002 + 0.00001) / 4)
    assert!((one["teacher_perplexity"].as_f64().unwrap() - (1.40201f64 / 4.0).exp()).abs() < 1e-4, "{one}");
    let (_, text, _) = retort(&["shard", "stats", &sound]);
    assert!(text.contains(", 4 of them targets"), "{text}");
}

#[test]
fn diff_tells_equal_from_different() {
    let (_folder, sound, damaged) = folder();
    let (code, stdout, _) = retort(&["shard", "diff", &sound, &sound]);
    assert_eq!(code, 0);
    assert!(stdout.contains("4 positions compared: top differs at 0"), "{stdout}");
    assert!(stdout.ends_with("the soft targets are the same\n"), "{stdout}");
    let (code, _, stderr) = retort(&["shard", "diff", &sound, &damaged]);
    assert!(code == 1 && stderr.contains(&damaged), "{stderr}");
}

#[test]
fn export_writes_what_a_reader_sees_and_keeps_what_is_there() {
    let (folder, sound, _) = folder();
    let out = folder.path().join("all.jsonl");
    let args = ["shard", "export", &sound, "--out", out.to_str().unwrap()];
    let (code, _, stderr) = retort(&args);
    assert!(code == 0 && stderr.contains("2 sequences are in"), "{stderr}");
    let text = fs::read_to_string(&out).unwrap();
    let first: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    assert_eq!(first["token_ids"], serde_json::json!([1, 40, 17, 9, 2]));
    assert_eq!(first["targets"][0]["ids"], serde_json::json!([3, 8, 9, 17, 40, 55]));
    let mass: f64 = first["targets"][0]["mass"].as_array().unwrap().iter().map(|mass| mass.as_f64().unwrap()).sum();
    assert!((mass - 1.0).abs() < 1e-3, "{mass}");
    let (code, _, stderr) = retort(&args);
    assert!(code == 1 && stderr.contains("error[object-exists]"), "{stderr}");
    assert_eq!(fs::read_to_string(&out).unwrap(), text);
}
