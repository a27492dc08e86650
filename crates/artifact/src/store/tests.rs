use std::{process::Command, time::Duration};

use super::*;

fn store() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a/store").to_str().unwrap()).unwrap();
    (folder, store)
}

/// Every file below the store's root, its own temporary ones included.
fn files(store: &Store) -> Vec<String> {
    fn walk(folder: &Path, into: &mut Vec<String>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { walk(&path, into) } else { into.push(path.display().to_string()) }
        }
    }
    let mut all = Vec::new();
    walk(store.root(), &mut all);
    all
}

#[tokio::test]
async fn an_object_is_written_once() {
    let (_folder, store) = store();
    store.put_new("jobs/j/a.bin", Bytes::from_static(b"one")).await.unwrap();
    let error = store.put_new("jobs/j/a.bin", Bytes::from_static(b"two")).await.unwrap_err();
    assert_eq!(error.code, Code::ObjectExists);
    let place = store.root().join("jobs/j/a.bin");
    assert_eq!(
        error.message,
        format!("{}: it exists already; objects are written once and never changed", place.display())
    );
    assert_eq!(store.get("jobs/j/a.bin", 3).await.unwrap(), "one");
    assert!(store.exists("jobs/j/a.bin").await.unwrap());
    assert!(!store.exists("jobs/j/b.bin").await.unwrap());
    assert_eq!(files(&store).len(), 1, "nothing temporary is left");
}

#[tokio::test]
async fn of_many_writers_one_wins() {
    let (_folder, store) = store();
    let writers = (0..16u8).map(|i| {
        let store = store.clone();
        async move { store.put_new("k/x", Bytes::from(vec![i; 10_000])).await }
    });
    let outcomes = futures::future::join_all(writers).await;
    assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1);
    assert!(outcomes.iter().flatten_err().all(|error| error.code == Code::ObjectExists));
    let bytes = store.get("k/x", 10_000).await.unwrap();
    assert!(bytes.len() == 10_000 && bytes.iter().all(|byte| *byte == bytes[0]));
}

trait FlattenErr<'a> {
    fn flatten_err(self) -> impl Iterator<Item = &'a Error>;
}

impl<'a, I: Iterator<Item = &'a Result<()>>> FlattenErr<'a> for I {
    fn flatten_err(self) -> impl Iterator<Item = &'a Error> {
        self.filter_map(|outcome| outcome.as_ref().err())
    }
}

/// Of a file that says it is larger than it is, as one does that is cut short while it is read.
#[tokio::test]
async fn an_object_that_ends_early_is_an_error() {
    let longer_than_it_is = std::path::Path::new("/sys/kernel/mm/transparent_hugepage/enabled");
    if !longer_than_it_is.exists() {
        eprintln!("SKIPPED: this kernel has no {}", longer_than_it_is.display());
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("store").to_str().unwrap()).unwrap();
    store.put_new("a/other", "x".into()).await.unwrap();
    std::os::unix::fs::symlink(longer_than_it_is, store.root().join("a/b")).unwrap();
    let size = store.size("a/b").await.unwrap();
    let errors = [
        store.sha256("a/b").await.map(drop).unwrap_err(),
        store.get_to_file("a/b", &folder.path().join("out")).await.map(drop).unwrap_err(),
        store.get_verified_file("a/b", "", size, folder.path()).await.map(drop).unwrap_err(),
    ];
    for error in errors {
        assert_eq!(error.code, Code::StoreUnavailable);
        assert!(error.message.contains("bytes early"), "{}", error.message);
    }
}

#[tokio::test]
async fn reading_is_bounded_and_verified() {
    let (_folder, store) = store();
    store.put_new("a/b", Bytes::from_static(b"abc")).await.unwrap();
    let place = store.root().join("a/b").display().to_string();
    let error = store.get("a/b", 2).await.unwrap_err();
    assert_eq!(
        (error.code, error.message),
        (Code::ObjectTooLarge, format!("{place}: it takes 3 bytes, at most 2 are read here"))
    );
    let error = store.get("a/c", 2).await.unwrap_err();
    let missing = store.root().join("a/c").display().to_string();
    assert_eq!((error.code, error.message), (Code::ObjectNotFound, format!("{missing}: no such object")));
    let sha256 = sha256_hex(b"abc");
    assert_eq!(store.get_verified("a/b", &sha256, 3).await.unwrap(), "abc");
    let folder = tempfile::tempdir().unwrap();
    let file = store.get_verified_file("a/b", &sha256, 3, folder.path()).await.unwrap();
    let mut read = [0; 3];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut read, 0).unwrap();
    assert_eq!((&read, file.metadata().unwrap().len()), (b"abc", 3));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "it has no name");
    let error = store.get_verified_file("a/b", &sha256, 2, folder.path()).await.unwrap_err();
    assert_eq!(
        (error.code, error.message),
        (Code::ShardCorrupt, format!("{place}: it takes 3 bytes, 2 were published"))
    );
    std::fs::write(store.root().join("a/b"), b"abd").unwrap();
    let error = store.get_verified("a/b", &sha256, 3).await.unwrap_err();
    assert_eq!(error.code, Code::ShardCorrupt);
    assert_eq!(error.message, format!("{place}: it has sha256 {}, {sha256} was published", sha256_hex(b"abd")));
    let of_file = store.get_verified_file("a/b", &sha256, 3, folder.path()).await.unwrap_err();
    assert_eq!((of_file.code, of_file.message), (error.code, error.message));
}

#[tokio::test]
async fn large_files_travel_in_pieces() {
    let (folder, store) = store();
    let file = folder.path().join("weights");
    let content: Vec<u8> = (0..20_000_003u32).map(|i| (i % 251) as u8).collect();
    std::fs::write(&file, &content).unwrap();
    store.put_new_file("m/weights", &file).await.unwrap();
    assert_eq!(store.put_new_file("m/weights", &file).await.unwrap_err().code, Code::ObjectExists);
    assert_eq!(files(&store).len(), 1, "nothing staged is left");
    let back = folder.path().join("deep/er/back");
    assert_eq!(store.get_to_file("m/weights", &back).await.unwrap(), content.len() as u64);
    assert_eq!(std::fs::read(&back).unwrap(), content);
    assert_eq!(store.put_new_file("m/other", &folder.path().join("none")).await.unwrap_err().code, Code::FileNotFound);
    assert_eq!(store.get_to_file("m/none", &back).await.unwrap_err().code, Code::ObjectNotFound);
    std::fs::write(&file, b"").unwrap();
    store.put_new_file("m/empty", &file).await.unwrap();
    assert_eq!(store.get("m/empty", 0).await.unwrap(), "");
}

#[tokio::test]
async fn a_file_that_is_given_up_becomes_the_object() {
    use std::os::unix::fs::MetadataExt as _;
    let (folder, store) = store();
    let file = folder.path().join("weights");
    std::fs::write(&file, b"weights").unwrap();
    let inode = |path: &Path| std::fs::metadata(path).unwrap().ino();
    store.link_new_file("m/linked", &file).await.unwrap();
    assert_eq!(inode(&store.root().join("m/linked")), inode(&file), "it was copied");
    assert_eq!(store.link_new_file("m/linked", &file).await.unwrap_err().code, Code::ObjectExists);
    assert_eq!(store.link_new_file("m/other", &folder.path().join("none")).await.unwrap_err().code, Code::FileNotFound);
    // Whose file it leads to, nobody knows.
    let pointer = folder.path().join("pointer");
    std::os::unix::fs::symlink(&file, &pointer).unwrap();
    store.link_new_file("m/copied", &pointer).await.unwrap();
    assert_ne!(inode(&store.root().join("m/copied")), inode(&file));
    assert_eq!(store.get("m/copied", 100).await.unwrap(), "weights");
    assert_eq!(files(&store).len(), 2, "nothing staged is left");
}

#[tokio::test]
async fn prefixes_are_listed_copied_and_removed() {
    let (_folder, store) = store();
    for key in ["jobs/a/2", "jobs/a/1", "jobs/a/sub/3", "jobs/ab/4"] {
        store.put_new(key, Bytes::from(key)).await.unwrap();
    }
    let keys = |entries: Vec<Entry>| entries.into_iter().map(|entry| entry.key).collect::<Vec<_>>();
    assert_eq!(keys(store.list("jobs/a/").await.unwrap()), ["jobs/a/1", "jobs/a/2", "jobs/a/sub/3"]);
    assert_eq!(store.list("jobs/ab/").await.unwrap(), [Entry { key: "jobs/ab/4".to_owned(), size: 9 }]);
    assert_eq!(store.list("nothing/").await.unwrap(), []);
    assert_eq!(store.copy_prefix("jobs/a/", "models/m/").await.unwrap(), 3);
    assert_eq!(store.copy_prefix("jobs/a/", "models/m/").await.unwrap(), 3, "a second copy finds all in place");
    assert_eq!(store.get("models/m/sub/3", 100).await.unwrap(), "jobs/a/sub/3");
    assert_eq!(store.copy_prefix("jobs/none/", "x/").await.unwrap_err().code, Code::ObjectNotFound);
    // What a killed writer leaves is neither listed nor kept.
    std::fs::write(store.root().join("jobs/a/9#1"), b"partial").unwrap();
    assert_eq!(store.list("jobs/a/").await.unwrap().len(), 3);
    assert_eq!(store.delete_prefix("jobs/a/").await.unwrap(), 3);
    assert!(!store.root().join("jobs/a").exists());
    assert_eq!(store.delete_prefix("jobs/a/").await.unwrap(), 0);
    store.delete("jobs/ab/4").await.unwrap();
    store.delete("jobs/ab/4").await.unwrap();
    assert_eq!(store.delete_prefix("/").await.unwrap_err().code, Code::RequestInvalid);
    assert_eq!(keys(store.list("").await.unwrap()), ["models/m/1", "models/m/2", "models/m/sub/3"]);
}

#[tokio::test]
async fn abandoned_uploads_are_swept() {
    let (_folder, store) = store();
    store.put_new("staging/1-2-3", Bytes::from_static(b"x")).await.unwrap();
    std::fs::write(store.root().join("staging/1-2-4#1"), b"partial").unwrap();
    assert_eq!(store.sweep_staging(Duration::from_secs(60)).await.unwrap(), 0, "their writers may be alive");
    assert_eq!(store.sweep_staging(Duration::ZERO).await.unwrap(), 2);
    assert_eq!(files(&store), Vec::<String>::new());
}

#[tokio::test]
async fn keys_stay_inside_the_store() {
    let (_folder, store) = store();
    for key in ["../x", "a/../../x", "a//b", "./a", "/../x"] {
        let error = store.put_new(key, Bytes::new()).await.unwrap_err();
        assert_eq!(error.code, Code::RequestInvalid, "{key}");
        assert_eq!(error.message, format!("{key:?} is no key of the object store"));
    }
}

#[test]
fn the_url_decides_and_says_what_it_cannot() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("with space");
    let url = url::Url::from_file_path(&path).unwrap();
    assert!(url.as_str().contains("%20"));
    assert_eq!(Store::open(url.as_str()).unwrap().root(), path.canonicalize().unwrap());
    let say = |url: &str| {
        let error = Store::open(url).unwrap_err();
        assert_eq!(error.code, Code::StoreUnsupported, "{url}");
        error.message
    };
    assert_eq!(
        say("s3://bucket/x"),
        "the store \"s3://bucket/x\" is in the cloud; this version keeps objects in a local folder (a path or file:// \
         URL), buckets are supported in a later one"
    );
    assert_eq!(say("ftp://x"), "the store \"ftp://x\" has an unknown scheme; give a path or a file:// URL");
    assert_eq!(say(""), "the store \"\" is no folder; give a path or a file:// URL");
    assert_eq!(
        say("file://host/x"),
        "the store \"file://host/x\" is no file:// URL of a folder here; write file:///path/to/folder"
    );
    std::fs::write(folder.path().join("file"), b"").unwrap();
    assert!(Store::open(folder.path().join("file").to_str().unwrap()).is_err());
}

/// Fills a real, tiny file system. Mounting one takes privileges that a user namespace gives; where
/// neither is to be had, the size of files is limited instead, which fails in another way.
#[test]
fn a_full_disk_is_told_and_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let this = std::env::current_exe().unwrap();
    let script =
        r#"mount -t tmpfs -o size=256k tmpfs "$1" && exec "$2" --exact store::tests::full_disk_body --nocapture"#;
    let unprivileged = ["unshare", "--user", "--map-root-user", "--mount"];
    let privileged = ["unshare", "--mount"];
    for command in [&privileged[..], &unprivileged[..]] {
        let can = Command::new(command[0]).args(&command[1..]).args(["sh", "-c", "mount -t tmpfs tmpfs /mnt"]).output();
        if !can.is_ok_and(|output| output.status.success()) {
            continue;
        }
        let output = Command::new(command[0])
            .args(&command[1..])
            .args(["sh", "-c", script, "sh"])
            .arg(folder.path())
            .arg(&this)
            .env("RETORT_TEST_FULL_DISK", folder.path())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && text.contains("1 passed"),
            "{text}\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
        return;
    }
    eprintln!("no file system can be mounted here: only the mapping of the error was tested");
    let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
    let error = fault::error(Path::new("/s"), "k", object_store::Error::Generic { store: "t", source: full.into() });
    assert_eq!(error.code, Code::DiskFull);
}

/// Runs inside the mount that the test above makes, and does nothing elsewhere.
#[tokio::test]
async fn full_disk_body() {
    let Some(root) = std::env::var_os("RETORT_TEST_FULL_DISK") else { return };
    let root = PathBuf::from(root);
    let store = Store::open(root.join("store").to_str().unwrap()).unwrap();
    store.put_new("a/fits", Bytes::from(vec![1; 50_000])).await.unwrap();
    let error = store.put_new("a/large", Bytes::from(vec![2; 400_000])).await.unwrap_err();
    assert_eq!(error.code, Code::DiskFull, "{}", error.chain());
    let place = store.root().join("a/large").display().to_string();
    assert_eq!(
        error.message,
        format!("{place}: the disk is full; free some space, then start again: finished work is kept")
    );
    let large = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    std::fs::write(large.path(), vec![3; 400_000]).unwrap();
    assert_eq!(store.put_new_file("a/file", large.path()).await.unwrap_err().code, Code::DiskFull);
    assert_eq!(store.list("").await.unwrap(), [Entry { key: "a/fits".to_owned(), size: 50_000 }]);
    assert_eq!(files(&store).len(), 1, "{:?}", files(&store));
    // Space given back is usable again.
    store.delete("a/fits").await.unwrap();
    store.put_new("a/large", Bytes::from(vec![2; 150_000])).await.unwrap();
}
