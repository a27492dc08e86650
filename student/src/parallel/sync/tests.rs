//! A lead and its replicas over loopback: what they compute is what one worker computes, whoever comes, goes
//! or lies.

use std::time::Duration;

use retort_artifact::{
    checkpoint::{self, Manifest},
    paths,
};
use retort_core::{Result, wire::from_status};
use retort_proto::{
    self as proto, claimed::Task, follow_request::What as Say, follow_response,
    train_service_client::TrainServiceClient,
};
use retort_worker::{Attempt, ModelThread, Stop, StopSwitch, TaskContext};
use tch::{Device, Kind, Tensor};
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Channel};

use super::{
    frames::{Bounds, Incoming, Received},
    rendezvous::Rendezvous,
    *,
};
use crate::{
    attempt_tests::world::{JOB, STEPS, World},
    example::{Example, tests::example},
    init, resume,
    settings::Settings,
    train::no_trainer,
    trainer::{Options, Trainer},
};

mod strangers;

const VOCAB: u32 = 40;
const TOGETHER: u32 = 6;
const EPOCH: u64 = 4;
const SOON: Duration = Duration::from_secs(20);

/// Of different lengths, one without targets.
fn rows(step: u32) -> Vec<Example> {
    (0..7)
        .map(|i| example(u64::from(step) * 10 + i, 2 + i as usize, (i as usize * 5 + 3 * step as usize) % 17, 5, VOCAB))
        .chain([example(99, 5, 0, 5, VOCAB)])
        .collect()
}

/// With room for [`rows`] in a step.
fn wide(mut attempt: Attempt) -> Attempt {
    attempt.spec.train.batch_rows = 8;
    attempt
}

/// A lead with the job's initial weights, and who follows it.
struct Stage {
    world: World,
    settings: Settings,
    cx: TaskContext,
    thread: ModelThread<Option<Trainer>>,
    lead: Lead,
    replicas: Vec<(StopSwitch, JoinHandle<Result<()>>)>,
}

fn trainer(attempt: &Attempt, world: &World) -> Trainer {
    let place = (Device::Cpu, Kind::Float);
    let (model, _) = init::initial_model(&attempt.spec, &world.teacher, &[], place, &|| Ok(())).unwrap();
    let limits = crate::batch::Limits { max_tokens: 40 };
    Trainer::new(model, Options { train: attempt.spec.train.clone(), steps: STEPS, limits }).unwrap()
}

fn parameters(trainer: &Trainer) -> Vec<f32> {
    let flat = |(_, tensor): (String, Tensor)| Vec::<f32>::try_from(tensor.detach().view([-1])).unwrap();
    trainer.model.parameters().into_iter().flat_map(flat).collect()
}

impl Stage {
    async fn new(workers: u32) -> Self {
        let mut world = World::new();
        world.train = format!("learning_rate: 0.02, parallel: {{workers: {workers}}}");
        let attempt = wide(world.train_attempt(EPOCH));
        let cx = world.context(&attempt, StopSwitch::default());
        let settings = world.settings();
        let thread = ModelThread::spawn("trainer", || None).unwrap();
        let made = trainer(&attempt, &world);
        let folder = tempfile::tempdir().unwrap();
        resume::export(&made.model, &world.teacher.folder, &folder.path().join("model")).unwrap();
        let key = paths::initial(JOB, EPOCH);
        checkpoint::publish(&world.store, &key, folder.path(), Manifest::default()).await.unwrap();
        thread.call(move |slot: &mut Option<Trainer>| *slot = Some(made)).await.unwrap();
        let spec = retort_artifact::sha256_hex(&serde_json::to_vec(&attempt.spec).unwrap());
        let lead = Lead::open(&attempt, &cx, &settings, &thread, &key, &spec).await.unwrap().unwrap();
        Self { world, settings, cx, thread, lead, replicas: Vec::new() }
    }

    /// With replicas 1 to `workers` - 1 taking part.
    async fn full(workers: u32) -> Self {
        let mut stage = Self::new(workers).await;
        for number in 1..workers {
            stage.join(number, 1);
        }
        stage.lead.gather(workers as usize - 1).await;
        stage
    }

    fn join(&mut self, number: u32, epoch: u64) {
        let attempt = wide(self.world.replica_attempt(number, epoch));
        let stop = StopSwitch::default();
        let (cx, settings) = (self.world.context(&attempt, stop.clone()), self.settings.clone());
        let follow = async move {
            let Task::Replica(task) = attempt.work.clone() else { unreachable!() };
            follow(&attempt, &task, &cx, &settings).await
        };
        self.replicas.push((stop, tokio::spawn(follow)));
    }

    /// How a replica ends that does not fit.
    async fn refused(&self, attempt: &Attempt, kind: Kind) -> Error {
        let cx = self.world.context(attempt, StopSwitch::default());
        let settings = Settings { kind, ..self.settings.clone() };
        let Task::Replica(task) = attempt.work.clone() else { unreachable!() };
        let ended = tokio::time::timeout(SOON, follow(attempt, &task, &cx, &settings)).await;
        ended.expect("it is refused").unwrap_err()
    }

    /// Stops the replica that was the first to join of those that are left.
    async fn leave(&mut self) -> Error {
        let (stop, running) = self.replicas.remove(0);
        stop.stop(Stop::WorkerStopping);
        running.await.unwrap().unwrap_err()
    }

    async fn step(&mut self, step: u32) -> u32 {
        let (report, progress) = self.lead.step(&self.thread, rows(step), false, || {}).await.unwrap();
        let targets: usize = rows(step).iter().map(|row| row.targets.len()).sum();
        assert_eq!((report.step, progress.step), (step + 1, step + 1));
        assert_eq!(report.tokens, rows(step).iter().map(|row| row.input_len() as u64).sum::<u64>());
        assert!(progress.target_tokens >= targets as u64);
        assert!(progress.workers >= self.lead.workers());
        self.lead.workers()
    }

    /// Ends it; how far the weights lie from those of one worker alone after as many steps, relative to these.
    async fn difference(mut self, steps: u32) -> f64 {
        let together = self.thread.call(|slot| slot.as_ref().map(parameters)).await.unwrap().unwrap();
        while !self.replicas.is_empty() {
            assert_eq!(self.leave().await.code, Code::WorkerStopped);
        }
        self.lead.close(false).await;
        assert!(rendezvous::newest(&self.world.store, JOB).await.unwrap().is_none());
        let mut alone = trainer(&wide(self.world.train_attempt(EPOCH)), &self.world);
        for step in 0..steps {
            alone.step(&rows(step), &|| Ok(())).unwrap();
        }
        let alone = parameters(&alone);
        let square = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
        let far = square(&mut together.iter().zip(&alone).map(|(a, b)| f64::from(a - b)));
        far / square(&mut alone.iter().map(|&value| value.into()))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_number_of_workers_ends_where_one_does() {
    // Eight rows: of ten workers some have nothing to do.
    for workers in [2, 3, 10] {
        let mut stage = Stage::full(workers).await;
        for step in 0..TOGETHER {
            let took_part = stage.step(step).await;
            let with_targets = rows(step).iter().filter(|row| row.input_len() > 0).count() as u32;
            assert_eq!(took_part, workers.min(with_targets), "step {step}");
        }
        let difference = stage.difference(TOGETHER).await;
        assert!(difference < 1e-5, "{workers} workers: {difference}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_come_go_and_are_replaced_between_steps() {
    let mut stage = Stage::new(3).await;
    assert_eq!(stage.step(0).await, 1);
    stage.join(2, 1);
    stage.lead.gather(1).await;
    assert_eq!(stage.step(1).await, 2);
    stage.join(1, 1);
    stage.lead.gather(2).await;
    assert_eq!(stage.step(2).await, 3);
    assert_eq!(stage.leave().await.code, Code::WorkerStopped);
    assert_eq!(stage.step(3).await, 2);
    // Another attempt at it comes, whose steps are of weights that have changed since.
    stage.join(2, 2);
    stage.lead.gather(2).await;
    assert_eq!(stage.step(4).await, 3);
    let difference = stage.difference(5).await;
    assert!(difference < 1e-5, "{difference}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_makes_room_for_another_task_and_comes_again() {
    let mut stage = Stage::full(2).await;
    assert_eq!(stage.step(0).await, 2);
    let (stop, running) = stage.replicas.remove(0);
    stop.set_others_wait(true);
    let ended = tokio::time::timeout(SOON, running).await.expect("it makes room").unwrap();
    assert_eq!(ended.unwrap_err().code, Code::AttemptYielded);
    assert_eq!(stage.step(1).await, 1);
    // While nobody leads as well.
    let mut deaf = Stage::new(2).await;
    rendezvous::remove(&deaf.world.store, JOB, EPOCH).await.unwrap();
    deaf.join(1, 1);
    let (stop, running) = deaf.replicas.remove(0);
    stop.set_others_wait(true);
    let ended = tokio::time::timeout(SOON, running).await.expect("it makes room").unwrap();
    assert_eq!(ended.unwrap_err().code, Code::AttemptYielded);

    stage.join(1, 2);
    stage.lead.gather(1).await;
    assert_eq!(stage.step(2).await, 2);
    let difference = stage.difference(3).await;
    assert!(difference < 1e-5, "{difference}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_of_another_spec_or_dtype_or_model_ends_and_the_training_goes_on() {
    let mut stage = Stage::new(2).await;
    let attempt = wide(stage.world.replica_attempt(1, 1));
    let mut of_another_spec = attempt.clone();
    of_another_spec.spec.train.learning_rate *= 2.0;
    for (attempt, kind, what) in [(&of_another_spec, Kind::Float, "spec"), (&attempt, Kind::BFloat16, "dtype")] {
        let refused = stage.refused(attempt, kind).await;
        assert_eq!(refused.code, Code::ReplicaMismatch);
        assert!(refused.message.starts_with(&format!("{what}: replica 1 has ")), "{}", refused.message);
    }
    // The weights of another student where the lead's should be.
    let prefix = paths::initial(JOB, EPOCH);
    stage.world.store.delete(&paths::manifest(&prefix)).await.unwrap();
    stage.world.store.delete_prefix(&prefix).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let place = (Device::Cpu, Kind::Float);
    let deeper = retort_core::spec::Init::Prune(retort_core::spec::Prune::to_layers(3));
    let mut other = attempt.spec.clone();
    other.student.init = deeper;
    let (model, _) = init::initial_model(&other, &stage.world.teacher, &[], place, &|| Ok(())).unwrap();
    resume::export(&model, &stage.world.teacher.folder, &folder.path().join("model")).unwrap();
    checkpoint::publish(&stage.world.store, &prefix, folder.path(), Manifest::default()).await.unwrap();
    let refused = stage.refused(&attempt, Kind::Float).await;
    assert_eq!(refused.code, Code::ReplicaMismatch);
    assert!(refused.message.starts_with("parameters: replica 1 has "), "{}", refused.message);

    assert_eq!(stage.step(0).await, 1);
    let difference = stage.difference(1).await;
    assert!(difference < 1e-5, "{difference}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_step_without_targets_is_one_for_all() {
    let mut stage = Stage::full(2).await;
    stage.step(0).await;
    let none = vec![example(1, 5, 0, 3, VOCAB); 3];
    let (report, _) = stage.lead.step(&stage.thread, none, false, || {}).await.unwrap();
    assert_eq!((report.loss, report.tokens, stage.lead.workers()), (None, 0, 1));
    let (report, _) = stage.lead.step(&stage.thread, rows(2), false, || {}).await.unwrap();
    assert_eq!((report.step, stage.lead.workers()), (3, 2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_waits_for_the_next_lead_until_it_is_cancelled() {
    let mut stage = Stage::full(2).await;
    stage.step(0).await;
    let attempt = wide(stage.world.train_attempt(EPOCH + 1));
    let Stage { world, settings, cx, thread, lead, replicas } = stage;
    // As a kill would leave it: nobody takes back what the store says.
    drop(lead);
    let key = paths::initial(JOB, EPOCH);
    let spec = retort_artifact::sha256_hex(&serde_json::to_vec(&attempt.spec).unwrap());
    let lead = Lead::open(&attempt, &cx, &settings, &thread, &key, &spec).await.unwrap().unwrap();
    let mut stage = Stage { world, settings, cx, thread, lead, replicas };
    stage.lead.gather(1).await;
    assert_eq!(stage.step(1).await, 2);
    let difference = stage.difference(2).await;
    assert!(difference < 1e-5, "{difference}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_hear_that_the_training_has_ended() {
    let mut stage = Stage::full(2).await;
    stage.step(0).await;
    let Stage { lead, mut replicas, world, .. } = stage;
    let began = tokio::time::Instant::now();
    lead.close(true).await;
    assert!(began.elapsed() < lead::FAREWELL, "the replica took its leave: {:?}", began.elapsed());
    assert!(rendezvous::newest(&world.store, JOB).await.unwrap().is_none());
    // It waits for the orchestrator's word, should the lead die before its last checkpoint is stored.
    let (stop, running) = replicas.remove(0);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!running.is_finished());
    stop.stop(Stop::TrainingEnded);
    assert_eq!(running.await.unwrap().unwrap_err().code, Code::TrainingEnded);
}
