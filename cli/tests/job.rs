//! `retort job` and `retort model` against an orchestrator that tells a story.

#![allow(clippy::unwrap_used)] // helpers of tests unwrap as tests do

#[path = "support/orchestrator.rs"]
mod orchestrator;

use std::process::{Command, Output, Stdio};

use orchestrator::{EVENTS, Fake};
use serde_json::Value;

const UUID: &str = "5f0c2ad4-30b4-4c0e-9d4e-8c4c1b1b0e7f";
const JOB: &str = "jobs/00000000000000000000000000000001";

struct Scene {
    folder: tempfile::TempDir,
    address: String,
    _runtime: tokio::runtime::Runtime,
}

impl Scene {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let fake = Fake { notes: folder.path().to_owned(), store: folder.path().join("store") };
        runtime.spawn(async move { fake.serve(&port.to_string()).await });
        while std::net::TcpStream::connect(port).is_err() {
            std::thread::yield_now();
        }
        let spec = "name: support\nprompts: { path: p.jsonl }\nteacher: { model: t }\nstudent: { init: { prune: { layers: 2 } } }\n";
        std::fs::write(folder.path().join("job.yaml"), spec).unwrap();
        Self { folder, address: format!("http://{port}"), _runtime: runtime }
    }

    fn retort(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_retort"))
            .args(args)
            .env("RETORT_ADDRESS", &self.address)
            .env("RETORT_HOME", self.folder.path().join("home"))
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    fn text(&self, args: &[&str]) -> String {
        let output = self.retort(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.text(&[args, &["--json"]].concat())).unwrap()
    }

    fn create(&self) -> String {
        let spec = self.folder.path().join("job.yaml").display().to_string();
        self.text(&["job", "create", &spec])
    }
}

#[test]
fn create_is_safe_to_repeat_and_validate_only_creates_nothing() {
    let scene = Scene::new();
    let spec = scene.folder.path().join("job.yaml").display().to_string();
    let text = scene.text(&["job", "create", &spec, "--validate-only"]);
    assert!(text.starts_with("the spec is valid\n  rows "), "{text}");
    assert!(text.contains("48 for training, 16 held out"), "{text}");
    assert!(text.contains("\n  micro-batches    512 tokens, as the spec says\n"), "{text}");
    let planned = scene.json(&["job", "create", &spec, "--validate-only"]);
    assert_eq!(planned["plan"]["training"]["micro_batch_tokens"], 512);
    assert!(!scene.folder.path().join("requests").exists());
    let first = scene.json(&["job", "create", &spec, "--request-id", UUID]);
    let second = scene.json(&["job", "create", &spec, "--request-id", UUID]);
    assert_eq!((&first["name"], &second["name"]), (&JOB.into(), &JOB.into()));
    let wrong = scene.retort(&["job", "create", &spec, "--request-id", "mine"]);
    assert_eq!(wrong.status.code(), Some(2));
}

#[test]
fn list_turns_the_pages() {
    let scene = Scene::new();
    assert_eq!(scene.text(&["job", "list"]), "no jobs\n");
    for _ in 0..5 {
        scene.create();
    }
    assert_eq!(scene.json(&["job", "list"])["jobs"].as_array().unwrap().len(), 5);
    assert_eq!(scene.json(&["job", "list", "--limit", "3"])["jobs"].as_array().unwrap().len(), 3);
    let text = scene.text(&["job", "list", "--limit", "1"]);
    let expected = format!(
        "JOB                                    NAME     STATE    SHARDS  STEPS  KL  CREATED\n\
         {JOB}  support  running     4/4    8/8   -  2027-01-15 08:00:00Z\n"
    );
    assert_eq!(text, expected);
}

#[test]
fn watch_follows_to_the_end_and_get_shows_the_report() {
    let scene = Scene::new();
    scene.create();
    let text = scene.text(&["job", "watch", JOB, "--plain"]);
    assert!(text.contains("train     step 4 of 8"), "{text}");
    assert!(text.contains("SUCCEEDED"), "{text}");
    let output = scene.retort(&["job", "watch", JOB]);
    let lines: Vec<Value> =
        String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len() as u64, EVENTS + 1);
    assert_eq!(lines[1]["event"]["kind"], "shard_published");
    assert_eq!(lines[3]["progress"]["eta_seconds"], 10.0);
    assert_eq!(lines[EVENTS as usize]["job"]["report"]["after"]["kl"], 1.0);
    let text = scene.text(&["job", "get", JOB.strip_prefix("jobs/").unwrap()]);
    assert!(text.contains("KL to the teacher, nats/token  4.0000  1.0000"), "{text}");
    assert_eq!(scene.json(&["job", "get", JOB])["state"], "succeeded");
}

#[test]
fn cancel_and_delete() {
    let scene = Scene::new();
    scene.create();
    assert_eq!(scene.text(&["job", "cancel", JOB]), format!("{JOB} is cancelled\n"));
    let asked = scene.retort(&["job", "delete", JOB]);
    assert_eq!(asked.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&asked.stderr).contains("--yes"));
    assert!(!scene.folder.path().join("deleted").exists());
    assert_eq!(scene.json(&["job", "delete", JOB, "--yes"])["deleted"], JOB);
}

#[test]
fn models_are_listed_exported_and_looked_for() {
    let scene = Scene::new();
    assert!(scene.text(&["model", "list"]).contains("support@1  1.000  50.0 %  jobs/j"));
    scene.create();
    scene.text(&["job", "watch", JOB, "--plain"]);
    let store = scene.folder.path().join("store").display().to_string();
    let out = scene.folder.path().join("out").display().to_string();
    let exported = scene.json(&["model", "export", "support", "--store", &store, "--out", &out]);
    assert_eq!((&exported["version"], &exported["files"]), (&1.into(), &1.into()));
    let missing = scene.retort(&["model", "export", "other", "--store", &store, "--out", &out]);
    assert!(String::from_utf8_lossy(&missing.stderr).starts_with("error[model-not-found]: "));
}

#[test]
fn what_is_not_there_is_named() {
    let scene = Scene::new();
    let check = |args: &[&str], code: &str, status: i32| {
        let output = scene.retort(args);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(stderr.starts_with(&format!("error[{code}]: ")), "{args:?}: {stderr}");
        assert_eq!(output.status.code(), Some(status), "{args:?}");
    };
    check(&["job", "get", JOB], "job-not-found", 1);
    check(&["job", "get", "nonsense"], "request-invalid", 2);
    check(&["job", "get", JOB, "--address", "127.0.0.1:1"], "orchestrator-unavailable", 1);
    check(&["shard", "show", "/no/such/file"], "file-not-found", 2);
    check(&["model", "import", "/no/such/file", "--out", "/no/out"], "file-not-found", 2);
    check(&["model", "chat", "./nowhere", "--programs", "/bin"], "program-missing", 1);
    let spec = scene.folder.path().join("job.yaml");
    check(&["shard", "show", &spec.display().to_string()], "shard-corrupt", 1);
}
