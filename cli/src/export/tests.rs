use std::collections::HashMap;

use super::*;

async fn store_with(folder: &Path, files: &[(&str, &str)]) -> Store {
    let store = Store::open(&folder.display().to_string()).unwrap();
    for (key, text) in files {
        store.put_new(key, text.as_bytes().to_vec().into()).await.unwrap();
    }
    store
}

#[tokio::test]
async fn the_newest_version_or_the_one_named() {
    let folder = tempfile::tempdir().unwrap();
    let files = [("models/support/versions/000001.json", "{}"), ("models/support/versions/000012.json", "{}")];
    let store = store_with(folder.path(), &files).await;
    let newest = Source::resolve(&store, "support").await.unwrap();
    assert_eq!((newest.version, newest.key.as_str()), (Some(12), "models/support/000012/"));
    assert_eq!(Source::resolve(&store, "support@1").await.unwrap().key, "models/support/000001/");
    assert_eq!(Source::resolve(&store, "models/support/versions/1").await.unwrap().version, Some(1));
    let missing = Source::resolve(&store, "support@7").await.unwrap_err();
    assert_eq!(missing.code, Code::ModelNotFound);
    assert!(missing.message.contains("the newest is 12"), "{}", missing.message);
    assert_eq!(Source::resolve(&store, "other").await.unwrap_err().code, Code::ModelNotFound);
    for bad in ["", "../x", "a@b", "a@", "A", "a/b"] {
        assert_eq!(Source::resolve(&store, bad).await.unwrap_err().code, Code::RequestInvalid, "{bad:?}");
    }
}

#[tokio::test]
async fn exports_replace_their_own_kind_only() {
    let folder = tempfile::tempdir().unwrap();
    let files = [("models/a/000001/config.json", "{}"), ("models/a/000001/model.safetensors", "weights")];
    let store = store_with(&folder.path().join("store"), &files).await;
    let source = Source { name: "a".to_owned(), version: Some(1), key: "models/a/000001/".to_owned() };
    let out = folder.path().join("out/a");
    let exported = export(&store, &source, &out, false).await.unwrap();
    assert_eq!((exported.files, exported.bytes), (2, 9));
    assert_eq!(std::fs::read_to_string(out.join("model.safetensors")).unwrap(), "weights");
    export(&store, &source, &out, false).await.unwrap();

    let other = folder.path().join("other");
    std::fs::create_dir(&other).unwrap();
    std::fs::write(other.join("mine.txt"), "mine").unwrap();
    assert_eq!(export(&store, &source, &other, false).await.unwrap_err().code, Code::ObjectExists);
    assert!(other.join("mine.txt").exists());
    assert_eq!(export(&store, &source, &other.join("mine.txt"), false).await.unwrap_err().code, Code::ObjectExists);

    let empty = Source { key: "models/a/000009/".to_owned(), ..source };
    assert_eq!(export(&store, &empty, &folder.path().join("no"), false).await.unwrap_err().code, Code::ModelNotFound);
    assert!(!folder.path().join("no").exists());
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().contains("retort-export")), "{left:?}");
}

#[test]
fn a_place_that_cannot_be_written_to_is_told_before_there_is_anything_to_write() {
    let folder = tempfile::tempdir().unwrap();
    for out in ["a", "a/b/c"] {
        check_place(&folder.path().join(out)).unwrap();
    }
    assert_eq!(names(folder.path()), Vec::<String>::new());
    for out in ["/proc/x", "/proc/x/y"] {
        let error = check_place(Path::new(out)).unwrap_err();
        assert_eq!(error.code, Code::FileUnreadable);
        assert!(error.message.starts_with("/proc/x: no folder can be made there"), "{}", error.message);
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[tokio::test]
async fn files_that_no_export_wrote_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let files = [("models/a/000001/config.json", "{}"), ("models/a/000001/extra/old.json", "{}")];
    let store = store_with(&folder.path().join("store"), &files).await;
    let source = Source { name: "a".to_owned(), version: Some(1), key: "models/a/000001/".to_owned() };
    let out = folder.path().join("out");
    export(&store, &source, &out, false).await.unwrap();
    std::fs::write(out.join("extra/my-notes.txt"), "mine").unwrap();
    let error = export(&store, &source, &out, false).await.unwrap_err();
    assert_eq!(error.code, Code::ObjectExists);
    assert!(error.message.contains("extra/my-notes.txt"), "{}", error.message);
    check_target(&out, "a", true).unwrap();
    assert_eq!(std::fs::read_to_string(out.join("extra/my-notes.txt")).unwrap(), "mine");

    // A receipt of before files were listed.
    let unlisted = serde_json::to_string(&source).unwrap();
    std::fs::write(out.join("retort-export.json"), unlisted).unwrap();
    check_target(&out, "a", false).unwrap();

    // Another model's export is that model's.
    let other = Source { name: "b".to_owned(), version: Some(1), key: "models/a/000001/".to_owned() };
    let error = export(&store, &other, &out, false).await.unwrap_err();
    assert_eq!(error.code, Code::ObjectExists);
    assert!(error.message.contains("holds an export of a version 1; name another folder"), "{}", error.message);
    check_target(&out, "b", true).unwrap();

    // Force replaces an export, but no folder that never was one.
    store_with(&folder.path().join("store"), &[("models/a/000002/config.json", "new")]).await;
    let newer = Source { version: Some(2), key: "models/a/000002/".to_owned(), ..source };
    export(&store, &newer, &out, true).await.unwrap();
    assert_eq!(names(&out), ["config.json", "retort-export.json"]);
    assert_eq!(std::fs::read_to_string(out.join("config.json")).unwrap(), "new");
    let home = folder.path().join("home");
    std::fs::create_dir(&home).unwrap();
    std::fs::write(home.join("thesis.tex"), "mine").unwrap();
    assert_eq!(export(&store, &newer, &home, true).await.unwrap_err().code, Code::ObjectExists);
    assert_eq!(names(&home), ["thesis.tex"]);
}

#[tokio::test]
async fn what_a_killed_export_left_is_swept_and_what_a_living_one_holds_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let store = store_with(&folder.path().join("store"), &[("models/a/000001/config.json", "{}")]).await;
    let source = Source { name: "a".to_owned(), version: Some(1), key: "models/a/000001/".to_owned() };
    let beside = folder.path().join("exports");
    std::fs::create_dir_all(beside.join(".retort-export-dead/model")).unwrap();
    let living = Staging::beside(&beside.join("b")).unwrap();
    export(&store, &source, &beside.join("a"), false).await.unwrap();
    let held = living.folder().parent().unwrap().file_name().unwrap().to_string_lossy().into_owned();
    assert_eq!(names(&beside), [held, "a".to_owned()]);
    drop(living);
    assert_eq!(names(&beside), ["a"]);
}

#[tokio::test]
async fn an_export_that_cannot_take_its_place_leaves_the_earlier_one() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("config.json"), "old").unwrap();
    let staging = Staging::beside(&out).unwrap();
    std::fs::remove_dir(staging.folder()).unwrap();
    staging.replace(&out).unwrap_err();
    assert_eq!(std::fs::read_to_string(out.join("config.json")).unwrap(), "old");
    assert_eq!(names(folder.path()), ["out"]);
}

#[test]
fn a_job_leaves_its_promoted_model_or_its_candidate() {
    let spec = proto::JobSpec { name: "support".to_owned(), ..Default::default() };
    let mut report = proto::Report { promoted: "models/support/versions/3".to_owned(), ..Default::default() };
    let job = |report: &proto::Report| proto::Job {
        spec: Some(spec.clone()),
        report: Some(report.clone()),
        ..Default::default()
    };
    assert_eq!(Source::of_job(&job(&report)).unwrap().key, "models/support/000003/");
    report.promoted.clear();
    assert_eq!(Source::of_job(&job(&report)), None);
    report.artifacts = HashMap::from([("checkpoint".to_owned(), "jobs/j/checkpoints/000040-1/".to_owned())]);
    let candidate = Source::of_job(&job(&report)).unwrap();
    assert_eq!((candidate.version, candidate.key.as_str()), (None, "jobs/j/checkpoints/000040-1/model/"));
}

#[test]
fn keys_stay_inside_the_folder() {
    assert_eq!(relative("m/1/", "m/1/a/b").unwrap(), PathBuf::from("a/b"));
    for bad in ["m/1/../x", "/etc/passwd", "m/1/"] {
        assert!(relative("m/1/", bad).is_err(), "{bad}");
    }
}
