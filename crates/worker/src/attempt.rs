use retort_core::{
    Code, Error, Result,
    id::{JobId, TaskId},
    spec::JobSpec,
    wire::job_spec_from_proto,
};
use retort_proto as proto;

/// One claim of a task, with everything needed to do it.
#[derive(Clone, Debug)]
pub struct Attempt {
    pub job: JobId,
    pub task: TaskId,
    /// Fencing number; part of every key this attempt writes.
    pub epoch: u64,
    pub spec: JobSpec,
    /// What to do: `shard`, `train` or `evaluate`. Never `None` inside `claimed`.
    pub work: proto::claimed::Task,
    /// The claim as it came; prompt set key and hash are read from it.
    pub claimed: proto::Claimed,
}

impl TryFrom<proto::Claimed> for Attempt {
    type Error = Error;

    fn try_from(claimed: proto::Claimed) -> Result<Self> {
        let spec = claimed
            .spec
            .clone()
            .ok_or_else(|| Error::new(Code::RequestInvalid, format!("the claim of {} has no spec", claimed.task_id)))?;
        let work = claimed.task.clone().ok_or_else(|| {
            Error::new(
                Code::RequestInvalid,
                format!(
                    "the claim of {} names no work this worker knows; is it older than the orchestrator?",
                    claimed.task_id
                ),
            )
        })?;
        Ok(Self {
            job: claimed.job_id.parse()?,
            task: claimed.task_id.parse()?,
            epoch: claimed.epoch,
            spec: job_spec_from_proto(spec)?,
            work,
            claimed,
        })
    }
}
