use std::{process::Command, time::Duration};

use super::*;

fn store() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a/store").to_str().unwrap()).unwrap();
    (folder, store)
}

/// Every file below the store's root, its own temporary ones included, its mark left out.
fn files(store: &Store) -> Vec<String> {
    fn walk(folder: &Path, into: &mut Vec<String>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { walk(&path, into) } else { into.push(path.display().to_string()) }
        }
    }
    let mut all = Vec::new();
    walk(store.root(), &mut all);
    let mark = store.root().join(identity::FILE).display().to_string();
    all.retain(|file| *file != mark);
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

/// A checkpoint's file may have been written long before it is linked.
#[tokio::test]
async fn a_link_to_an_old_file_is_young() {
    let (folder, store) = store();
    let file = folder.path().join("weights");
    std::fs::write(&file, b"weights").unwrap();
    let long_ago = std::time::SystemTime::now() - Duration::from_secs(86_400);
    std::fs::File::options().write(true).open(&file).unwrap().set_modified(long_ago).unwrap();
    std::fs::create_dir_all(store.root().join("staging")).unwrap();
    std::fs::hard_link(&file, store.root().join("staging/1-2-3")).unwrap();
    assert_eq!(store.sweep_staging(Duration::from_secs(3600)).await.unwrap(), 0, "it is about to be published");
    assert_eq!(store.sweep_staging(Duration::ZERO).await.unwrap(), 1);
    assert_eq!(std::fs::read(&file).unwrap(), b"weights");
}

#[tokio::test]
async fn keys_stay_inside_the_store() {
    let (_folder, store) = store();
    for key in ["../x", "a/../../x", "a//b", "./a", "/../x", "retort-store.json", "/retort-store.json"] {
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
    let file = folder.path().join("file").display().to_string();
    std::fs::write(&file, b"").unwrap();
    assert_eq!(say(&file), format!("the store {file:?} is no folder; give a path or a file:// URL"));
}

/// What every operation says.
async fn all_operations(store: &Store, folder: &Path) -> Vec<Result<()>> {
    let (file, out) = (folder.join("weights"), folder.join("out"));
    std::fs::write(&file, b"weights").unwrap();
    vec![
        store.put_new("jobs/new", Bytes::from_static(b"x")).await,
        store.put_new_file("jobs/new", &file).await,
        store.link_new_file("jobs/new", &file).await,
        store.get("jobs/a", 100).await.map(drop),
        store.get_verified("jobs/a", &sha256_hex(b"a"), 100).await.map(drop),
        store.get_verified_file("jobs/a", &sha256_hex(b"a"), 1, folder).await.map(drop),
        store.get_to_file("jobs/a", &out).await.map(drop),
        store.exists("jobs/a").await.map(drop),
        store.size("jobs/a").await.map(drop),
        store.sha256("jobs/a").await.map(drop),
        store.list("jobs/").await.map(drop),
        store.copy_prefix("jobs/", "models/").await.map(drop),
        store.delete("jobs/a").await,
        store.delete_prefix("jobs/").await.map(drop),
    ]
}

#[tokio::test]
async fn a_store_that_is_away_is_told_and_nothing_is_made_in_its_place() {
    let (folder, store) = store();
    store.put_new("jobs/a", Bytes::from_static(b"a")).await.unwrap();
    let aside = folder.path().join("aside");
    std::fs::rename(store.root(), &aside).unwrap();
    let root = store.root().display().to_string();
    let told = |operations: Vec<Result<()>>, why: &str| {
        for (number, done) in operations.into_iter().enumerate() {
            let error = done.unwrap_err();
            assert_eq!((error.code, number), (Code::StoreUnavailable, number), "{}", error.message);
            assert_eq!(error.message, format!("{root}: the object store is not there any more: {why}"), "{number}");
        }
    };
    told(all_operations(&store, folder.path()).await, "there is no such folder; mount it or put it back");
    assert!(!store.root().exists());

    // What a mount leaves.
    std::fs::create_dir(store.root()).unwrap();
    told(all_operations(&store, folder.path()).await, "the folder is empty; mount it or put it back");
    assert_eq!(std::fs::read_dir(store.root()).unwrap().count(), 0);

    let other = Store::open(store.root().to_str().unwrap()).unwrap();
    other.put_new("jobs/a", Bytes::from_static(b"b")).await.unwrap();
    let error = store.put_new("jobs/new", Bytes::new()).await.unwrap_err();
    assert_eq!(error.code, Code::StoreUnavailable);
    assert!(error.message.starts_with(&format!("{root}: another object store is there")), "{}", error.message);
    assert!(!other.exists("jobs/new").await.unwrap());

    std::fs::remove_dir_all(store.root()).unwrap();
    std::fs::rename(&aside, store.root()).unwrap();
    assert_eq!(store.get("jobs/a", 1).await.unwrap(), "a");
    store.put_new("jobs/new", Bytes::new()).await.unwrap();
    assert_eq!(store.list("").await.unwrap().len(), 2, "its mark is no object");
}

#[tokio::test]
async fn only_a_store_that_is_there_is_opened_as_one() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("store");
    let url = root.to_str().unwrap();
    let refused = |why: &str| {
        let error = Store::open_existing(url).unwrap_err();
        let message = format!("{url}: no object store is there: {why}; mount it, or name where it lies with --store");
        assert_eq!((error.code, error.message), (Code::StoreUnavailable, message));
    };
    refused("there is no such folder");
    assert!(!root.exists());
    std::fs::create_dir(&root).unwrap();
    refused("the folder is empty");
    std::fs::create_dir(root.join("lost+found")).unwrap();
    refused("the folder has no retort-store.json");

    // One of an older build is taken as it is, and gets its mark from whoever may make one.
    std::fs::create_dir(root.join("jobs")).unwrap();
    std::fs::write(root.join("jobs/a"), b"a").unwrap();
    let unmarked = Store::open_existing(url).unwrap();
    assert!(!root.join("retort-store.json").exists());
    assert_eq!(unmarked.get("jobs/b", 1).await.unwrap_err().code, Code::ObjectNotFound);
    let opened = [Store::open(url).unwrap(), Store::open(url).unwrap(), Store::open_existing(url).unwrap()];
    for store in opened.iter().chain([&unmarked]) {
        assert_eq!(store.get("jobs/a", 1).await.unwrap(), "a");
        assert!(!store.exists("jobs/b").await.unwrap());
    }
    std::fs::rename(root.join("jobs"), folder.path().join("jobs")).unwrap();
    std::fs::remove_file(root.join("retort-store.json")).unwrap();
    for store in opened.iter().chain([&unmarked]) {
        assert_eq!(store.get("jobs/a", 1).await.unwrap_err().code, Code::StoreUnavailable);
    }
    for mark in ["", "{", "{}"] {
        std::fs::write(root.join("retort-store.json"), mark).unwrap();
        assert_eq!(Store::open(url).unwrap_err().code, Code::StoreUnavailable, "{mark:?}");
    }
    std::fs::write(root.join("retort-store.json"), r#"{"schema_version": 2, "id": "x"}"#).unwrap();
    assert_eq!(Store::open(url).unwrap_err().code, Code::StoreUnsupported);
}

#[test]
fn a_fault_of_the_disk_is_an_outage_in_the_systems_words() {
    for (number, text) in
        [(13, "Permission denied"), (5, "Input/output error"), (30, "Read-only file system"), (116, "Stale")]
    {
        let source = std::io::Error::from_raw_os_error(number);
        let generic = object_store::Error::Generic { store: "t", source: source.into() };
        let error = fault::error(Path::new("/s"), "jobs/a", generic);
        assert_eq!(error.code, Code::StoreUnavailable, "{text}");
        assert!(error.message.starts_with("/s/jobs/a: ") && error.message.contains(text), "{}", error.message);
    }
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
    assert_eq!(error.message, format!("{place}: the disk is full; free some space: finished work is kept"));
    let large = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    std::fs::write(large.path(), vec![3; 400_000]).unwrap();
    assert_eq!(store.put_new_file("a/file", large.path()).await.unwrap_err().code, Code::DiskFull);
    assert_eq!(store.list("").await.unwrap(), [Entry { key: "a/fits".to_owned(), size: 50_000 }]);
    assert_eq!(files(&store).len(), 1, "{:?}", files(&store));
    // Space given back is usable again.
    store.delete("a/fits").await.unwrap();
    store.put_new("a/large", Bytes::from(vec![2; 150_000])).await.unwrap();
}
