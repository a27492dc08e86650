use std::pin::Pin;

use futures::Stream;
use prost::Message as _;
use retort_core::{
    Result,
    id::JobId,
    wire::{job_spec_from_proto, job_spec_to_proto, job_state_from_proto},
};
use retort_proto::{self as proto, job_service_server::JobService};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::{invalid, paging, refuse, watch};
use crate::{
    context::Context,
    database::jobs,
    intake::{self, Created},
    progress,
    to_proto::{job_to_proto, plan_to_proto},
};

pub struct Jobs {
    context: Context,
    shutdown: CancellationToken,
}

impl Jobs {
    pub fn new(context: Context, shutdown: CancellationToken) -> Self {
        Self { context, shutdown }
    }

    async fn create(&self, request: proto::CreateJobRequest) -> Result<proto::Job> {
        let spec = request.spec.ok_or_else(|| invalid("spec is missing".to_owned()))?;
        let spec = job_spec_from_proto(spec)?;
        let request_id = match request.request_id.as_str() {
            "" => None,
            text => Some(canonical_uuid(text)?),
        };
        match intake::create(&self.context, spec.clone(), request_id.as_deref(), request.validate_only).await? {
            Created::Planned(plan) => Ok(proto::Job {
                spec: Some(job_spec_to_proto(&spec)),
                plan: Some(plan_to_proto(&plan)),
                ..proto::Job::default()
            }),
            Created::Job(job) => self.read(&job.id).await,
        }
    }

    async fn read(&self, id: &JobId) -> Result<proto::Job> {
        let mut snapshot = self.context.database.read().await?;
        let job = jobs::get(&mut snapshot, id).await?;
        let progress = progress::of(&mut snapshot, &job).await?;
        Ok(job_to_proto(&job, &progress))
    }

    async fn list(&self, request: proto::ListJobsRequest) -> Result<proto::ListJobsResponse> {
        let size = paging::size(request.page_size)?;
        let state = job_state_from_proto(request.state);
        if state.is_none() && request.state != proto::JobState::Unspecified as i32 {
            return Err(invalid(format!("state {} is not known", request.state)));
        }
        let list = format!("jobs {}", state.map_or("", |state| state.as_str()));
        let after = paging::after(&list, &request.page_token)?.map(|id| id.parse::<JobId>()).transpose()?;

        let mut snapshot = self.context.database.read().await?;
        let found = jobs::list(&mut snapshot, state, after.as_ref(), size + 1).await?;
        let mut answer = proto::ListJobsResponse::default();
        let mut bytes = 0;
        for (index, job) in found.iter().enumerate() {
            let progress = progress::of(&mut snapshot, job).await?;
            let listed = job_to_proto(job, &progress);
            bytes += listed.encoded_len();
            answer.jobs.push(listed);
            let full = index + 1 == size as usize || bytes > paging::MAX_PAGE_BYTES;
            if full && index + 1 < found.len() {
                answer.next_page_token = paging::token(&list, job.id.as_str());
            }
            if full {
                break;
            }
        }
        Ok(answer)
    }

    async fn cancel(&self, name: &str) -> Result<proto::Job> {
        let id = JobId::from_resource_name(name)?;
        intake::cancel(&self.context, &id).await?;
        self.read(&id).await
    }
}

#[tonic::async_trait]
impl JobService for Jobs {
    type WatchJobStream = Pin<Box<dyn Stream<Item = Result<proto::JobEvent, Status>> + Send>>;

    async fn create_job(
        &self,
        request: Request<proto::CreateJobRequest>,
    ) -> Result<Response<proto::CreateJobResponse>, Status> {
        let job = self.create(request.into_inner()).await.map_err(refuse)?;
        Ok(Response::new(proto::CreateJobResponse { job: Some(job) }))
    }

    async fn get_job(&self, request: Request<proto::GetJobRequest>) -> Result<Response<proto::Job>, Status> {
        let id = JobId::from_resource_name(&request.into_inner().name).map_err(refuse)?;
        self.read(&id).await.map(Response::new).map_err(refuse)
    }

    async fn list_jobs(
        &self,
        request: Request<proto::ListJobsRequest>,
    ) -> Result<Response<proto::ListJobsResponse>, Status> {
        self.list(request.into_inner()).await.map(Response::new).map_err(refuse)
    }

    async fn watch_job(
        &self,
        request: Request<proto::WatchJobRequest>,
    ) -> Result<Response<Self::WatchJobStream>, Status> {
        let request = request.into_inner();
        let id = JobId::from_resource_name(&request.name).map_err(refuse)?;
        self.read(&id).await.map_err(refuse)?;
        let events = watch::events(self.context.clone(), id, request.after_sequence, self.shutdown.clone());
        Ok(Response::new(Box::pin(events)))
    }

    async fn cancel_job(&self, request: Request<proto::CancelJobRequest>) -> Result<Response<proto::Job>, Status> {
        self.cancel(&request.into_inner().name).await.map(Response::new).map_err(refuse)
    }

    async fn delete_job(
        &self,
        request: Request<proto::DeleteJobRequest>,
    ) -> Result<Response<proto::DeleteJobResponse>, Status> {
        let id = JobId::from_resource_name(&request.into_inner().name).map_err(refuse)?;
        intake::delete(&self.context, &id).await.map_err(refuse)?;
        Ok(Response::new(proto::DeleteJobResponse {}))
    }
}

/// One spelling for one id.
fn canonical_uuid(text: &str) -> Result<String> {
    let parsed = if text.len() <= 64 { uuid::Uuid::parse_str(text).ok() } else { None };
    parsed.map(|uuid| uuid.simple().to_string()).ok_or_else(|| {
        let shown: String = text.chars().take(80).collect();
        invalid(format!("request_id is {shown:?}; it must be a UUID"))
    })
}
