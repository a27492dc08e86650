//! An orchestrator that keeps one job a request id and tells every job the same story. What it must
//! remember across its own death lies in files beside its database.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::{collections::HashMap, fs, path::PathBuf, pin::Pin, time::Duration};

use retort_proto::{
    self as proto,
    job_event::What,
    job_service_server::{JobService, JobServiceServer},
    model_service_server::{ModelService, ModelServiceServer},
};
use tokio_stream::{Stream, StreamExt as _, wrappers::TcpListenerStream};
use tonic::{Request, Response, Status};

/// Events of a job that runs through.
pub const EVENTS: u64 = 6;

#[derive(Clone, Debug)]
pub struct Fake {
    /// Notes: `requests` (one `id job` a line), `final` (jobs that ended), and, put there by a test:
    /// `crash` (die once in mid-watch), `hold` (tell no further than event 3), `reject`, `fail`.
    pub notes: PathBuf,
    pub store: PathBuf,
}

impl Fake {
    /// Serves on `listen`; prints the readiness line once it does.
    pub async fn serve(self, listen: &str) {
        let listener = tokio::net::TcpListener::bind(listen).await.unwrap();
        println!("\n{{\"ready\":\"orchestrator\",\"listen\":\"{}\"}}", listener.local_addr().unwrap());
        tonic::transport::Server::builder()
            .add_service(JobServiceServer::new(self.clone()))
            .add_service(ModelServiceServer::new(self))
            .serve_with_incoming(TcpListenerStream::new(listener))
            .await
            .unwrap();
    }

    fn has(&self, note: &str) -> bool {
        self.notes.join(note).exists()
    }

    fn lines(&self, note: &str) -> Vec<String> {
        fs::read_to_string(self.notes.join(note)).unwrap_or_default().lines().map(str::to_owned).collect()
    }

    fn append(&self, note: &str, line: &str) {
        let mut lines = self.lines(note);
        lines.push(line.to_owned());
        fs::write(self.notes.join(note), lines.join("\n") + "\n").unwrap();
    }

    fn jobs(&self) -> Vec<String> {
        self.lines("requests").iter().filter_map(|line| Some(line.split_once(' ')?.1.to_owned())).collect()
    }

    fn state(&self, name: &str) -> proto::JobState {
        if self.lines("final").iter().any(|done| done == name) { self.last() } else { proto::JobState::Running }
    }

    /// How every job ends.
    fn last(&self) -> proto::JobState {
        match (self.has("reject"), self.has("fail")) {
            (true, _) => proto::JobState::Rejected,
            (_, true) => proto::JobState::Failed,
            _ => proto::JobState::Succeeded,
        }
    }

    fn job(&self, name: &str) -> Result<proto::Job, Status> {
        if !self.jobs().iter().any(|known| known == name) {
            return Err(Status::not_found("no such job"));
        }
        let state = self.state(name);
        Ok(proto::Job {
            name: name.to_owned(),
            spec: Some(proto::JobSpec { name: "support".to_owned(), ..Default::default() }),
            state: state as i32,
            plan: Some(plan()),
            progress: Some(progress(4, 8)),
            report: (state != proto::JobState::Running).then(|| self.report(state)),
            create_time: Some(prost_types::Timestamp { seconds: 1_800_000_000, nanos: 5 }),
            ..Default::default()
        })
    }

    /// Writes the model that the report speaks of.
    fn report(&self, state: proto::JobState) -> proto::Report {
        let promoted = state == proto::JobState::Succeeded;
        let folder = if promoted { "models/support/000001" } else { "jobs/j/checkpoints/000008-1/model" };
        fs::create_dir_all(self.store.join(folder)).unwrap();
        fs::create_dir_all(self.store.join("models/support/versions")).unwrap();
        fs::write(self.store.join(folder).join("config.json"), "{}").unwrap();
        if promoted {
            fs::write(self.store.join("models/support/versions/000001.json"), "{}").unwrap();
        }
        let quality = |kl| Some(proto::Quality { kl, top1_agreement: 0.5, tokens: 100, ..Default::default() });
        proto::Report {
            before: quality(4.0),
            after: quality(1.0),
            promoted: if promoted { "models/support/versions/1".to_owned() } else { String::new() },
            artifacts: HashMap::from([("checkpoint".to_owned(), "jobs/j/checkpoints/000008-1/".to_owned())]),
            ..Default::default()
        }
    }
}

fn plan() -> proto::Plan {
    let training = proto::TrainingPlan { batch_rows: 8, micro_batch_tokens: Some(512), ..Default::default() };
    proto::Plan {
        train_rows: 48,
        held_out_rows: 16,
        train_shards: 3,
        held_out_shards: 1,
        training: Some(training),
        ..Default::default()
    }
}

fn progress(shards: u32, step: u32) -> proto::Progress {
    let eta = Some(prost_types::Duration { seconds: 10, nanos: 0 });
    proto::Progress { shards_published: shards, shards_total: 4, step, steps_total: 8, eta, ..Default::default() }
}

fn event(sequence: u64, last: proto::JobState) -> proto::JobEvent {
    let running = proto::JobState::Running;
    let changed = |from, to| What::StateChanged(proto::StateChanged { from: from as i32, to: to as i32, error: None });
    let (state, shards, step, what) = match sequence {
        1 => (running, 0, 0, changed(proto::JobState::Queued, running)),
        2 => {
            let shard = proto::ShardPublished { shard: 0, epoch: 1, target_tokens: 64, bytes: 512, reused: false };
            (running, 1, 0, What::ShardPublished(shard))
        }
        3 => {
            let redone = proto::Redone {
                task: "j/shard-00001".to_owned(),
                epoch: 1,
                reason: "lease expired".to_owned(),
                ..Default::default()
            };
            (running, 1, 0, What::AttemptLost(proto::AttemptLost { redone: Some(redone) }))
        }
        4 => (running, 4, 4, What::TrainStepped(proto::TrainStepped { step: 4, loss: 1.5 })),
        5 => {
            let quality = Some(proto::Quality { kl: 1.0, top1_agreement: 0.5, ..Default::default() });
            (running, 4, 8, What::Evaluated(proto::Evaluated { quality, step: 8 }))
        }
        _ => (last, 4, 8, changed(running, last)),
    };
    proto::JobEvent {
        sequence,
        time: None,
        state: state as i32,
        progress: Some(progress(shards, step)),
        what: Some(what),
    }
}

#[tonic::async_trait]
impl JobService for Fake {
    async fn create_job(
        &self,
        request: Request<proto::CreateJobRequest>,
    ) -> Result<Response<proto::CreateJobResponse>, Status> {
        let request = request.into_inner();
        if request.validate_only {
            let job = proto::Job { spec: request.spec, plan: Some(plan()), ..Default::default() };
            return Ok(Response::new(proto::CreateJobResponse { job: Some(job) }));
        }
        let known = self
            .lines("requests")
            .iter()
            .find_map(|line| line.strip_prefix(&format!("{} ", request.request_id)).map(str::to_owned));
        let name = known.unwrap_or_else(|| {
            let name = format!("jobs/{:032x}", self.jobs().len() + 1);
            self.append("requests", &format!("{} {name}", request.request_id));
            name
        });
        Ok(Response::new(proto::CreateJobResponse { job: Some(self.job(&name)?) }))
    }

    async fn get_job(&self, request: Request<proto::GetJobRequest>) -> Result<Response<proto::Job>, Status> {
        let error = retort_core::Error::new(
            retort_core::Code::JobNotFound,
            "no such job; `retort job list` shows those there are",
        );
        self.job(&request.into_inner().name).map(Response::new).map_err(|_| retort_core::wire::to_status(&error))
    }

    /// Two a page, whatever was asked for.
    async fn list_jobs(
        &self,
        request: Request<proto::ListJobsRequest>,
    ) -> Result<Response<proto::ListJobsResponse>, Status> {
        let from: usize = request.into_inner().page_token.parse().unwrap_or(0);
        let names = self.jobs();
        let jobs = names.iter().skip(from).take(2).map(|name| self.job(name)).collect::<Result<_, _>>()?;
        let next_page_token = if from + 2 < names.len() { (from + 2).to_string() } else { String::new() };
        Ok(Response::new(proto::ListJobsResponse { jobs, next_page_token }))
    }

    type WatchJobStream = Pin<Box<dyn Stream<Item = Result<proto::JobEvent, Status>> + Send>>;

    async fn watch_job(
        &self,
        request: Request<proto::WatchJobRequest>,
    ) -> Result<Response<Self::WatchJobStream>, Status> {
        let request = request.into_inner();
        let fake = self.clone();
        let last = self.last();
        let stream = tokio_stream::iter(request.after_sequence + 1..=EVENTS).then(move |sequence| {
            let (fake, name) = (fake.clone(), request.name.clone());
            async move {
                tokio::time::sleep(Duration::from_millis(20)).await;
                if sequence == 4 && fake.has("crash") {
                    fs::remove_file(fake.notes.join("crash")).unwrap();
                    std::process::exit(9);
                }
                while sequence == 4 && fake.has("hold") {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                if sequence == EVENTS && !fake.lines("final").contains(&name) {
                    fake.append("final", &name);
                }
                Ok(event(sequence, last))
            }
        });
        Ok(Response::new(Box::pin(stream)))
    }

    async fn cancel_job(&self, request: Request<proto::CancelJobRequest>) -> Result<Response<proto::Job>, Status> {
        let job = self.job(&request.into_inner().name)?;
        Ok(Response::new(proto::Job { state: proto::JobState::Cancelled as i32, ..job }))
    }

    async fn delete_job(
        &self,
        request: Request<proto::DeleteJobRequest>,
    ) -> Result<Response<proto::DeleteJobResponse>, Status> {
        self.append("deleted", &request.into_inner().name);
        Ok(Response::new(proto::DeleteJobResponse {}))
    }
}

#[tonic::async_trait]
impl ModelService for Fake {
    async fn list_models(
        &self,
        _: Request<proto::ListModelsRequest>,
    ) -> Result<Response<proto::ListModelsResponse>, Status> {
        let quality = Some(proto::Quality { kl: 1.0, top1_agreement: 0.5, ..Default::default() });
        let model = proto::Model {
            name: "models/support/versions/1".to_owned(),
            job: "jobs/j".to_owned(),
            quality,
            ..Default::default()
        };
        Ok(Response::new(proto::ListModelsResponse { models: vec![model], next_page_token: String::new() }))
    }

    async fn get_model(&self, _: Request<proto::GetModelRequest>) -> Result<Response<proto::Model>, Status> {
        Err(Status::unimplemented("not told in this story"))
    }
}
