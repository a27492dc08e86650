//! Names of jobs, tasks and workers.

use std::{fmt, str::FromStr};

use crate::{Code, Error, Result};

/// A job's uid: a UUID v7 in simple hex, so ids sort by creation.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(String);

impl JobId {
    pub fn generate() -> Self {
        Self(uuid::Uuid::now_v7().simple().to_string())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The resource name, `jobs/{job}`.
    pub fn resource_name(&self) -> String {
        format!("jobs/{}", self.0)
    }

    /// Reads `jobs/{job}` or the bare id.
    pub fn from_resource_name(name: &str) -> Result<Self> {
        name.strip_prefix("jobs/").unwrap_or(name).parse()
    }
}

impl FromStr for JobId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if text.len() == 32 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
            Ok(Self(text.to_owned()))
        } else {
            let shown: String = text.chars().take(80).collect();
            Err(Error::new(
                Code::RequestInvalid,
                format!(
                    "{shown:?} is no job: a job is named jobs/ and 32 hexadecimal digits, as `retort job list` shows it"
                ),
            ))
        }
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A task's id. It is derived from the job and what the task does, so planning twice names the
/// same tasks: `{job}/shard-00012`, `{job}/train`, `{job}/replica-00001`, `{job}/evaluate`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TaskId(String);

impl TaskId {
    pub fn shard(job: &JobId, shard: u32) -> Self {
        Self(format!("{job}/shard-{shard:05}"))
    }

    pub fn train(job: &JobId) -> Self {
        Self(format!("{job}/train"))
    }

    /// `number` counts from 1: the train task itself is the first of its workers.
    pub fn replica(job: &JobId, number: u32) -> Self {
        Self(format!("{job}/replica-{number:05}"))
    }

    /// The number of a replica's task.
    pub fn replica_number(&self) -> Option<u32> {
        self.short().strip_prefix("replica-")?.parse().ok()
    }

    pub fn evaluate(job: &JobId) -> Self {
        Self(format!("{job}/evaluate"))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The part after the job, such as `shard-00012`.
    pub fn short(&self) -> &str {
        self.0.split_once('/').map_or(self.0.as_str(), |(_, short)| short)
    }
}

impl FromStr for TaskId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let valid = text.len() <= 128
            && text.split_once('/').is_some_and(|(job, rest)| job.parse::<JobId>().is_ok() && !rest.is_empty());
        if valid {
            Ok(Self(text.to_owned()))
        } else {
            let shown: String = text.chars().take(80).collect();
            Err(Error::new(Code::RequestInvalid, format!("{shown:?} is no task id")))
        }
    }
}

impl fmt::Display for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One process of a worker: `teacher-{uuid}`. A restarted worker is another worker.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct WorkerId(String);

impl WorkerId {
    pub fn generate(role: &str) -> Self {
        Self(format!("{role}-{}", uuid::Uuid::now_v7().simple()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<String> for WorkerId {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
