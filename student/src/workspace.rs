//! A folder of one attempt on local disk.

use std::{
    fs,
    path::{Path, PathBuf},
};

use retort_core::{Error, Result};
use retort_worker::Attempt;

/// Removed with everything in it when dropped, and by the task's next attempt on this machine if a
/// kill came first.
#[derive(Debug)]
pub struct Workspace {
    path: PathBuf,
}

impl Workspace {
    pub fn create(work_dir: &Path, attempt: &Attempt) -> Result<Self> {
        let task = format!("retort-student-{}-{}-", attempt.job, attempt.task.short());
        let left_behind = |name: &str| {
            name.strip_prefix(&task)
                .and_then(|epoch| epoch.parse::<u64>().ok())
                .is_some_and(|epoch| epoch < attempt.epoch)
        };
        fs::create_dir_all(work_dir).map_err(|error| Error::io(work_dir, error))?;
        for entry in fs::read_dir(work_dir).map_err(|error| Error::io(work_dir, error))?.flatten() {
            if entry.file_name().to_str().is_some_and(left_behind)
                && let Err(error) = fs::remove_dir_all(entry.path())
            {
                tracing::warn!("cannot remove what an earlier attempt left in {}: {error}", entry.path().display());
            }
        }
        let path = work_dir.join(format!("{task}{}", attempt.epoch));
        fs::create_dir_all(&path).map_err(|error| Error::io(&path, error))?;
        Ok(Self { path })
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
