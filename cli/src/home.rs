//! The home folder: what lies where, who holds it, and where its retort can be reached.
//!
//! `lock` (held by the `retort` that is up), `run.json` (its addresses and process ids), `store/`,
//! `retort.sqlite`, `broker/`, `logs/`, `requests/` (what `retort run` resumes), `exports/`.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{Read as _, Seek as _, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use retort_artifact::Store;
use retort_core::{Code, Error, Result};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

/// Where an orchestrator listens when nothing says otherwise.
pub const DEFAULT_ADDRESS: &str = "http://127.0.0.1:7474";
/// Longest file of ours that is read whole, bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// How often, and how far apart, a home that is taken is tried: a reader that asks whether it is
/// taken holds the lock for an instant too.
const LOCK_TRIES: u32 = 10;
const LOCK_WAIT: Duration = Duration::from_millis(10);

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Home {
    path: PathBuf,
    /// Named by the user, who then means no other retort of this machine.
    given: bool,
}

/// `run.json`: the retort that is up in a home.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    /// `up` serves anybody; `run` leaves when its job is done.
    pub command: String,
    /// Process id of `retort` itself.
    pub pid: u32,
    /// The orchestrator, `http://host:port`.
    pub address: String,
    /// Kafka bootstrap servers.
    pub brokers: String,
    /// Path or URL.
    pub store: String,
    /// Process ids by name: `broker`, `orchestrator`, `teacher-1`...
    #[serde(default)]
    pub processes: BTreeMap<String, u32>,
}

/// Holds the home until dropped; the kernel lets go of it when the process dies, however it dies.
#[derive(Debug)]
pub struct Lock {
    _file: File,
    run_file: PathBuf,
}

impl Home {
    /// `--home` or `$RETORT_HOME` when given, else `~/.retort`. Always absolute; it need not exist.
    ///
    /// Errors: `RequestInvalid` when something that is no folder lies there, or above it.
    pub fn resolve(given: Option<&Path>) -> Result<Self> {
        let path = match given {
            Some(path) => path.to_owned(),
            None => {
                std::env::home_dir().filter(|home| !home.as_os_str().is_empty()).unwrap_or_default().join(".retort")
            }
        };
        let path = std::path::absolute(&path).map_err(|error| {
            Error::with_source(Code::RequestInvalid, format!("--home {:?} is no folder's path", path.display()), error)
        })?;
        let other = match std::fs::metadata(&path) {
            Ok(found) => !found.is_dir(),
            Err(error) => error.kind() == std::io::ErrorKind::NotADirectory,
        };
        if other {
            return Err(Error::new(
                Code::RequestInvalid,
                format!("--home {} is no folder; name one that exists or can be made", path.display()),
            ));
        }
        Ok(Self { path, given: given.is_some() })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn store(&self) -> PathBuf {
        self.path.join("store")
    }

    pub fn database(&self) -> PathBuf {
        self.path.join("retort.sqlite")
    }

    pub fn broker(&self) -> PathBuf {
        self.path.join("broker")
    }

    pub fn logs(&self) -> PathBuf {
        self.path.join("logs")
    }

    pub fn requests(&self) -> PathBuf {
        self.path.join("requests")
    }

    pub fn exports(&self) -> PathBuf {
        self.path.join("exports")
    }

    /// Takes the home, creating it first. One `retort` at a time.
    pub fn lock(&self) -> Result<Lock> {
        create_folder(&self.path)?;
        let path = self.path.join("lock");
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|error| Error::io(&path, error))?;
        if !hold(&file) {
            return Err(self.taken(file));
        }
        // A retort that was killed left it; from here on it would be taken for ours.
        let _ = std::fs::remove_file(self.run_file());
        let write = |file: &mut File| {
            file.set_len(0)?;
            file.rewind()?;
            writeln!(file, "{}", std::process::id())
        };
        write(&mut file).map_err(|error| Error::io(&path, error))?;
        Ok(Lock { _file: file, run_file: self.run_file() })
    }

    /// Why the lock was not to be had: its file names the holder, and `run.json` says what that is once it is up.
    fn taken(&self, mut file: File) -> Error {
        let mut holder = String::new();
        let _ = (&mut file).take(32).read_to_string(&mut holder);
        let holder =
            holder.trim().parse::<u32>().map_or_else(|_| "another process".to_owned(), |pid| format!("process {pid}"));
        let home = self.path.display();
        let message = match self.running().map(|running| running.command).as_deref() {
            Some("up") => format!(
                "a retort is up in {home} already ({holder}); use it (`retort job create`), stop it, or choose another --home"
            ),
            Some("run") => format!(
                "another `retort run` has {home} ({holder}) until its job is done; wait for its end, stop it (Ctrl-C; the \
                 same command goes on later), or choose another --home; `retort up` serves several jobs at once"
            ),
            _ => format!(
                "another retort starts or stops in {home} ({holder}); try again in a moment, stop it, or choose another --home"
            ),
        };
        Error::new(Code::AlreadyRunning, message)
    }

    /// Whether a retort holds the lock. The kernel frees it however its holder ends, so this is the
    /// truth: `run.json` may be stale, and the process id in it be that of another program by now.
    fn is_held(&self) -> bool {
        let Ok(file) = File::open(self.path.join("lock")) else { return false };
        flock(&file, FlockOperation::NonBlockingLockShared).is_err()
    }

    /// Says where this home's retort is. Replaced whole, so a reader never sees half a file.
    pub fn write_running(&self, running: &Running) -> Result<()> {
        let text = serde_json::to_string_pretty(running)
            .map_err(|error| Error::internal(format!("cannot write run.json: {error}")))?;
        replace_file(&self.run_file(), text.as_bytes())
    }

    /// The retort that is up here.
    pub fn running(&self) -> Option<Running> {
        let running = serde_json::from_str(&read_small(&self.run_file()).ok()??).ok()?;
        self.is_held().then_some(running)
    }

    /// The orchestrator of the retort that is up here; where none is, that of the default port of
    /// this machine.
    ///
    /// Errors: `OrchestratorUnavailable` when none is up in a home that the user named: whoever
    /// listens on the default port serves another.
    pub fn address(&self) -> Result<String> {
        match self.running() {
            Some(running) => Ok(running.address),
            None if self.given => Err(Error::new(
                Code::OrchestratorUnavailable,
                format!(
                    "no retort is up in {0}; start one with `retort up --home {0}`, or name an orchestrator with --address",
                    self.path.display()
                ),
            )),
            None => Ok(DEFAULT_ADDRESS.to_owned()),
        }
    }

    /// `--store` when given, that of the retort that is up here, else the home's own folder.
    pub fn store_or(&self, given: Option<&str>) -> Result<String> {
        match given {
            Some(store) => absolute_store(store),
            None => Ok(self.running().map_or_else(|| self.store().display().to_string(), |running| running.store)),
        }
    }

    pub fn run_file(&self) -> PathBuf {
        self.path.join("run.json")
    }
}

/// Takes the lock of an open file until it is closed.
fn hold(file: &File) -> bool {
    (0..LOCK_TRIES).any(|attempt| {
        if attempt > 0 {
            std::thread::sleep(LOCK_WAIT);
        }
        flock(file, FlockOperation::NonBlockingLockExclusive).is_ok()
    })
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.run_file);
    }
}

/// Makes a store given as a relative path absolute; URLs stay.
///
/// Errors: `StoreUnsupported` when it is no folder here.
pub fn absolute_store(store: &str) -> Result<String> {
    let unsupported = || {
        Error::new(
            Code::StoreUnsupported,
            format!(
                "--store {store:?} is no folder; give a path or a file:// URL (this version keeps objects in a local folder)"
            ),
        )
    };
    let folder = local_folder(store).ok_or_else(unsupported)?;
    if std::fs::metadata(&folder).is_ok_and(|found| !found.is_dir()) {
        return Err(unsupported());
    }
    if store.contains("://") {
        return Ok(store.to_owned());
    }
    std::path::absolute(folder).map(|path| path.display().to_string()).map_err(|_| unsupported())
}

/// Opens a store to read from it; nothing is made.
///
/// Errors: `FileNotFound` when its folder is not there, `StoreUnavailable` when that holds none.
pub fn open_store(location: &str) -> Result<Store> {
    match local_folder(location).filter(|folder| !folder.exists()) {
        Some(folder) => Err(Error::new(
            Code::FileNotFound,
            format!("{}: no object store is there; name one with --store or --home", folder.display()),
        )),
        None => Store::open_existing(location),
    }
}

/// The folder behind a store that is a path or a `file://` URL.
pub fn local_folder(store: &str) -> Option<PathBuf> {
    if store.contains("://") {
        url::Url::parse(store).ok().filter(|url| url.scheme() == "file")?.to_file_path().ok()
    } else {
        (!store.is_empty()).then(|| PathBuf::from(store))
    }
}

pub fn create_folder(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).map_err(|error| cannot_make(path, error))
}

/// Why a folder could not be made. A "not found" is not the user's path: what lies above it takes
/// no folders.
pub fn cannot_make(path: &Path, error: std::io::Error) -> Error {
    match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Error::io(path, error),
        _ => Error::new(
            Code::FileUnreadable,
            format!("{}: no folder can be made there ({error}); choose a place that can be written to", path.display()),
        ),
    }
}

/// Writes beside the file, then renames over it.
pub fn replace_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    create_folder(folder)?;
    let write = || -> std::io::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|error| error.error)?;
        Ok(())
    };
    write().map_err(|error| Error::io(path, error))
}

/// A small text file, `None` when it does not exist.
pub fn read_small(path: &Path) -> Result<Option<String>> {
    let read = || -> std::io::Result<String> {
        let mut text = String::new();
        File::open(path)?.take(MAX_FILE_BYTES).read_to_string(&mut text)?;
        Ok(text)
    };
    match read() {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(path, error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn running(pid: u32) -> Running {
        Running {
            command: "up".to_owned(),
            pid,
            address: "http://127.0.0.1:1234".to_owned(),
            brokers: "127.0.0.1:9092".to_owned(),
            store: "/tmp/store".to_owned(),
            processes: BTreeMap::from([("broker".to_owned(), 7), ("teacher-1".to_owned(), 9)]),
        }
    }

    #[test]
    fn run_file_round_trips_and_leaves_with_the_lock() {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::resolve(Some(folder.path())).unwrap();
        let lock = home.lock().unwrap();
        let written = running(std::process::id());
        home.write_running(&written).unwrap();
        assert_eq!(home.running(), Some(written));
        assert_eq!(home.address().unwrap(), "http://127.0.0.1:1234");
        drop(lock);
        assert_eq!(home.running(), None);
    }

    #[test]
    fn a_file_whose_writer_is_gone_is_ignored_whoever_has_its_process_id_now() {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::resolve(Some(folder.path())).unwrap();
        drop(home.lock().unwrap());
        home.write_running(&running(std::process::id())).unwrap();
        assert_eq!(home.running(), None);
        // Nor does the next holder pass for its writer.
        let _lock = home.lock().unwrap();
        assert_eq!(home.running(), None);
    }

    #[test]
    fn asking_who_is_up_keeps_nobody_out() {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::resolve(Some(folder.path())).unwrap();
        drop(home.lock().unwrap());
        let reader = File::open(folder.path().join("lock")).unwrap();
        flock(&reader, FlockOperation::NonBlockingLockShared).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                std::thread::sleep(LOCK_WAIT * 2);
                drop(reader);
            });
            home.lock().unwrap();
        });
    }

    #[test]
    fn a_home_that_was_named_is_never_that_of_the_default_port() {
        let folder = tempfile::tempdir().unwrap();
        let error = Home::resolve(Some(folder.path())).unwrap().address().unwrap_err();
        assert_eq!(error.code, Code::OrchestratorUnavailable);
        let way_out = format!("`retort up --home {}`", folder.path().display());
        assert!(error.message.contains(&way_out), "{}", error.message);
        let unnamed = Home { path: folder.path().to_owned(), given: false };
        assert_eq!(unnamed.address().unwrap(), DEFAULT_ADDRESS);
    }

    #[test]
    fn a_home_that_can_be_none_is_refused() {
        for path in ["/dev/null", "/dev/null/below"] {
            let error = Home::resolve(Some(Path::new(path))).unwrap_err();
            assert_eq!((error.code, error.message.contains(path)), (Code::RequestInvalid, true), "{}", error.message);
        }
        let error = Home::resolve(Some(Path::new("/proc/nope"))).unwrap().lock().unwrap_err();
        assert_eq!(error.code, Code::FileUnreadable);
        assert!(error.message.starts_with("/proc/nope: no folder can be made there"), "{}", error.message);
    }

    #[test]
    fn a_second_lock_names_the_holder() {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::resolve(Some(folder.path())).unwrap();
        let held = home.lock().unwrap();
        let error = home.lock().unwrap_err();
        assert_eq!(error.code, Code::AlreadyRunning);
        assert!(error.message.contains(&format!("process {}", std::process::id())), "{}", error.message);
        // What it is doing there decides what can be done about it.
        for (command, way_out) in [("up", "use it (`retort job create`)"), ("run", "another `retort run` has ")] {
            home.write_running(&Running { command: command.to_owned(), ..running(std::process::id()) }).unwrap();
            let error = home.lock().unwrap_err();
            assert!(error.message.contains(way_out), "{}", error.message);
            assert!(error.message.contains(&format!("process {}", std::process::id())), "{}", error.message);
        }
        drop(held);
        home.lock().unwrap();
    }

    #[test]
    fn stores_that_are_folders() {
        assert_eq!(local_folder("/a/b"), Some(PathBuf::from("/a/b")));
        assert_eq!(local_folder("file:///a/b"), Some(PathBuf::from("/a/b")));
        assert_eq!(local_folder("s3://bucket/a"), None);
        assert_eq!(local_folder(""), None);
        for no_folder in ["", "s3://bucket/a", "file://host/a", "/dev/null"] {
            assert_eq!(absolute_store(no_folder).unwrap_err().code, Code::StoreUnsupported, "{no_folder:?}");
        }
        assert_eq!(absolute_store("/a/b").unwrap(), "/a/b");
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("store");
        assert_eq!(open_store(&missing.display().to_string()).unwrap_err().code, Code::FileNotFound);
        assert!(!missing.exists(), "to look for a store makes none");
        std::fs::create_dir(&missing).unwrap();
        assert_eq!(open_store(&missing.display().to_string()).unwrap_err().code, Code::StoreUnavailable);
        assert_eq!(std::fs::read_dir(&missing).unwrap().count(), 0, "nor in a folder that is there");
    }
}
