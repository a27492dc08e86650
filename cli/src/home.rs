//! The home folder: what lies where, who holds it, and where its retort can be reached.
//!
//! `lock` (held by the `retort` that is up), `run.json` (its addresses and process ids), `store/`,
//! `retort.sqlite`, `broker/`, `logs/`, `requests/` (what `retort run` resumes), `exports/`.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{Read as _, Seek as _, Write as _},
    path::{Path, PathBuf},
};

use retort_core::{Code, Error, Result};
use rustix::{
    fs::{FlockOperation, flock},
    process::{Pid, test_kill_process},
};
use serde::{Deserialize, Serialize};

/// Where an orchestrator listens when nothing says otherwise.
pub const DEFAULT_ADDRESS: &str = "http://127.0.0.1:7474";
/// Longest file of ours that is read whole, bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Home(PathBuf);

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
    /// `--home` or `$RETORT_HOME` when given, else `~/.retort`. Always absolute.
    pub fn resolve(given: Option<&Path>) -> Result<Self> {
        let path = match given {
            Some(path) => path.to_owned(),
            None => {
                std::env::home_dir().filter(|home| !home.as_os_str().is_empty()).unwrap_or_default().join(".retort")
            }
        };
        std::path::absolute(&path).map(Self).map_err(|error| {
            Error::with_source(Code::RequestInvalid, format!("--home {:?} is no folder's path", path.display()), error)
        })
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn store(&self) -> PathBuf {
        self.0.join("store")
    }

    pub fn database(&self) -> PathBuf {
        self.0.join("retort.sqlite")
    }

    pub fn broker(&self) -> PathBuf {
        self.0.join("broker")
    }

    pub fn logs(&self) -> PathBuf {
        self.0.join("logs")
    }

    pub fn requests(&self) -> PathBuf {
        self.0.join("requests")
    }

    pub fn exports(&self) -> PathBuf {
        self.0.join("exports")
    }

    /// Takes the home, creating it first. One `retort` at a time.
    pub fn lock(&self) -> Result<Lock> {
        create_folder(&self.0)?;
        let path = self.0.join("lock");
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|error| Error::io(&path, error))?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            let mut holder = String::new();
            let _ = (&mut file).take(32).read_to_string(&mut holder);
            let holder = holder
                .trim()
                .parse::<u32>()
                .map_or_else(|_| "another process".to_owned(), |pid| format!("process {pid}"));
            return Err(Error::new(
                Code::AlreadyRunning,
                format!(
                    "a retort is up in {} already ({holder}); use it (`retort job create`), stop it, or choose another --home",
                    self.0.display()
                ),
            ));
        }
        let write = |file: &mut File| {
            file.set_len(0)?;
            file.rewind()?;
            writeln!(file, "{}", std::process::id())
        };
        write(&mut file).map_err(|error| Error::io(&path, error))?;
        Ok(Lock { _file: file, run_file: self.run_file() })
    }

    /// Says where this home's retort is. Replaced whole, so a reader never sees half a file.
    pub fn write_running(&self, running: &Running) -> Result<()> {
        let text = serde_json::to_string_pretty(running)
            .map_err(|error| Error::internal(format!("cannot write run.json: {error}")))?;
        replace_file(&self.run_file(), text.as_bytes())
    }

    /// The retort that is up here, when its process still lives.
    pub fn running(&self) -> Option<Running> {
        let running: Running = serde_json::from_str(&read_small(&self.run_file()).ok()??).ok()?;
        let pid = Pid::from_raw(i32::try_from(running.pid).ok()?)?;
        match test_kill_process(pid) {
            Err(rustix::io::Errno::SRCH) => None,
            _ => Some(running),
        }
    }

    /// The orchestrator of the retort that is up here, else the default port of this machine.
    pub fn address(&self) -> String {
        self.running().map_or_else(|| DEFAULT_ADDRESS.to_owned(), |running| running.address)
    }

    /// `--store` when given, that of the retort that is up here, else the home's own folder.
    pub fn store_or(&self, given: Option<&str>) -> Result<String> {
        match given {
            Some(store) => absolute_store(store),
            None => Ok(self.running().map_or_else(|| self.store().display().to_string(), |running| running.store)),
        }
    }

    pub fn run_file(&self) -> PathBuf {
        self.0.join("run.json")
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.run_file);
    }
}

/// Makes a store given as a relative path absolute; URLs stay.
pub fn absolute_store(store: &str) -> Result<String> {
    if store.contains("://") {
        return Ok(store.to_owned());
    }
    match std::path::absolute(store) {
        Ok(path) => Ok(path.display().to_string()),
        Err(error) => Err(Error::with_source(Code::RequestInvalid, format!("--store {store:?} is no path"), error)),
    }
}

/// The folder behind a store that is a path or a `file://` URL.
pub fn local_folder(store: &str) -> Option<PathBuf> {
    if store.contains("://") {
        url::Url::parse(store).ok().filter(|url| url.scheme() == "file")?.to_file_path().ok()
    } else {
        Some(PathBuf::from(store))
    }
}

pub fn create_folder(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).map_err(|error| Error::io(path, error))
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
        assert_eq!(home.address(), DEFAULT_ADDRESS);
        let lock = home.lock().unwrap();
        let written = running(std::process::id());
        home.write_running(&written).unwrap();
        assert_eq!(home.running(), Some(written));
        assert_eq!(home.address(), "http://127.0.0.1:1234");
        drop(lock);
        assert_eq!(home.running(), None);
    }

    #[test]
    fn the_file_of_a_dead_process_is_ignored() {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::resolve(Some(folder.path())).unwrap();
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        home.write_running(&running(child.id())).unwrap();
        assert_eq!(home.running(), None);
    }

    #[test]
    fn a_second_lock_names_the_holder() {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::resolve(Some(folder.path())).unwrap();
        let held = home.lock().unwrap();
        let error = home.lock().unwrap_err();
        assert_eq!(error.code, Code::AlreadyRunning);
        assert!(error.message.contains(&format!("process {}", std::process::id())), "{}", error.message);
        drop(held);
        home.lock().unwrap();
    }

    #[test]
    fn stores_that_are_folders() {
        assert_eq!(local_folder("/a/b"), Some(PathBuf::from("/a/b")));
        assert_eq!(local_folder("file:///a/b"), Some(PathBuf::from("/a/b")));
        assert_eq!(local_folder("s3://bucket/a"), None);
    }
}
