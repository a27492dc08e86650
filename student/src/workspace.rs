//! A folder of one attempt on local disk, locked for as long as the attempt's process lives: what a killed one left
//! is told from what is in use by nobody holding the lock.

use std::{
    fs::{self, File},
    io::{self, ErrorKind::NotFound},
    path::{Path, PathBuf},
    time::Duration,
};

use retort_core::{Error, Result};
use retort_worker::Attempt;

/// Of the name of every such folder.
const PREFIX: &str = "retort-student-";
/// Ends the name of one that is being made and not locked yet.
const UNLOCKED: &str = ".new";
/// So long one is left alone: making and locking takes no time to speak of.
const MAKING: Duration = Duration::from_secs(60);

/// Removed with everything in it when dropped, and by whoever looks next on this machine if a kill came first.
#[derive(Debug)]
pub struct Workspace {
    path: PathBuf,
    _lock: File,
}

impl Workspace {
    pub async fn create(work_dir: &Path, attempt: &Attempt) -> Result<Self> {
        let name = format!("{PREFIX}{}-{}-{}", attempt.job, attempt.task.short(), attempt.epoch);
        let work_dir = work_dir.to_owned();
        // What is swept may be gigabytes.
        let created = tokio::task::spawn_blocking(move || Self::create_now(&work_dir, &name)).await;
        created.map_err(|error| Error::internal(format!("making the attempt's folder failed: {error}")))?
    }

    fn create_now(work_dir: &Path, name: &str) -> Result<Self> {
        fs::create_dir_all(work_dir).map_err(|error| Error::io(work_dir, error))?;
        sweep(work_dir);
        let (path, unlocked) = (work_dir.join(name), work_dir.join(format!("{name}.{}{UNLOCKED}", std::process::id())));
        // The lock goes with the folder when it gets the name under which it is swept.
        let create = || -> io::Result<File> {
            fs::create_dir(&unlocked)?;
            let folder = File::open(&unlocked)?;
            if let Err(error) = folder.try_lock() {
                tracing::warn!("cannot lock {}: {error}", path.display());
            }
            fs::rename(&unlocked, &path)?;
            Ok(folder)
        };
        let lock = create().map_err(|error| Error::io(&path, error))?;
        Ok(Self { path, _lock: lock })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

/// Removes what killed processes left in `work_dir`, if that is there. On a file system without locks nothing is.
pub fn sweep(work_dir: &Path) {
    let entries = fs::read_dir(work_dir).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_name().to_str().is_some_and(|name| name.starts_with(PREFIX))) {
        let path = entry.path();
        if path.to_str().is_some_and(|path| path.ends_with(UNLOCKED)) && age(&entry) < MAKING {
            continue;
        }
        // Another user's cannot be opened.
        let Ok(folder) = File::open(&path) else { continue };
        if folder.try_lock().is_err() {
            continue;
        }
        match fs::remove_dir_all(&path) {
            Ok(()) => tracing::info!("removed what a killed attempt left in {}", path.display()),
            Err(error) if error.kind() == NotFound => {}
            Err(error) => tracing::warn!("cannot remove what a killed attempt left in {}: {error}", path.display()),
        }
    }
}

fn age(entry: &fs::DirEntry) -> Duration {
    let made = entry.metadata().and_then(|metadata| metadata.modified());
    made.ok().and_then(|made| made.elapsed().ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attempt_tests::world::World;

    #[tokio::test]
    async fn what_a_killed_process_left_goes_and_what_is_in_use_stays() {
        let world = World::new();
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("work");
        sweep(&dir);
        assert!(!dir.exists());
        // As `kill -9` leaves them: of another job and of this one, which another machine has taken up since.
        let left = |name: &str| {
            fs::create_dir_all(dir.join(name)).unwrap();
            fs::write(dir.join(name).join("model.safetensors"), "gigabytes").unwrap();
        };
        left("retort-student-0190a5b4c6d87e8fa0b1c2d3e4f5eeee-evaluate-3");
        left("retort-student-0190a5b4c6d87e8fa0b1c2d3e4f50617-train-1");
        left("somebody-elses");
        left("retort-student-0190a5b4c6d87e8fa0b1c2d3e4f50617-train-2.77.new");
        let old = std::time::SystemTime::now() - 2 * MAKING;
        let killed = File::open(dir.join("retort-student-0190a5b4c6d87e8fa0b1c2d3e4f50617-train-2.77.new")).unwrap();
        killed.set_modified(old).unwrap();
        let names = || {
            let entries = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
            let mut names: Vec<String> = entries.collect();
            names.sort();
            names
        };
        let replica = Workspace::create(&dir, &world.replica_attempt(1, 2)).await.unwrap();
        let of_replica = replica.path().file_name().unwrap().to_str().unwrap().to_owned();
        assert_eq!(names(), [of_replica.as_str(), "somebody-elses"]);

        left("retort-student-0190a5b4c6d87e8fa0b1c2d3e4f50617-train-2");
        sweep(&dir);
        assert_eq!(names(), [of_replica.as_str(), "somebody-elses"]);
        let train = Workspace::create(&dir, &world.train_attempt(3)).await.unwrap();
        assert_eq!(names().len(), 3, "what is in use stays");
        drop((replica, train));
        assert_eq!(names(), ["somebody-elses"]);
    }
}
