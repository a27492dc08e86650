use retort_artifact::paths;
use retort_core::{
    Code, Error, Result,
    id::{JobId, TaskId},
    state::{JobState, TaskKind},
    wire::{duration_to_proto, job_spec_to_proto, split_from_proto, split_to_proto},
};
use retort_proto::{self as proto, claim_task_response::Answer, claimed::Task, worker_service_server::WorkerService};
use tonic::{Request, Response, Status};

use super::{invalid, refuse};
use crate::{
    context::Context,
    database::{
        jobs::{self, Job},
        shards,
    },
    events::is_sha256,
    intake,
    leases::{self, Beat, Claim, Lease},
    planner,
    to_proto::{fidelity_to_proto, published_to_proto},
};

/// Shards listed at once; the caller asks on from where the answer ends.
const MAX_LISTED: u32 = 1000;

pub struct Workers {
    context: Context,
}

impl Workers {
    pub fn new(context: Context) -> Self {
        Self { context }
    }

    async fn claim(&self, request: proto::ClaimTaskRequest) -> Result<Answer> {
        let worker = worker_id(&request.worker_id)?;
        let Ok(id) = request.task_id.parse::<TaskId>() else {
            return Ok(not_claimable(proto::not_claimable::Reason::UnknownTask));
        };
        Ok(match leases::claim(&self.context, &id, worker).await? {
            Claim::Claimed(lease) => Answer::Claimed(self.claimed(&lease)?),
            Claim::NotClaimable(reason) => not_claimable(reason),
            Claim::RetryAfter(wait) => Answer::RetryAfter(duration_to_proto(wait)),
        })
    }

    fn claimed(&self, lease: &Lease) -> Result<proto::Claimed> {
        let Lease { task, job } = lease;
        let incomplete = || Error::internal(format!("{} lacks what its kind needs", task.id));
        let what = match task.kind {
            TaskKind::Shard => {
                let slice = task.slice.ok_or_else(incomplete)?;
                Task::Shard(proto::ShardTask {
                    shard: slice.shard,
                    split: split_to_proto(slice.split) as i32,
                    first_row: slice.first_row,
                    rows: slice.rows,
                })
            }
            TaskKind::Train => Task::Train(train_task(job)),
            TaskKind::Replica => Task::Replica(proto::ReplicaTask {
                number: task.id.replica_number().ok_or_else(incomplete)?,
                train: Some(train_task(job)),
            }),
            TaskKind::Evaluate => {
                let finish = job.train_finish.as_ref().ok_or_else(incomplete)?;
                Task::Evaluate(proto::EvaluateTask {
                    shards: job.plan.held_out_shards,
                    checkpoint_key: finish.checkpoint_key.clone(),
                    initial_key: finish.initial_key.clone(),
                    samples: planner::SAMPLES,
                })
            }
        };
        Ok(proto::Claimed {
            task_id: task.id.as_str().to_owned(),
            job_id: job.id.as_str().to_owned(),
            epoch: task.epoch,
            lease: Some(duration_to_proto(self.context.settings.lease)),
            spec: Some(job_spec_to_proto(&job.spec)),
            prompt_set_key: paths::prompt_set(&job.prompt_set_sha256),
            prompt_set_sha256: job.prompt_set_sha256.clone(),
            task: Some(what),
        })
    }

    async fn beat(&self, request: proto::HeartbeatRequest) -> Result<proto::HeartbeatResponse> {
        let worker = worker_id(&request.worker_id)?;
        let id: TaskId = request.task_id.parse()?;
        let beat = leases::heartbeat(&self.context, &id, request.epoch, worker).await?;
        Ok(proto::HeartbeatResponse {
            cancelled: beat != Beat::Extended,
            training_ended: beat == Beat::TrainingEnded,
            lease: Some(duration_to_proto(self.context.settings.lease)),
            others_wait: leases::others_wait(&self.context, &id).await?,
        })
    }

    async fn list(&self, request: proto::ListPublishedShardsRequest) -> Result<proto::ListPublishedShardsResponse> {
        let id: JobId = request.job_id.parse()?;
        let split = split_from_proto(request.split)
            .ok_or_else(|| invalid(format!("split {} is not known; ask for train or held-out", request.split)))?;
        let mut snapshot = self.context.database.read().await?;
        let job = jobs::get(&mut snapshot, &id).await?;
        if matches!(job.state, JobState::Cancelled | JobState::Failed) {
            return Err(Error::new(Code::JobCancelled, format!("{} is {}", id.resource_name(), job.state)));
        }
        let range = job.plan.shards_of(split);
        let from = request.from_shard.clamp(range.start, range.end);
        let listed = shards::list_contiguous(&mut snapshot, &id, from, (range.end - from).min(MAX_LISTED)).await?;
        let complete = from as usize + listed.len() == range.end as usize;
        Ok(proto::ListPublishedShardsResponse {
            shards: listed.into_iter().map(published_to_proto).collect(),
            complete,
        })
    }

    async fn find(&self, request: proto::FindShardRequest) -> Result<proto::FindShardResponse> {
        let id: JobId = request.job_id.parse()?;
        let task_id: TaskId = request.task_id.parse()?;
        if !is_sha256(&request.work_sha256) {
            let shown: String = request.work_sha256.chars().take(80).collect();
            return Err(invalid(format!("work_sha256 is {shown:?}; it must be 64 hexadecimal digits")));
        }
        let mut snapshot = self.context.database.read().await?;
        leases::check(&mut snapshot, &id, &task_id, request.epoch).await?;
        let found = shards::find_work(&mut snapshot, &request.work_sha256.to_ascii_lowercase()).await?;
        Ok(match found {
            Some((shard, fidelity)) => proto::FindShardResponse {
                fidelity: fidelity_to_proto(&fidelity),
                shard: Some(published_to_proto(shard)),
            },
            None => proto::FindShardResponse::default(),
        })
    }

    async fn withdraw(&self, request: proto::ReportCorruptShardRequest) -> Result<()> {
        let worker = worker_id(&request.worker_id)?;
        let id: JobId = request.job_id.parse()?;
        let reason: String = request.reason.chars().take(1000).collect();
        intake::withdraw(&self.context, &id, request.shard, request.epoch, worker, &reason).await
    }
}

#[tonic::async_trait]
impl WorkerService for Workers {
    async fn claim_task(
        &self,
        request: Request<proto::ClaimTaskRequest>,
    ) -> Result<Response<proto::ClaimTaskResponse>, Status> {
        let answer = self.claim(request.into_inner()).await.map_err(refuse)?;
        Ok(Response::new(proto::ClaimTaskResponse { answer: Some(answer) }))
    }

    async fn heartbeat(
        &self,
        request: Request<proto::HeartbeatRequest>,
    ) -> Result<Response<proto::HeartbeatResponse>, Status> {
        self.beat(request.into_inner()).await.map(Response::new).map_err(refuse)
    }

    async fn list_published_shards(
        &self,
        request: Request<proto::ListPublishedShardsRequest>,
    ) -> Result<Response<proto::ListPublishedShardsResponse>, Status> {
        self.list(request.into_inner()).await.map(Response::new).map_err(refuse)
    }

    async fn find_shard(
        &self,
        request: Request<proto::FindShardRequest>,
    ) -> Result<Response<proto::FindShardResponse>, Status> {
        self.find(request.into_inner()).await.map(Response::new).map_err(refuse)
    }

    async fn report_corrupt_shard(
        &self,
        request: Request<proto::ReportCorruptShardRequest>,
    ) -> Result<Response<proto::ReportCorruptShardResponse>, Status> {
        self.withdraw(request.into_inner()).await.map_err(refuse)?;
        Ok(Response::new(proto::ReportCorruptShardResponse {}))
    }
}

fn worker_id(text: &str) -> Result<&str> {
    if (1..=128).contains(&text.len()) {
        Ok(text)
    } else {
        Err(invalid("worker_id must have 1 to 128 bytes".to_owned()))
    }
}

fn train_task(job: &Job) -> proto::TrainTask {
    proto::TrainTask { shards: job.plan.train_shards, rows: job.plan.train_rows, steps: job.plan.optimizer_steps }
}

fn not_claimable(reason: proto::not_claimable::Reason) -> Answer {
    Answer::NotClaimable(proto::NotClaimable { reason: reason as i32 })
}
