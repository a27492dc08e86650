//! What `retort run` remembers, so that the same spec on the same home goes on with the job that
//! was under way: the request id, kept before the job is created, and the job once it is known.

use std::path::PathBuf;

use retort_core::{
    Code, Error, Kind, Result,
    spec::JobSpec,
    wire::{job_spec_to_proto, job_state_from_proto},
};
use retort_proto as proto;
use serde::{Deserialize, Serialize};

use crate::{
    client::Client,
    home::{Home, read_small, replace_file},
};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    pub request_id: String,
    /// `jobs/{job}`, once created.
    pub job: Option<String>,
    /// Its report is still to be printed, or its model to be exported.
    #[serde(default)]
    pub owed: bool,
}

/// The job that a run follows.
#[derive(Debug)]
pub struct Submitted {
    pub job: proto::Job,
    /// An earlier run began it: it is under way, or has ended and its result is still owed.
    pub resumed: bool,
}

/// The place of one spec's request: its file is named by the spec's content.
#[derive(Clone, Debug)]
pub struct Remembered(PathBuf);

impl Remembered {
    /// Two runs are about the same job when spec and prompts are the same: prompts that were edited
    /// since make another one.
    pub fn of(home: &Home, spec: &JobSpec) -> Result<Self> {
        let mut key =
            serde_json::to_vec(spec).map_err(|error| Error::internal(format!("cannot write a spec: {error}")))?;
        if let Some(prompts) = crate::home::local_folder(&spec.prompts.path).filter(|path| path.is_file()) {
            key.extend(retort_artifact::sha256_file(&prompts)?.as_bytes());
        }
        Ok(Self(home.requests().join(format!("{}.json", retort_artifact::sha256_hex(&key)))))
    }

    /// The request of an earlier run. A file that cannot be read as one counts as none.
    pub fn load(&self) -> Result<Option<Request>> {
        Ok(read_small(&self.0)?.and_then(|text| serde_json::from_str(&text).ok()))
    }

    pub fn save(&self, request: &Request) -> Result<()> {
        let text =
            serde_json::to_vec(request).map_err(|error| Error::internal(format!("cannot write a request: {error}")))?;
        replace_file(&self.0, &text)
    }

    /// Goes on with the job of this spec that is unfinished, or whose result was not delivered;
    /// else creates one. `new` always creates one.
    pub async fn submit(&self, client: &mut Client, spec: &JobSpec, new: bool) -> Result<Submitted> {
        let earlier = if new { None } else { self.load()? };
        let mut request = match earlier {
            Some(Request { job: Some(name), owed, .. }) => match client.get_job(&name).await {
                Ok(job) if is_open(&job) || (owed && has_result(&job)) => {
                    return Ok(Submitted { job, resumed: true });
                }
                Ok(_) => self.fresh()?,
                Err(error) if error.kind() == Kind::NotFound => self.fresh()?,
                Err(error) => return Err(error),
            },
            // The earlier run was cut off around its call: asking again is safe.
            Some(request) => request,
            None => self.fresh()?,
        };
        let mut created = client.create_job(job_spec_to_proto(spec), &request.request_id, false).await;
        let spent = match &created {
            Ok(job) => !is_open(job) && !has_result(job),
            Err(error) => error.code == Code::RequestReused,
        };
        if spent {
            request = self.fresh()?;
            created = client.create_job(job_spec_to_proto(spec), &request.request_id, false).await;
        }
        let job = created?;
        request.job = Some(job.name.clone());
        self.save(&request)?;
        Ok(Submitted { resumed: !is_open(&job), job })
    }

    /// The job's result has reached the user: from here on the same spec is another job.
    pub fn delivered(&self, job: &str) -> Result<()> {
        match self.load()? {
            Some(request) if request.job.as_deref() == Some(job) => self.save(&Request { owed: false, ..request }),
            _ => Ok(()),
        }
    }

    /// A request nobody made before, kept before it is sent.
    pub fn fresh(&self) -> Result<Request> {
        let request = Request { request_id: uuid::Uuid::new_v4().to_string(), job: None, owed: true };
        self.save(&request)?;
        Ok(request)
    }
}

/// Whether there is still something to follow.
pub fn is_open(job: &proto::Job) -> bool {
    job_state_from_proto(job.state).is_none_or(|state| !state.is_final())
}

/// Whether the job ended with something to deliver; one that failed or was cancelled did not.
fn has_result(job: &proto::Job) -> bool {
    matches!(job.state(), proto::JobState::Succeeded | proto::JobState::Rejected)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_spec_finds_its_request_and_another_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::resolve(Some(folder.path())).unwrap();
        let yaml =
            "name: a\nprompts: { path: /p }\nteacher: { model: /t }\nstudent: { init: { prune: { layers: 2 } } }";
        let mut spec = retort_core::spec::parse_yaml("a.yaml", yaml).unwrap();
        let remembered = Remembered::of(&home, &spec).unwrap();
        assert_eq!(remembered.load().unwrap(), None);
        let mut request = remembered.fresh().unwrap();
        request.job = Some("jobs/x".to_owned());
        remembered.save(&request).unwrap();
        assert_eq!(Remembered::of(&home, &spec).unwrap().load().unwrap(), Some(request));
        remembered.delivered("jobs/another").unwrap();
        assert!(remembered.load().unwrap().unwrap().owed);
        remembered.delivered("jobs/x").unwrap();
        assert!(!remembered.load().unwrap().unwrap().owed);
        spec.seed = 1;
        assert_eq!(Remembered::of(&home, &spec).unwrap().load().unwrap(), None);
        // Edited prompts are another job.
        spec.prompts.path = folder.path().join("p.jsonl").display().to_string();
        std::fs::write(&spec.prompts.path, "one").unwrap();
        Remembered::of(&home, &spec).unwrap().fresh().unwrap();
        assert!(Remembered::of(&home, &spec).unwrap().load().unwrap().is_some());
        std::fs::write(&spec.prompts.path, "two").unwrap();
        assert_eq!(Remembered::of(&home, &spec).unwrap().load().unwrap(), None);
    }
}
