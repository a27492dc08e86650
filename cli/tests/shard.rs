//! `retort shard` on the golden shard, as a user types it.

#![allow(clippy::unwrap_used)] // helpers of tests unwrap as tests do

use std::{
    ffi::OsStr,
    fs,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use retort_artifact::soft_targets::{Header, Position, SCHEMA_VERSION, Sequence, TailLogprobs, encode};
use retort_core::spec::{Codec, SoftTargets};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

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
    let (code, _, stderr) = retort(&["shard", "verify", "/no/such/file"]);
    assert!(code == 2 && stderr.contains("error[file-not-found]: /no/such/file: no such file or folder"), "{stderr}");
    let empty = tempfile::tempdir().unwrap();
    let (code, _, stderr) = retort(&["shard", "verify", empty.path().to_str().unwrap()]);
    assert!(code == 2 && stderr.contains("no *.parquet lies below it"), "{stderr}");
}

#[test]
fn what_a_name_or_a_shard_says_moves_no_cursor() {
    let folder = tempfile::tempdir().unwrap();
    let shard = write_shard(&folder.path().join("wide.parquet"), 1, 65, &[sequence(0, 1, 0.8, 3)]);
    let odd = folder.path().join("odd\u{1b}[2J\nerror[internal]: \u{202e}.parquet");
    fs::write(&odd, "no shard").unwrap();
    let shown = r"odd\u{1b}[2J\nerror[internal]: \u{202e}.parquet: ";
    let (code, stdout, _) = retort(&["shard", "verify", odd.to_str().unwrap()]);
    assert!(code == 1 && stdout.contains(shown) && stdout.lines().count() == 1, "{stdout}");
    let (code, _, stderr) = retort(&["shard", "diff", &shard, odd.to_str().unwrap()]);
    assert!(code == 2 && stderr.contains(shown) && stderr.lines().count() == 1, "{stderr}");
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

/// A teacher's answer of as many tokens, to line `row` of the prompt set: id 7 with probability
/// `top` at each position, 9 with 0.1, and the rest of the mass drawn at `tail`.
fn sequence(row: u64, tokens: usize, top: f32, tail: u32) -> Sequence {
    let position = Position {
        head: vec![(7, top.ln()), (9, 0.1f32.ln())],
        tail: vec![(tail, 2, -9.0)],
        label_logprob: top.ln(),
        log_sum_exps: vec![],
    };
    Sequence {
        row_id: format!("row-{row}"),
        row,
        tags: vec![],
        token_ids: vec![7; tokens + 1],
        target_mask: (0..=tokens).map(|i| i > 0).collect(),
        finish_reason: "length".to_owned(),
        positions: vec![position; tokens],
    }
}

fn header(epoch: u64, vocab_size: u32) -> Header {
    Header {
        schema_version: SCHEMA_VERSION,
        job: "j".to_owned(),
        shard: 0,
        epoch,
        work_sha256: "ee".repeat(32),
        split: "train".to_owned(),
        engine: "native".to_owned(),
        engine_version: "0.1.0".to_owned(),
        dtype: "f32".to_owned(),
        teacher_sha256: "aa".repeat(32),
        tokenizer_sha256: "bb".repeat(32),
        chat_template_sha256: "cc".repeat(32),
        vocab_size,
        soft_targets: SoftTargets::of(Codec::HeadDraws { head: 2, draws: 2 }),
        tail_logprobs: TailLogprobs::Stored,
        seed: 7,
        prompt_set_sha256: "dd".repeat(32),
        mode: "generate".to_owned(),
        sampling_json: "{}".to_owned(),
    }
}

fn write_shard(path: &Path, epoch: u64, vocab_size: u32, sequences: &[Sequence]) -> String {
    write(path, &header(epoch, vocab_size), sequences)
}

fn write(path: &Path, header: &Header, sequences: &[Sequence]) -> String {
    fs::write(path, encode(header, sequences).unwrap().bytes).unwrap();
    path.display().to_string()
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn diff_is_0_for_the_same_1_for_different_and_2_for_neither() {
    let (_folder, sound, damaged) = folder();
    let (code, stdout, _) = retort(&["shard", "diff", &sound, &sound]);
    assert_eq!(code, 0);
    assert!(stdout.contains("4 positions compared: top differs at 0"), "{stdout}");
    assert!(stdout.ends_with("the soft targets are the same\n"), "{stdout}");
    let (code, stdout, stderr) = retort(&["--json", "shard", "diff", &sound, &damaged]);
    assert!(code == 2 && stderr.contains(&damaged), "{stderr}");
    let said: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(said["code"], "shard-corrupt", "{stdout}");
    assert_eq!(retort(&["shard", "diff", &sound, "/no/such/file"]).0, 2);
}

#[test]
fn diff_measures_how_far_the_distributions_lie_apart() {
    let folder = tempfile::tempdir().unwrap();
    let rows = |last: [Sequence; 2]| [vec![sequence(0, 2, 0.8, 3)], last.into()].concat();
    let one =
        write_shard(&folder.path().join("one.parquet"), 1, 64, &rows([sequence(1, 2, 0.8, 3), sequence(2, 2, 0.8, 3)]));
    // Another attempt at the same: only the metadata differs.
    let again = write_shard(
        &folder.path().join("again.parquet"),
        2,
        64,
        &rows([sequence(1, 2, 0.8, 3), sequence(2, 2, 0.8, 3)]),
    );
    let (code, stdout, _) = retort(&["--json", "shard", "diff", &one, &again]);
    let found: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((code, &found["same"]), (0, &json!(true)), "{stdout}");
    assert_eq!(found["metadata"], json!({ "epoch": [1, 2] }));

    // The second target of row 1 moves 0.2 from 7 to a tail at 5; row 2 is missing, row 3 new.
    let mut moved = sequence(1, 2, 0.8, 3);
    moved.positions[1] = sequence(1, 1, 0.6, 5).positions.remove(0);
    let two = write_shard(&folder.path().join("two.parquet"), 1, 64, &rows([moved, sequence(3, 2, 0.8, 3)]));
    let (code, stdout, _) = retort(&["--json", "shard", "diff", &one, &two]);
    let found: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((code, &found["same"]), (1, &json!(false)), "{stdout}");
    assert_eq!((&found["only_in_a"], &found["only_in_b"]), (&json!(["row-2"]), &json!(["row-3"])));
    assert_eq!((&found["positions"], &found["other_top"]), (&json!(4), &json!(0)));
    // 7 loses 0.2 and 3 its tail's 0.1; 5 takes the tail of 0.3.
    let close = |key: &str, expected: f64| {
        let value = found[key].as_f64().unwrap();
        // A tail's mass and a label's log-probability are stored with eight bits.
        assert!((value - expected).abs() < expected / 100.0, "{key} is {value}, not {expected}");
    };
    close("max_total_variation", 0.3);
    close("mean_total_variation", 0.3 / 4.0);
    close("max_label_difference", (0.8f64 / 0.6).ln());
    close("mean_label_difference", (0.8f64 / 0.6).ln() / 4.0);
    assert!(found["max_logprob_difference"].as_f64().unwrap() >= (0.8f64 / 0.6).ln() - 5e-3);
    assert_eq!((&found["shared_entries"], &found["entries_only_in_b"]), (&json!(11), &json!(1)));
    let worst = found["worst"].as_array().unwrap();
    assert_eq!(worst.len(), 1);
    assert_eq!(
        (&worst[0]["row_id"], &worst[0]["position"], &worst[0]["token"]),
        (&json!("row-1"), &json!(1), &json!(7))
    );
    let (code, stdout, _) = retort(&["shard", "diff", &one, &two]);
    assert!(code == 1 && stdout.ends_with("the soft targets differ\n"), "{stdout}");
    assert!(stdout.contains("only in a: 1 rows, row-2") && stdout.contains("row-1         1"), "{stdout}");

    // Tokens, tags and what ended a row count as well.
    let mut described = sequence(2, 2, 0.8, 3);
    described.finish_reason = "stop".to_owned();
    let mut worded = sequence(1, 2, 0.8, 3);
    worded.token_ids[2] = 8;
    let three = write_shard(&folder.path().join("three.parquet"), 1, 64, &rows([worded, described]));
    let (code, stdout, _) = retort(&["--json", "shard", "diff", &one, &three]);
    let found: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(code, 1);
    assert_eq!((&found["other_tokens"], &found["other_description"]), (&json!(["row-1"]), &json!(["row-2"])));
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
    assert_eq!(first["token_ids"], json!([1, 40, 17, 9, 2]));
    assert_eq!(first["targets"][0]["ids"], json!([3, 8, 9, 17, 40, 55]));
    let mass: f64 = first["targets"][0]["mass"].as_array().unwrap().iter().map(|mass| mass.as_f64().unwrap()).sum();
    assert!((mass - 1.0).abs() < 1e-3, "{mass}");
    for format in ["jsonl", "npz", "top-k"] {
        let (code, _, stderr) = retort(&[&args[..], &["--format", format]].concat());
        assert!(code == 1 && stderr.contains("error[object-exists]"), "{stderr}");
        assert_eq!(fs::read_to_string(&out).unwrap(), text);
    }
    for stream in ["-", "/dev/stdout"] {
        let (code, stdout, stderr) = retort(&["shard", "export", &sound, "--out", stream]);
        assert_eq!((code, &stdout), (0, &text), "{stderr}");
    }
    let (code, stdout, _) = retort(&[&args[..], &["--json", "--force", "--rows", "13.."]].concat());
    let said: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(code, 0);
    let expected = json!({
        "path": out, "format": "jsonl", "files": 1, "sequences": 1, "target_tokens": 1,
        "bytes": fs::metadata(&out).unwrap().len(),
    });
    assert_eq!(said, expected);
    assert_eq!(fs::read_to_string(&out).unwrap(), text.lines().nth(1).unwrap().to_owned() + "\n");
    // A name that is no Unicode is written to, and told as well as JSON can.
    let odd = folder.path().join(OsStr::from_bytes(b"odd-\xff.jsonl"));
    let export = ["--json", "shard", "export", &sound, "--out"];
    let output = Command::new(env!("CARGO_BIN_EXE_retort")).args(export).arg(&odd).output().unwrap();
    assert!(output.status.success() && odd.exists(), "{output:?}");
    assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap()["path"], odd.display().to_string());
}

#[test]
fn export_keeps_what_other_temperatures_need() {
    let shard = golden_file("soft-targets-v2-head-draws.parquet").display().to_string();
    let (code, stdout, stderr) = retort(&["shard", "export", &shard, "--out", "-"]);
    assert_eq!(code, 0, "{stderr}");
    let first: Value = serde_json::from_str(stdout.lines().next().unwrap()).unwrap();
    assert_eq!(first["temperatures"], json!([0.5, 2.0]));
    assert_eq!(first["targets"][1]["log_sum_exps"], json!([-1.5, 1.5]));

    let (folder, sound, _) = folder();
    let (code, stdout, _) = retort(&["shard", "export", &sound, "--out", "-"]);
    assert!(code == 0 && !stdout.contains("temperatures") && !stdout.contains("log_sum_exps"), "{stdout}");
    let out = folder.path().join("out").display().to_string();
    let (code, _, stderr) = retort(&["shard", "export", &sound, &shard, "--format", "npz", "--out", &out]);
    assert!(code == 2 && stderr.contains("for the temperatures [0.5, 2.0], those before it for []"), "{stderr}");
}

/// What judges a student is no training data unless somebody says so.
#[test]
fn an_export_of_both_splits_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    for (name, split) in [("1.parquet", "train"), ("2.parquet", "held_out")] {
        let soft_targets = SoftTargets::of(Codec::Threshold { threshold: 0.0625 });
        let tail_logprobs = TailLogprobs::Mean(0.0);
        let header = Header { split: split.to_owned(), soft_targets, tail_logprobs, ..header(1, 65) };
        let mut sequence = sequence(0, 1, 0.8, 3);
        sequence.positions[0].tail = vec![(3, 1, -9.0)];
        write(&folder.path().join(name), &header, &[sequence]);
    }
    let shards = folder.path().display().to_string();
    let export = ["shard", "export", &shards, "--out", "-"];
    let (code, stdout, stderr) = retort(&export);
    assert!(code == 2 && stdout.is_empty() && stderr.contains("--split train, held_out or all"), "{stderr}");
    for (split, expected) in [("train", &["train"][..]), ("held_out", &["held_out"]), ("all", &["train", "held_out"])] {
        let (code, stdout, stderr) = retort(&[&export[..], &["--split", split]].concat());
        assert_eq!(code, 0, "{stderr}");
        let lines: Vec<Value> = stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let splits: Vec<&str> = lines.iter().map(|line| line["split"].as_str().unwrap()).collect();
        assert_eq!(splits, expected);
        // The head's log-probability is known, a sample's is not.
        assert_eq!(lines[0]["targets"][0]["logprobs"].as_array().unwrap().iter().filter(|l| l.is_null()).count(), 1);
    }
}

#[test]
fn npz_and_top_k_are_what_their_golden_files_are() {
    let (folder, sound, _) = folder();
    for (format, golden, options) in [("npz", "export.npz", &[][..]), ("top-k", "export-top-k.parquet", &["--k", "3"])]
    {
        let out = folder.path().join(golden);
        let args = ["--json", "shard", "export", &sound, "--format", format, "--out", out.to_str().unwrap()];
        let (code, stdout, stderr) = retort(&[&args[..], options].concat());
        assert_eq!(code, 0, "{stderr}");
        let said: Value = serde_json::from_str(&stdout).unwrap();
        assert_eq!((&said["format"], &said["target_tokens"]), (&json!(format), &json!(4)));
        let (written, golden) = (fs::read(&out).unwrap(), fs::read(golden_file(golden)).unwrap());
        // Byte for byte but for what compressors make of it.
        let same = written.len().abs_diff(golden.len()) < 64 && written[..4] == golden[..4];
        assert!(same, "{format}: {} bytes, {} in the golden file", written.len(), golden.len());
    }
    assert_eq!(names(folder.path()), ["export-top-k.parquet", "export.npz", "shards"]);
}

fn golden_file(name: &str) -> PathBuf {
    golden().with_file_name(name)
}

#[test]
fn an_export_that_cannot_be_says_so_and_leaves_nothing() {
    let (folder, sound, damaged) = folder();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let other = write_shard(&folder.path().join("shards/other.parquet"), 1, 65, &[sequence(0, 1, 0.8, 3)]);
    let (out, inside) = (at("out"), at("missing/out"));
    let link = at("shards/link");
    std::os::unix::fs::symlink(&out, &link).unwrap();
    let cases: [(&[&str], i32, &str); 14] = [
        (&[&sound, "--out", &out, "--k", "3"], 2, "--k goes with --format top-k, not jsonl"),
        (&[&sound, "--out", &out, "--format", "top-k", "--dtype", "f16"], 2, "--dtype goes with --format npz"),
        (&[&sound, "--out", &out, "--format", "top-k", "--k", "0"], 2, "--k"),
        (&[&sound, "--out", "-", "--format", "npz"], 2, "only jsonl can be streamed"),
        (&[&sound, "--out", &out, "--rows", "5..9"], 2, "no row of the shards lies in --rows"),
        (&[&sound, "--out", &out, "--rows", "9..5"], 2, "A must be smaller than B"),
        (&[&sound, "--out", &out, "--format", "npz", "--rows", "0..9"], 2, "no row of the shards lies in --rows"),
        (&[&sound, "--out", &out, "--format", "npz", "--max-bytes", "1278"], 2, "would take 1.3 kB once loaded"),
        (&[&sound, "--out", &inside], 2, "file-not-found"),
        (&[&sound, "--out", &link, "--force"], 1, "is a link"),
        (&[&sound, "--out", &at("shards"), "--force"], 1, "is a folder"),
        (&[&sound, "--out", &sound, "--force", "--format", "top-k"], 1, "is one of the files to export"),
        (&[&sound, &damaged, "--out", &out, "--format", "npz"], 1, "error[shard-corrupt]"),
        (&[&sound, &other, "--out", &out, "--format", "top-k"], 2, "retort.vocab_size 65, those before it 64"),
    ];
    for (args, expected, why) in cases {
        let (code, _, stderr) = retort(&[&["shard", "export"], args].concat());
        assert!(code == expected && stderr.contains(why), "{args:?}: {code} {stderr}");
        assert_eq!(names(folder.path()), ["shards"], "{args:?}");
    }
    let fits = ["shard", "export", &sound, "--out", &out, "--format", "npz", "--max-bytes", "1279"];
    assert_eq!(retort(&fits).0, 0);
    assert_eq!(retort(&["shard", "verify", &sound]).0, 0);
}

/// An export that takes long, once it has begun to write. It has 40 GB of zeros to pack.
fn long_export(shard: &str, out: &Path) -> Child {
    let child = Command::new(env!("CARGO_BIN_EXE_retort"))
        .args(["shard", "export", shard, "--format", "npz", "--max-bytes", "1000000000000", "--out"])
        .arg(out)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let folder = out.parent().unwrap();
    let began = || {
        names(folder).iter().any(|name| {
            name.starts_with(".retort-unfinished-")
                && fs::metadata(folder.join(name)).is_ok_and(|metadata| metadata.len() > 0)
        })
    };
    let start = Instant::now();
    while !began() {
        assert!(start.elapsed() < Duration::from_secs(60), "nothing was written in a minute");
        std::thread::sleep(Duration::from_millis(5));
    }
    child
}

#[test]
fn a_stopped_export_leaves_nothing_and_a_killed_one_no_half_file() {
    let folder = tempfile::tempdir().unwrap();
    let rows: Vec<Sequence> = (0..1000).map(|row| sequence(row, 10, 0.8, 3)).collect();
    let shard = write_shard(&folder.path().join("wide.parquet"), 1, 1_000_000, &rows);
    let out = folder.path().join("wide.npz");
    let signal = |child: &Child, signal| kill_process(Pid::from_child(child), signal).unwrap();

    let mut child = long_export(&shard, &out);
    signal(&child, Signal::INT);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(names(folder.path()), ["wide.parquet"]);

    let mut child = long_export(&shard, &out);
    signal(&child, Signal::KILL);
    assert_eq!(child.wait().unwrap().code(), None);
    let left = names(folder.path());
    assert!(left.len() == 2 && !left.contains(&"wide.npz".to_owned()), "{left:?}");

    // The next one clears away what the dead one left.
    let (code, _, stderr) = retort(&["shard", "export", &shard, "--rows", "0..1", "--out", out.to_str().unwrap()]);
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(names(folder.path()), ["wide.npz", "wide.parquet"]);
}
