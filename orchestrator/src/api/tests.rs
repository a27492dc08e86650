//! The service as callers see it: over gRPC, on a port of its own.

use std::{sync::Arc, time::Duration};

use retort_artifact::Store;
use retort_core::{
    Code, Error,
    clock::SystemClock,
    spec::JobSpec,
    wire::{from_status, job_spec_to_proto},
};
use retort_proto::{
    self as proto, WorkerEvent, claim_task_response::Answer, job_event, job_service_client::JobServiceClient,
    model_service_client::ModelServiceClient, worker_event::What, worker_service_client::WorkerServiceClient,
};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::{Status, transport::Channel};

use crate::{
    Options, Orchestrator, Settings,
    testing::{self, MemoryBus, SharedBus, write_inputs},
};

struct Service {
    folder: TempDir,
    bus: Arc<MemoryBus>,
    jobs: JobServiceClient<Channel>,
    models: ModelServiceClient<Channel>,
    workers: WorkerServiceClient<Channel>,
    channel: Channel,
    address: String,
    shutdown: CancellationToken,
    running: JoinHandle<retort_core::Result<()>>,
}

async fn start(folder: &std::path::Path, bus: &Arc<MemoryBus>) -> retort_core::Result<Orchestrator> {
    let options = Options {
        listen: "127.0.0.1:0".to_owned(),
        database: folder.join("retort.sqlite"),
        settings: Settings { lease: Duration::from_secs(1), ..Settings::default() },
    };
    let store = Store::open(folder.join("store").to_str().unwrap()).unwrap();
    Orchestrator::start(&options, store, Arc::new(SharedBus(Arc::clone(bus))), Arc::new(SystemClock)).await
}

async fn service() -> Service {
    let folder = tempfile::tempdir().unwrap();
    write_inputs(folder.path());
    let bus = Arc::default();
    let orchestrator = start(folder.path(), &bus).await.unwrap();
    let address = orchestrator.address().to_string();
    let shutdown = CancellationToken::new();
    let running = tokio::spawn(orchestrator.run(shutdown.clone()));
    let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
    Service {
        folder,
        bus,
        jobs: JobServiceClient::new(channel.clone()),
        models: ModelServiceClient::new(channel.clone()),
        workers: WorkerServiceClient::new(channel.clone()),
        channel,
        address,
        shutdown,
        running,
    }
}

impl Service {
    fn spec(&self) -> JobSpec {
        testing::spec(self.folder.path())
    }

    async fn create_with(
        &mut self,
        spec: &JobSpec,
        request_id: &str,
        validate_only: bool,
    ) -> Result<proto::Job, Status> {
        let request = proto::CreateJobRequest {
            spec: Some(job_spec_to_proto(spec)),
            request_id: request_id.to_owned(),
            validate_only,
        };
        Ok(self.jobs.create_job(request).await?.into_inner().job.unwrap())
    }

    async fn create(&mut self) -> proto::Job {
        self.create_with(&self.spec(), "", false).await.unwrap()
    }

    async fn get(&mut self, name: &str) -> Result<proto::Job, Status> {
        Ok(self.jobs.get_job(proto::GetJobRequest { name: name.to_owned() }).await?.into_inner())
    }

    async fn cancel(&mut self, name: &str) -> proto::Job {
        self.jobs.cancel_job(proto::CancelJobRequest { name: name.to_owned() }).await.unwrap().into_inner()
    }

    /// Does every task as it comes over the bus, until the job has ended.
    async fn work(&mut self, job: &str) {
        let mut done = 0;
        loop {
            let message = self.bus.sent.lock().unwrap().get(done).map(|(_, message)| message.clone());
            if let Some(message) = message {
                done += 1;
                self.attempt(&message.task_id).await;
            } else if self.get(job).await.unwrap().end_time.is_some() {
                return;
            } else {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }

    /// Claims with a task's record, and emits the result of what was given.
    async fn attempt(&mut self, task_id: &str) {
        if let Some(claimed) = self.claim(task_id, "worker-1").await {
            self.result(claimed).await;
        }
    }

    async fn claim(&mut self, task_id: &str, worker_id: &str) -> Option<proto::Claimed> {
        let request = proto::ClaimTaskRequest { task_id: task_id.to_owned(), worker_id: worker_id.to_owned() };
        match self.workers.claim_task(request).await.unwrap().into_inner().answer.unwrap() {
            Answer::Claimed(claimed) => Some(claimed),
            _ => None,
        }
    }

    async fn result(&self, claimed: proto::Claimed) {
        let job = claimed.job_id.parse().unwrap();
        let whats = match claimed.task.unwrap() {
            proto::claimed::Task::Shard(shard) => vec![testing::shard_ready(&job, shard.shard, claimed.epoch)],
            proto::claimed::Task::Train(train) => {
                let finished = testing::train_finished(&job, claimed.epoch);
                let store = Store::open(self.folder.path().join("store").to_str().unwrap()).unwrap();
                let key = format!("{}model/config.json", finished.checkpoint_key);
                store.put_new(&key, "{}".into()).await.unwrap();
                vec![testing::train_progress(train.steps, 1.0), What::TrainFinished(finished)]
            }
            // It computes until its lead is done.
            proto::claimed::Task::Replica(_) => vec![],
            proto::claimed::Task::Evaluate(evaluate) => {
                assert!(evaluate.checkpoint_key.contains("/checkpoints/"), "{evaluate:?}");
                vec![testing::evaluation(0.25)]
            }
        };
        for what in whats {
            self.report(&claimed.task_id, claimed.epoch, what);
        }
    }

    fn report(&self, task_id: &str, epoch: u64, what: What) {
        let (job_id, _) = task_id.split_once('/').unwrap();
        self.bus.write(WorkerEvent {
            event_id: uuid::Uuid::now_v7().to_string(),
            time: None,
            job_id: job_id.to_owned(),
            task_id: task_id.to_owned(),
            epoch,
            worker_id: "worker-1".to_owned(),
            what: Some(what),
        });
    }

    async fn watch(&mut self, name: &str, after_sequence: u64) -> (Vec<proto::JobEvent>, Option<Error>) {
        let request = proto::WatchJobRequest { name: name.to_owned(), after_sequence };
        let mut stream = self.jobs.watch_job(request).await.unwrap().into_inner();
        let mut events = Vec::new();
        loop {
            match stream.message().await {
                Ok(Some(event)) => events.push(event),
                Ok(None) => return (events, None),
                Err(status) => return (events, Some(from_status(&status))),
            }
        }
    }

    async fn stop(self) -> TempDir {
        self.shutdown.cancel();
        self.running.await.unwrap().unwrap();
        self.folder
    }
}

fn code(status: &Status) -> Code {
    from_status(status).code
}

#[tokio::test]
async fn a_job_runs_to_its_promotion_and_every_event_is_watched_once() {
    let mut service = service().await;
    let created = service.create().await;
    assert_eq!(created.state(), proto::JobState::Queued);
    assert_eq!(created.name, format!("jobs/{}", created.uid));
    let name = created.name.clone();

    let mut watcher = JobServiceClient::new(service.channel.clone());
    let request = proto::WatchJobRequest { name: name.clone(), after_sequence: 0 };
    let mut stream = watcher.watch_job(request).await.unwrap().into_inner();
    let live = tokio::spawn(async move {
        let mut events = Vec::new();
        while let Some(event) = stream.message().await.unwrap() {
            events.push(event);
        }
        events
    });
    service.work(&name).await;
    let live = live.await.unwrap();

    let sequences: Vec<_> = live.iter().map(|event| event.sequence).collect();
    assert_eq!(sequences, (1..=live.len() as u64).collect::<Vec<_>>());
    let published = live.iter().filter(|event| matches!(event.what, Some(job_event::What::ShardPublished(_)))).count();
    assert_eq!(published, 4);
    let last = live.last().unwrap();
    assert!(
        matches!(&last.what, Some(job_event::What::StateChanged(change)) if change.to() == proto::JobState::Succeeded)
    );

    // Resumed in the middle: the rest, and nothing twice. Past the end: nothing, at once.
    let (rest, error) = service.watch(&name, 3).await;
    assert!(error.is_none());
    assert_eq!(rest, live[3..]);
    assert_eq!(service.watch(&name, last.sequence).await.0, []);

    let job = service.get(&name).await.unwrap();
    let report = job.report.unwrap();
    assert_eq!(report.promoted, "models/support/versions/1");
    assert_eq!(report.after.unwrap().kl, 0.25);
    assert_eq!(job.progress.unwrap().shards_published, 4);

    let listed = service.models.list_models(proto::ListModelsRequest::default()).await.unwrap().into_inner();
    assert_eq!(listed.models.len(), 1);
    for model in ["models/support", "models/support/versions/1"] {
        let found = service.models.get_model(proto::GetModelRequest { name: model.into() }).await.unwrap().into_inner();
        assert_eq!((&found, found.job.as_str()), (&listed.models[0], name.as_str()));
    }
    for (model, expected) in [("models/other", Code::ModelNotFound), ("support", Code::RequestInvalid)] {
        let status = service.models.get_model(proto::GetModelRequest { name: model.into() }).await.unwrap_err();
        assert_eq!(code(&status), expected);
    }
    service.stop().await;
}

#[tokio::test]
async fn validating_stores_nothing() {
    let mut service = service().await;
    let job = service.create_with(&service.spec(), "", true).await.unwrap();
    assert_eq!((job.name.as_str(), job.uid.as_str()), ("", ""));
    assert_eq!(job.plan.unwrap().train_rows, 9);
    let listed = service.jobs.list_jobs(proto::ListJobsRequest::default()).await.unwrap().into_inner();
    assert_eq!(listed.jobs, []);
    let prompts = service.folder.path().join("store/prompts");
    assert!(!prompts.exists() || prompts.read_dir().unwrap().next().is_none());

    let mut spec = service.spec();
    spec.prompts.path = "/none/at/all.jsonl".to_owned();
    let status = service.create_with(&spec, "", true).await.unwrap_err();
    assert_eq!((status.code(), code(&status)), (tonic::Code::NotFound, Code::FileNotFound));
    spec.prompts.shard_rows = 0;
    assert_eq!(code(&service.create_with(&spec, "", true).await.unwrap_err()), Code::SpecInvalid);
    // Only here: workers run what an older version admitted.
    let mut idle = service.spec();
    idle.train.loss.skew_alpha = 0.5;
    for validate_only in [true, false] {
        let status = service.create_with(&idle, "", validate_only).await.unwrap_err();
        assert_eq!(code(&status), Code::SpecInvalid);
        assert!(status.message().contains("train.loss.skew_alpha 0.5 does nothing"), "{status}");
    }
    service.stop().await;
}

#[tokio::test]
async fn a_repeated_request_is_answered_with_its_first_job() {
    let mut service = service().await;
    let id = "0199f3a0-6b1e-7000-8000-00000000abcd";
    let first = service.create_with(&service.spec(), id, false).await.unwrap();
    // Even though its inputs are gone by now.
    std::fs::remove_file(service.folder.path().join("prompts.jsonl")).unwrap();
    let again = service.create_with(&service.spec(), &id.to_uppercase(), false).await.unwrap();
    assert_eq!(again.name, first.name);

    let mut other = service.spec();
    other.seed = 8;
    // Validating never answers with a job, and here the file is missed.
    assert_eq!(code(&service.create_with(&service.spec(), id, true).await.unwrap_err()), Code::FileNotFound);
    let status = service.create_with(&other, id, false).await.unwrap_err();
    assert_eq!((status.code(), code(&status)), (tonic::Code::AlreadyExists, Code::RequestReused));
    assert_eq!(code(&service.create_with(&other, "tuesday", false).await.unwrap_err()), Code::RequestInvalid);
    service.stop().await;
}

#[tokio::test]
async fn lists_are_paged_newest_first() {
    let mut service = service().await;
    let mut names = Vec::new();
    for _ in 0..5 {
        names.push(service.create().await.name);
    }
    service.cancel(&names[1]).await;
    names.reverse();
    let mut page = proto::ListJobsRequest { page_size: 2, ..Default::default() };
    let mut seen = Vec::new();
    loop {
        let answer = service.jobs.list_jobs(page.clone()).await.unwrap().into_inner();
        assert!(answer.jobs.len() <= 2);
        seen.extend(answer.jobs.into_iter().map(|job| job.name));
        if answer.next_page_token.is_empty() {
            break;
        }
        page.page_token = answer.next_page_token;
    }
    assert_eq!(seen, names);

    // A token of another filter is refused, the filter alone works.
    page.state = proto::JobState::Cancelled as i32;
    assert_eq!(code(&service.jobs.list_jobs(page.clone()).await.unwrap_err()), Code::RequestInvalid);
    page.page_token.clear();
    let cancelled = service.jobs.list_jobs(page.clone()).await.unwrap().into_inner();
    assert_eq!(cancelled.jobs.len(), 1);
    assert_eq!(cancelled.jobs[0].name, names[3]);
    page.page_size = -1;
    assert_eq!(code(&service.jobs.list_jobs(page).await.unwrap_err()), Code::RequestInvalid);
    service.stop().await;
}

#[tokio::test]
async fn cancelled_jobs_can_be_deleted_and_are_gone_then() {
    let mut service = service().await;
    let name = service.create().await.name;
    let delete = proto::DeleteJobRequest { name: name.clone() };
    let status = service.jobs.delete_job(delete.clone()).await.unwrap_err();
    assert_eq!((status.code(), code(&status)), (tonic::Code::FailedPrecondition, Code::JobNotFinal));
    assert_eq!(service.cancel(&name).await.state(), proto::JobState::Cancelled);
    assert_eq!(service.watch(&name, 0).await.0.len(), 1);
    service.jobs.delete_job(delete.clone()).await.unwrap();
    assert_eq!(code(&service.jobs.delete_job(delete).await.unwrap_err()), Code::JobNotFound);
    assert_eq!(code(&service.get(&name).await.unwrap_err()), Code::JobNotFound);
    assert_eq!(code(&service.get("jobs/nonsense").await.unwrap_err()), Code::RequestInvalid);
    service.stop().await;
}

#[tokio::test]
async fn workers_are_told_what_is_published_up_to_the_first_gap() {
    let mut service = service().await;
    let created = service.create().await;
    let shard = |shard: u32| format!("{}/shard-{shard:05}", created.uid);
    let list = |from_shard, split: proto::Split| proto::ListPublishedShardsRequest {
        job_id: created.uid.clone(),
        split: split as i32,
        from_shard,
    };
    // By priority: the held-out shard, then those to train on.
    let mut claimed = Vec::new();
    for index in 0..4 {
        claimed.push(service.claim(&shard(index), &format!("worker-{index}")).await.unwrap());
    }
    let late = claimed.remove(2);
    assert_eq!(late.task_id, shard(1));
    for claimed in claimed {
        service.result(claimed).await;
    }
    while service.get(&created.name).await.unwrap().progress.unwrap().shards_published < 3 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let train = service.workers.list_published_shards(list(0, proto::Split::Train)).await.unwrap().into_inner();
    assert_eq!((train.shards.len(), train.complete), (1, false));
    let held_out = service.workers.list_published_shards(list(0, proto::Split::HeldOut)).await.unwrap().into_inner();
    assert_eq!((held_out.shards[0].shard, held_out.complete), (3, true));
    service.result(late).await;
    while service.get(&created.name).await.unwrap().progress.unwrap().shards_published < 4 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let train = service.workers.list_published_shards(list(1, proto::Split::Train)).await.unwrap().into_inner();
    assert_eq!(train.shards.iter().map(|shard| shard.shard).collect::<Vec<_>>(), [1, 2]);
    assert!(train.complete);

    let report = proto::ReportCorruptShardRequest {
        job_id: created.uid.clone(),
        shard: 1,
        epoch: 1,
        worker_id: "student-1".to_owned(),
        reason: "wrong checksum".to_owned(),
    };
    service.workers.report_corrupt_shard(report).await.unwrap();
    let train = service.workers.list_published_shards(list(1, proto::Split::Train)).await.unwrap().into_inner();
    assert_eq!((train.shards.len(), train.complete), (0, false));
    assert_eq!(service.get(&created.name).await.unwrap().progress.unwrap().attempts_redone, 1);

    assert_eq!(
        code(&service.workers.list_published_shards(list(0, proto::Split::Unspecified)).await.unwrap_err()),
        Code::RequestInvalid
    );
    service.cancel(&created.name).await;
    assert_eq!(
        code(&service.workers.list_published_shards(list(0, proto::Split::Train)).await.unwrap_err()),
        Code::JobCancelled
    );
    service.stop().await;
}

#[tokio::test]
async fn stopping_ends_watches_at_once_and_a_new_start_goes_on() {
    let mut service = service().await;
    let name = service.create().await.name;
    let bus = Arc::clone(&service.bus);
    let shutdown = service.shutdown.clone();
    let started = std::time::Instant::now();
    let (watched, ()) = tokio::join!(service.watch(&name, 0), async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        shutdown.cancel();
    });
    assert_eq!(watched.1.unwrap().code, Code::OrchestratorUnavailable);
    let folder = service.stop().await;
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());

    let orchestrator = start(folder.path(), &bus).await.unwrap();
    assert_eq!(start(folder.path(), &bus).await.err().unwrap().code, Code::AlreadyRunning);
    drop(orchestrator);
}

#[tokio::test]
async fn a_port_in_use_is_said_so() {
    let service = service().await;
    let error = super::bind(&service.address).await.unwrap_err();
    assert_eq!(error.code, Code::PortInUse);
    assert!(error.message.contains(&service.address), "{}", error.message);
    assert_eq!(super::bind("nonsense").await.unwrap_err().code, Code::RequestInvalid);
    service.stop().await;
}

#[tokio::test]
async fn health_and_reflection_answer() {
    let service = service().await;
    let mut health = tonic_health::pb::health_client::HealthClient::new(service.channel.clone());
    for name in ["", "retort.v1.JobService", "retort.v1.WorkerService", "retort.v1.ModelService"] {
        let request = tonic_health::pb::HealthCheckRequest { service: name.to_owned() };
        let answer = health.check(request).await.unwrap().into_inner();
        assert_eq!(answer.status(), tonic_health::pb::health_check_response::ServingStatus::Serving, "{name}");
    }
    service.stop().await;
}

#[tokio::test]
async fn a_teacher_is_told_of_a_published_shard_of_the_same_work() {
    let mut service = service().await;
    let created = service.create().await;
    let id = format!("{}/shard-00000", created.uid);
    let claimed = service.claim(&id, "worker-1").await.unwrap();
    let good = proto::FindShardRequest {
        job_id: created.uid.clone(),
        task_id: claimed.task_id.clone(),
        epoch: claimed.epoch,
        work_sha256: "C".repeat(64),
    };
    let none = service.workers.find_shard(good.clone()).await.unwrap().into_inner();
    assert_eq!(none, proto::FindShardResponse::default());
    for (work, name) in [(String::new(), "empty"), ("c".repeat(65), "long"), ("g".repeat(64), "no hex")] {
        let request = proto::FindShardRequest { work_sha256: work, ..good.clone() };
        assert_eq!(code(&service.workers.find_shard(request).await.unwrap_err()), Code::RequestInvalid, "{name}");
    }
    for task_id in [format!("{}/train", created.uid), "nonsense".to_owned()] {
        let request = proto::FindShardRequest { task_id, ..good.clone() };
        assert_eq!(code(&service.workers.find_shard(request).await.unwrap_err()), Code::RequestInvalid);
    }
    let stale = proto::FindShardRequest { epoch: claimed.epoch + 1, ..good.clone() };
    assert_eq!(code(&service.workers.find_shard(stale).await.unwrap_err()), Code::AttemptFenced);

    let Some(proto::claimed::Task::Shard(task)) = claimed.task else { unreachable!() };
    let ready = testing::shard_ready(&created.uid.parse().unwrap(), task.shard, claimed.epoch);
    let What::ShardReady(ready) = ready else { unreachable!() };
    let ready = proto::ShardReady { work_sha256: "c".repeat(64), ..ready };
    service.report(&claimed.task_id, claimed.epoch, What::ShardReady(ready.clone()));
    while service.get(&created.name).await.unwrap().progress.unwrap().shards_published < 1 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let found = service.workers.find_shard(good).await.unwrap().into_inner();
    assert_eq!(found.fidelity, ready.fidelity);
    let shard = found.shard.unwrap();
    assert_eq!((shard.key, shard.sha256, shard.bytes), (ready.key, ready.sha256, ready.bytes));
    assert_eq!((shard.work_sha256, shard.reused), (ready.work_sha256, false));
    service.stop().await;
}
