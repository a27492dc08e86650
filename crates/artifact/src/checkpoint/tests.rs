use retort_core::spec::Keep;

use super::*;

struct Bench {
    folder: tempfile::TempDir,
    store: Store,
}

fn bench() -> Bench {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("store").to_str().unwrap()).unwrap();
    let model = folder.path().join("out/model");
    std::fs::create_dir_all(&model).unwrap();
    std::fs::create_dir_all(folder.path().join("out/state")).unwrap();
    std::fs::write(model.join("config.json"), b"{}").unwrap();
    std::fs::write(model.join("model.safetensors"), vec![7; 100_000]).unwrap();
    std::fs::write(folder.path().join("out/state/optimizer"), b"adam").unwrap();
    Bench { folder, store }
}

const TWO: Keep = Keep { last: 2, best: false };

impl Bench {
    async fn publish(&self, step: u32, epoch: u64) -> Result<Manifest> {
        self.publish_with(step, epoch, r#"{"learning_rate": 0.1, "consumed": [1, 2]}"#).await
    }

    /// Judged at this KL on so many tokens.
    async fn publish_judged(&self, step: u32, kl: f64, tokens: u64) {
        let judged = HeldOut { step, kl, tokens, ..HeldOut::default() };
        let extra = serde_json::json!({ HELD_OUT: judged }).to_string();
        self.publish_with(step, 1, &extra).await.unwrap();
    }

    async fn publish_with(&self, step: u32, epoch: u64, extra: &str) -> Result<Manifest> {
        let extra = serde_json::from_str(extra).unwrap();
        let manifest = Manifest {
            job: "j".to_owned(),
            step,
            epoch,
            spec_sha256: "ab".to_owned(),
            target_tokens: 99,
            extra,
            ..Manifest::default()
        };
        publish(&self.store, &paths::checkpoint("j", step, epoch), &self.folder.path().join("out"), manifest).await
    }

    fn at(&self, key: &str) -> PathBuf {
        self.store.root().join(key)
    }
}

/// A student that found none would begin anew.
#[tokio::test]
async fn a_store_that_is_away_has_no_say_in_what_checkpoints_there_are() {
    let bench = bench();
    let written = bench.publish(20, 3).await.unwrap();
    let (aside, prefix) = (bench.folder.path().join("aside"), paths::checkpoint("j", 20, 3));
    std::fs::rename(bench.store.root(), &aside).unwrap();
    let said = [
        latest(&bench.store, "j").await.map(drop).unwrap_err(),
        best(&bench.store, "j").await.map(drop).unwrap_err(),
        prune(&bench.store, "j", TWO).await.map(drop).unwrap_err(),
        verify(&bench.store, &prefix, &written, "").await.unwrap_err(),
        fetch(&bench.store, &prefix, &bench.folder.path().join("back")).await.map(drop).unwrap_err(),
        bench.publish(40, 3).await.map(drop).unwrap_err(),
    ];
    for error in said {
        assert_eq!(error.code, Code::StoreUnavailable, "{}", error.message);
    }
    std::fs::rename(&aside, bench.store.root()).unwrap();
    assert_eq!(latest(&bench.store, "j").await.unwrap(), Some((prefix, written)));
}

#[tokio::test]
async fn a_checkpoint_comes_back_whole() {
    let bench = bench();
    let written = bench.publish(20, 3).await.unwrap();
    let names: Vec<&str> = written.files.iter().map(|file| file.path.as_str()).collect();
    assert_eq!(names, ["model/config.json", "model/model.safetensors", "state/optimizer"]);
    assert_eq!((written.schema_version, written.files[1].bytes), (2, 100_000));
    let into = bench.folder.path().join("in");
    let read = fetch(&bench.store, &paths::checkpoint("j", 20, 3), &into).await.unwrap();
    assert_eq!(read, written);
    assert_eq!(read.extra["consumed"][1], 2);
    assert_eq!(std::fs::read(into.join("model/model.safetensors")).unwrap(), vec![7; 100_000]);
    assert_eq!(bench.publish(20, 3).await.unwrap_err().code, Code::ObjectExists);
}

#[tokio::test]
async fn a_broken_upload_is_finished_but_never_mixed() {
    let bench = bench();
    let prefix = paths::checkpoint("j", 20, 3);
    bench.store.put_new(&format!("{prefix}model/config.json"), "{}".into()).await.unwrap();
    bench.publish(20, 3).await.unwrap();
    // A file of the same name and another content is not ours.
    let prefix = paths::checkpoint("j", 21, 3);
    bench.store.put_new(&format!("{prefix}model/config.json"), "[]".into()).await.unwrap();
    assert_eq!(bench.publish(21, 3).await.unwrap_err().code, Code::ObjectExists);
    assert!(!bench.store.exists(&paths::manifest(&prefix)).await.unwrap());
}

#[tokio::test]
async fn a_folder_that_is_handed_over_is_gone_and_stands_in_the_store() {
    let bench = bench();
    let out = bench.folder.path().join("out");
    // What is there already is another's: the folder stays as it was.
    let taken = paths::checkpoint("j", 20, 3);
    bench.store.put_new(&format!("{taken}state/optimizer"), "sgd".into()).await.unwrap();
    let manifest = || Manifest { job: "j".to_owned(), ..Manifest::default() };
    assert_eq!(hand_over(&bench.store, &taken, &out, manifest()).await.unwrap_err().code, Code::ObjectExists);
    let prefix = paths::checkpoint("j", 21, 3);
    let written = hand_over(&bench.store, &prefix, &out, manifest()).await.unwrap();
    assert!(!out.exists());
    let into = bench.folder.path().join("in");
    assert_eq!(fetch(&bench.store, &prefix, &into).await.unwrap(), written);
    assert_eq!(written.files.len(), 3);
    assert_eq!(std::fs::read(into.join("model/model.safetensors")).unwrap(), vec![7; 100_000]);
}

#[tokio::test]
async fn damage_is_found_and_named() {
    let bench = bench();
    bench.publish(20, 3).await.unwrap();
    let prefix = paths::checkpoint("j", 20, 3);
    let key = format!("{prefix}model/model.safetensors");
    let into = bench.folder.path().join("in");
    let sound = manifest(&bench.store, &prefix).await.unwrap();
    verify(&bench.store, &prefix, &sound, "").await.unwrap();
    let mut bytes = vec![7; 100_000];
    bytes[5] = 8;
    std::fs::write(bench.at(&key), &bytes).unwrap();
    verify(&bench.store, &prefix, &sound, "state/").await.unwrap();
    let verified = async || verify(&bench.store, &prefix, &sound, "model/").await.unwrap_err().message;
    let error = fetch(&bench.store, &prefix, &into).await.unwrap_err();
    assert_eq!(verified().await, error.message);
    assert_eq!(error.code, Code::CheckpointCorrupt);
    assert!(error.message.starts_with(&format!("the checkpoint is corrupt: {key}: it has sha256 ")), "{error}");
    assert!(!into.join("model/model.safetensors").exists());
    std::fs::write(bench.at(&key), b"short").unwrap();
    let error = fetch(&bench.store, &prefix, &into).await.unwrap_err();
    assert_eq!(error.message, format!("the checkpoint is corrupt: {key}: it takes 5 bytes, the manifest says 100000"));
    assert_eq!(verified().await, error.message);
    std::fs::remove_file(bench.at(&key)).unwrap();
    let error = fetch(&bench.store, &prefix, &into).await.unwrap_err();
    assert_eq!(error.message, format!("the checkpoint is corrupt: {key}: it is missing"));
    assert_eq!(verified().await, error.message);
    assert_eq!(fetch(&bench.store, "jobs/j/none/", &into).await.unwrap_err().code, Code::ObjectNotFound);
}

#[tokio::test]
async fn a_manifest_of_the_first_version_is_read() {
    let bench = bench();
    let prefix = paths::checkpoint("j", 20, 3);
    let first = r#"{"schema_version":1,"job":"j","step":20,"epoch":3,"files":[],"spec_sha256":"","trained_tokens":77,
        "initial_key":"i/"}"#;
    bench.store.put_new(&paths::manifest(&prefix), first.into()).await.unwrap();
    let read = manifest(&bench.store, &prefix).await.unwrap();
    assert_eq!((read.target_tokens, read.extra.len()), (77, 1));
}

#[tokio::test]
async fn a_manifest_cannot_reach_outside_or_be_newer() {
    let bench = bench();
    let prefix = paths::checkpoint("j", 20, 3);
    let manifest = |path: &str, version: u32| {
        format!(
            r#"{{"schema_version":{version},"job":"j","step":20,"epoch":3,"spec_sha256":"","target_tokens":0,
                "files":[{{"path":{path:?},"bytes":1,"sha256":"x"}}]}}"#
        )
    };
    std::fs::create_dir_all(bench.at(&prefix)).unwrap();
    let into = bench.folder.path().join("in");
    for path in ["../x", "/etc/passwd", "a/../../b", "", "a//b", "a\\b", "."] {
        std::fs::write(bench.at(&paths::manifest(&prefix)), manifest(path, 2)).unwrap();
        let error = fetch(&bench.store, &prefix, &into).await.unwrap_err();
        assert_eq!(error.code, Code::CheckpointCorrupt, "{path}");
        assert!(error.message.contains("no path of its own inside the checkpoint"), "{error}");
    }
    std::fs::write(bench.at(&paths::manifest(&prefix)), manifest("a", 3)).unwrap();
    let error = fetch(&bench.store, &prefix, &into).await.unwrap_err();
    assert_eq!(error.code, Code::CheckpointMismatch);
    assert!(
        error.message.ends_with("it has schema version 3, this build reads up to 2; use a newer retort"),
        "{error}"
    );
    // To pass over what a newer build wrote would be to train it again.
    assert_eq!(latest(&bench.store, "j").await.unwrap_err().code, Code::CheckpointMismatch);
    std::fs::write(bench.at(&paths::manifest(&prefix)), "{").unwrap();
    assert_eq!(fetch(&bench.store, &prefix, &into).await.unwrap_err().code, Code::CheckpointCorrupt);
}

#[tokio::test]
async fn the_latest_is_the_highest_step_that_is_complete() {
    let bench = bench();
    assert_eq!(latest(&bench.store, "j").await.unwrap(), None);
    for (step, epoch) in [(20, 1), (100, 1), (100, 2), (40, 5)] {
        bench.publish(step, epoch).await.unwrap();
    }
    // An upload that was never finished, and another job's.
    bench.store.put_new(&format!("{}model/config.json", paths::checkpoint("j", 120, 2)), "{}".into()).await.unwrap();
    bench.store.put_new(&paths::manifest(&paths::checkpoint("k", 900, 1)), "{}".into()).await.unwrap();
    let (prefix, manifest) = latest(&bench.store, "j").await.unwrap().unwrap();
    assert_eq!((prefix.as_str(), manifest.step, manifest.epoch), ("jobs/j/checkpoints/000100-2/", 100, 2));
    // One that cannot be read is passed over.
    std::fs::write(bench.at(&paths::manifest(&prefix)), "{").unwrap();
    let (prefix, _) = latest(&bench.store, "j").await.unwrap().unwrap();
    assert_eq!(prefix, "jobs/j/checkpoints/000100-1/");
}

#[tokio::test]
async fn pruning_keeps_the_newest_and_what_is_still_going_up() {
    let bench = bench();
    assert_eq!(prune(&bench.store, "j", TWO).await.unwrap(), Vec::<String>::new());
    for step in [20, 40, 60, 80] {
        bench.publish(step, 1).await.unwrap();
    }
    for step in [30, 100] {
        let key = format!("{}model/config.json", paths::checkpoint("j", step, 1));
        bench.store.put_new(&key, "{}".into()).await.unwrap();
    }
    let removed = prune(&bench.store, "j", TWO).await.unwrap();
    let expected: Vec<String> = [20, 30, 40].into_iter().map(|step| paths::checkpoint("j", step, 1)).collect();
    assert_eq!(removed, expected);
    let left: BTreeSet<_> = bench
        .store
        .list("jobs/j/checkpoints/")
        .await
        .unwrap()
        .iter()
        .filter_map(|entry| paths::parse_checkpoint("j", &entry.key))
        .collect();
    assert_eq!(left, BTreeSet::from([(60, 1), (80, 1), (100, 1)]));
    assert_eq!(latest(&bench.store, "j").await.unwrap().unwrap().1.step, 80);
}

#[tokio::test]
async fn what_cannot_be_read_keeps_no_place_among_the_newest() {
    let bench = bench();
    bench.publish(1000, 1).await.unwrap();
    std::fs::write(bench.at(&paths::manifest(&paths::checkpoint("j", 1000, 1))), "{").unwrap();
    let one = Keep { last: 1, best: false };
    assert_eq!(prune(&bench.store, "j", one).await.unwrap(), Vec::<String>::new());
    for step in [20, 40] {
        bench.publish(step, 2).await.unwrap();
        prune(&bench.store, "j", one).await.unwrap();
        assert_eq!(latest(&bench.store, "j").await.unwrap().unwrap().1.step, step);
    }
    assert_eq!(steps(&bench).await, [40, 1000]);
}

/// Steps that are left.
async fn steps(bench: &Bench) -> Vec<u32> {
    complete(&bench.store, "j").await.unwrap().into_iter().map(|(step, _)| step).collect()
}

async fn best_step(bench: &Bench) -> Option<u32> {
    best(&bench.store, "j").await.unwrap().map(|(_, manifest)| manifest.step)
}

#[tokio::test]
async fn the_best_stays_beside_the_newest() {
    let bench = bench();
    let keep = Keep { last: 2, best: true };
    assert_eq!(best_step(&bench).await, None);
    for (step, kl, left) in [
        (20, 2.0, &[20][..]),
        (40, 1.0, &[20, 40]),
        (60, 1.5, &[40, 60]),
        (80, 1.25, &[40, 60, 80]),
        // As good as the best: the newer one stays, and is one of the newest anyway.
        (100, 1.0, &[80, 100]),
        (120, 3.0, &[100, 120]),
        // What has no number was not judged.
        (140, f64::NAN, &[100, 120, 140]),
    ] {
        bench.publish_judged(step, kl, 50).await;
        prune(&bench.store, "j", keep).await.unwrap();
        assert_eq!(steps(&bench).await, left, "after {step}");
        // Once more, as after a crash: nothing else goes.
        assert_eq!(prune(&bench.store, "j", keep).await.unwrap(), Vec::<String>::new());
    }
    prune(&bench.store, "j", Keep { last: 1, best: true }).await.unwrap();
    assert_eq!((steps(&bench).await, best_step(&bench).await), (vec![100, 140], Some(100)));
    prune(&bench.store, "j", Keep { last: 1, best: false }).await.unwrap();
    assert_eq!((steps(&bench).await, best_step(&bench).await), (vec![140], None));
}

#[tokio::test]
async fn a_smaller_sample_or_none_is_no_rival() {
    let bench = bench();
    bench.publish(10, 1).await.unwrap();
    assert_eq!(best_step(&bench).await, None);
    bench.publish_judged(20, 0.5, 30).await;
    assert_eq!(best_step(&bench).await, Some(20));
    // More held-out rows were published meanwhile: the figure before them says less.
    bench.publish_judged(40, 0.9, 50).await;
    bench.publish_judged(60, 0.95, 50).await;
    bench.publish(80, 1).await.unwrap();
    bench.publish_judged(100, 0.1, 0).await;
    bench.publish_with(120, 1, r#"{"held_out": {"kl": "low"}}"#).await.unwrap();
    assert_eq!(best_step(&bench).await, Some(40));
    // A manifest that is none counts for nothing.
    std::fs::write(bench.at(&paths::manifest(&paths::checkpoint("j", 40, 1))), "{").unwrap();
    assert_eq!(best_step(&bench).await, Some(60));
}
