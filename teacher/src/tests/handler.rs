//! Whole attempts, from claim to event, with the store real and the rest standing in.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use retort_artifact::{Store, paths, prompts, sha256_hex};
use retort_core::{Code, Error, Result, id::WorkerId, wire::job_spec_to_proto};
use retort_proto::{self as proto, worker_event::What};
use retort_worker::{
    Attempt, Handler as _, Rest, Stop, StopSwitch, TaskContext,
    ports::{Events, Orchestrator},
};
use tch::{Device, Kind};

use super::{SAMPLED, compute, rows, spec, tiny};
use crate::{Teacher, handler::set_aside, shard::faithful, stage::Arithmetic};

const JOB: &str = "0190a5b4c6d87e8fa0b1c2d3e4f50617";

#[derive(Default)]
struct Seen(Mutex<Vec<What>>);

#[async_trait]
impl Events for Seen {
    async fn send(&self, event: &proto::WorkerEvent) -> Result<()> {
        self.0.lock().unwrap().extend(event.what.clone());
        Ok(())
    }
}

/// What is published, by its work.
#[derive(Default)]
struct Published(Mutex<Vec<(String, proto::FindShardResponse)>>);

#[async_trait]
impl Orchestrator for Published {
    async fn claim(&self, _: proto::ClaimTaskRequest) -> Result<proto::ClaimTaskResponse> {
        Err(Error::internal("not asked here"))
    }
    async fn heartbeat(&self, _: proto::HeartbeatRequest) -> Result<proto::HeartbeatResponse> {
        Err(Error::internal("not asked here"))
    }
    async fn list_published_shards(
        &self,
        _: proto::ListPublishedShardsRequest,
    ) -> Result<proto::ListPublishedShardsResponse> {
        Err(Error::internal("not asked here"))
    }
    async fn find_shard(&self, request: proto::FindShardRequest) -> Result<proto::FindShardResponse> {
        let known = self.0.lock().unwrap();
        Ok(known
            .iter()
            .find(|(work, _)| *work == request.work_sha256)
            .map(|(_, answer)| answer.clone())
            .unwrap_or_default())
    }
    async fn report_corrupt_shard(&self, _: proto::ReportCorruptShardRequest) -> Result<()> {
        Err(Error::internal("not asked here"))
    }
}

struct World {
    folder: tempfile::TempDir,
    store: Store,
    seen: Arc<Seen>,
    published: Arc<Published>,
    teacher: Teacher,
    prompt_set: String,
}

impl World {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        tiny::write(&folder.path().join("teacher"), 3);
        let store = Store::open(folder.path().join("store").to_str().unwrap()).unwrap();
        let jsonl = prompts::to_jsonl(&rows(6));
        let prompt_set = sha256_hex(&jsonl);
        store.put_new(&paths::prompt_set(&prompt_set), jsonl.into()).await.unwrap();
        let teacher = Teacher::new(Arithmetic::on(Device::Cpu, Kind::Float, Some(1)), Some(1)).unwrap();
        Self { folder, store, seen: Arc::default(), published: Arc::default(), teacher, prompt_set }
    }

    fn claimed(&self, epoch: u64) -> proto::Claimed {
        let shard = proto::ShardTask { shard: 1, split: proto::Split::Train as i32, first_row: 2, rows: 3 };
        proto::Claimed {
            task_id: format!("{JOB}/shard-00001"),
            job_id: JOB.to_owned(),
            epoch,
            lease: None,
            spec: Some(job_spec_to_proto(&spec(&self.folder.path().join("teacher"), SAMPLED))),
            prompt_set_key: paths::prompt_set(&self.prompt_set),
            prompt_set_sha256: self.prompt_set.clone(),
            task: Some(proto::claimed::Task::Shard(shard)),
        }
    }

    async fn run(&mut self, claimed: proto::Claimed, stop: StopSwitch) -> Result<()> {
        let (published, seen) = (Arc::clone(&self.published), Arc::clone(&self.seen));
        let worker = WorkerId::generate("teacher");
        let cx = TaskContext::new(&claimed, worker, self.store.clone(), published, seen, stop);
        match self.teacher.run(Attempt::try_from(claimed)?, &cx).await? {
            Rest::Nothing => Ok(()),
            Rest::After(rest) => rest.await,
        }
    }

    fn ready(&self) -> Vec<proto::ShardReady> {
        let seen = self.seen.0.lock().unwrap();
        seen.iter()
            .filter_map(|what| match what {
                What::ShardReady(ready) => Some(ready.clone()),
                _ => None,
            })
            .collect()
    }
}

#[tokio::test]
async fn a_shard_is_stored_and_reported_as_it_is() {
    let mut world = World::new().await;
    world.run(world.claimed(7), StopSwitch::default()).await.unwrap();
    let ready = world.ready();
    assert_eq!(ready.len(), 1);
    let ready = &ready[0];
    assert_eq!(ready.key, paths::shard(JOB, 1, 7));
    let bytes = world.store.get_verified(&ready.key, &ready.sha256, 1 << 20).await.unwrap();
    assert_eq!(bytes.len() as u64, ready.bytes);
    let shard = retort_artifact::soft_targets::decode(bytes, Default::default()).unwrap();
    assert_eq!((shard.sequences.len() as u64, shard.target_tokens()), (ready.rows, ready.target_tokens));
    assert_eq!(shard.sequences.iter().map(|s| s.row).collect::<Vec<_>>(), [2, 3, 4]);
    assert!(ready.seconds > 0.0);
    let fidelity = ready.fidelity.unwrap();
    assert!(fidelity.argmax_agreement > 0.99 && fidelity.mean_abs_error < 0.04, "{fidelity:?}");
}

#[tokio::test]
async fn an_upload_whose_answer_was_lost_is_done_again_without_harm() {
    let mut world = World::new().await;
    world.run(world.claimed(7), StopSwitch::default()).await.unwrap();
    world.run(world.claimed(7), StopSwitch::default()).await.unwrap();
    let ready = world.ready();
    assert_eq!(ready[0].sha256, ready[1].sha256);
}

#[tokio::test]
async fn anothers_bytes_under_our_key_are_never_passed_off_as_ours() {
    let mut world = World::new().await;
    world.store.put_new(&paths::shard(JOB, 1, 7), b"something else"[..].into()).await.unwrap();
    let error = world.run(world.claimed(7), StopSwitch::default()).await.unwrap_err();
    assert_eq!(error.code, Code::ObjectExists);
    assert!(world.ready().is_empty());
}

#[tokio::test]
async fn a_stopped_attempt_publishes_nothing() {
    let mut world = World::new().await;
    let stop = StopSwitch::default();
    stop.stop(Stop::Fenced);
    let error = world.run(world.claimed(7), stop).await.unwrap_err();
    assert_eq!(error.code, Code::AttemptFenced);
    assert!(!world.store.exists(&paths::shard(JOB, 1, 7)).await.unwrap());
    assert!(world.ready().is_empty());
}

#[tokio::test]
async fn wrong_claims_are_refused() {
    let mut world = World::new().await;
    let cases: [(&str, fn(&mut proto::Claimed), Code); 5] = [
        ("rows beyond the set", |c| c.task = shard_task(4, 3, proto::Split::Train), Code::RequestInvalid),
        ("no rows", |c| c.task = shard_task(0, 0, proto::Split::Train), Code::RequestInvalid),
        ("a training row held out", |c| c.task = shard_task(0, 3, proto::Split::HeldOut), Code::RequestInvalid),
        ("a train task", |c| c.task = Some(proto::claimed::Task::Train(Default::default())), Code::RequestInvalid),
        ("another prompt set", |c| c.prompt_set_sha256 = "0".repeat(64), Code::ShardCorrupt),
    ];
    for (name, change, code) in cases {
        let mut claimed = world.claimed(1);
        change(&mut claimed);
        let error = world.run(claimed, StopSwitch::default()).await.unwrap_err();
        assert_eq!(error.code, code, "{name}: {error}");
    }
    assert!(world.ready().is_empty());
}

fn shard_task(first_row: u64, rows: u32, split: proto::Split) -> Option<proto::claimed::Task> {
    Some(proto::claimed::Task::Shard(proto::ShardTask { shard: 1, split: split as i32, first_row, rows }))
}

const OTHER: &str = "0190a5b4c6d87e8fa0b1c2d3e4f50618";

impl World {
    /// The same shard as a second job's third.
    fn claimed_by_other(&self) -> proto::Claimed {
        let mut claimed = proto::Claimed { job_id: OTHER.to_owned(), ..self.claimed(1) };
        claimed.task_id = format!("{OTHER}/shard-00003");
        if let Some(proto::claimed::Task::Shard(shard)) = &mut claimed.task {
            shard.shard = 3;
        }
        claimed
    }

    /// Has the shard computed for the first job and published as it was reported.
    async fn publish(&mut self) -> proto::ShardReady {
        self.run(self.claimed(7), StopSwitch::default()).await.unwrap();
        let ready = self.ready().remove(0);
        let shard = proto::PublishedShard {
            shard: 1,
            epoch: 7,
            key: ready.key.clone(),
            sha256: ready.sha256.clone(),
            bytes: ready.bytes,
            rows: ready.rows,
            target_tokens: ready.target_tokens,
            work_sha256: ready.work_sha256.clone(),
            reused: false,
            teacher_sha256: ready.teacher_sha256.clone(),
        };
        let answer = proto::FindShardResponse { shard: Some(shard), fidelity: ready.fidelity };
        self.published.0.lock().unwrap().push((ready.work_sha256.clone(), answer));
        ready
    }

    fn change_published(&self, change: impl FnOnce(&mut proto::PublishedShard)) {
        change(self.published.0.lock().unwrap()[0].1.shard.as_mut().unwrap());
    }
}

#[tokio::test]
async fn a_published_shard_of_the_same_work_is_reported_and_not_computed() {
    let mut world = World::new().await;
    let first = world.publish().await;
    world.run(world.claimed_by_other(), StopSwitch::default()).await.unwrap();
    let second = world.ready().remove(1);
    assert_eq!(second, proto::ShardReady { reused: true, seconds: second.seconds, ..first });
    assert!(!world.store.exists(&paths::shard(OTHER, 3, 1)).await.unwrap());
}

#[tokio::test]
async fn a_published_shard_that_is_not_sound_is_computed_again() {
    let cases: [(&str, fn(&World, &proto::ShardReady)); 4] = [
        ("gone", |world, first| std::fs::remove_file(world.store.root().join(&first.key)).unwrap()),
        ("rotten", |world, first| {
            let path = world.store.root().join(&first.key);
            let mut bytes = std::fs::read(&path).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0x40;
            std::fs::write(path, bytes).unwrap();
        }),
        ("no shard", |world, first| {
            std::fs::write(world.store.root().join(&first.key), b"nonsense").unwrap();
            world.change_published(|shard| (shard.sha256, shard.bytes) = (sha256_hex(b"nonsense"), 8));
        }),
        ("miscounted", |world, _| world.change_published(|shard| shard.target_tokens += 1)),
    ];
    for (name, damage) in cases {
        let mut world = World::new().await;
        let first = world.publish().await;
        damage(&world, &first);
        world.run(world.claimed_by_other(), StopSwitch::default()).await.unwrap();
        let second = world.ready().remove(1);
        assert!(!second.reused, "{name}");
        assert_eq!(second.key, paths::shard(OTHER, 3, 1), "{name}");
        assert_eq!(second.work_sha256, first.work_sha256, "{name}");
        assert_eq!(second.target_tokens, first.target_tokens, "{name}");
    }
}

#[tokio::test]
async fn a_shard_published_under_another_works_name_is_not_taken() {
    let mut world = World::new().await;
    world.publish().await;
    // The same rows with another seed, whose name the orchestrator answers with the first one's shard.
    let mut claimed = world.claimed_by_other();
    claimed.spec.as_mut().unwrap().seed += 1;
    world.run(claimed.clone(), StopSwitch::default()).await.unwrap();
    let computed = world.ready().remove(1);
    assert!(!computed.reused);
    world.published.0.lock().unwrap()[0].0 = computed.work_sha256.clone();
    claimed.epoch += 1;
    world.run(claimed, StopSwitch::default()).await.unwrap();
    let again = world.ready().remove(2);
    assert!(!again.reused);
    assert_eq!(again.key, paths::shard(OTHER, 3, 2));
}

#[tokio::test]
async fn a_shard_that_is_not_what_the_teacher_said_is_set_aside_and_named() {
    let (_teacher, mut engine) = super::teacher();
    let spec = spec(std::path::Path::new("/teacher"), SAMPLED);
    let order = super::order(spec, rows(4), 0..2);
    let mut encoded = compute(&mut engine, &order, &mut super::on).unwrap();
    faithful(&order, &encoded).unwrap();
    encoded.fidelity.argmax_agreement = 0.5;
    let error = faithful(&order, &encoded).unwrap_err();
    assert_eq!((error.code, error.is_retryable()), (Code::ShardUnfaithful, false));

    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().to_str().unwrap()).unwrap();
    let error = set_aside(&store, &order, &encoded, error).await;
    let key = paths::quarantined(&order.job, order.shard, order.epoch);
    assert_eq!(error.code, Code::ShardUnfaithful);
    assert!(error.message.ends_with(&format!("it lies at {key}")), "{}", error.message);
    assert_eq!(store.get(&key, 1 << 20).await.unwrap(), encoded.bytes);
    let reason = store.get(&paths::quarantine_reason(&order.job, order.shard, order.epoch), 1 << 20).await.unwrap();
    let reason: serde_json::Value = serde_json::from_slice(&reason).unwrap();
    assert_eq!((&reason["code"], &reason["shard"]), (&"shard-unfaithful".into(), &order.shard.into()));
    assert_eq!(reason["fidelity"]["argmax_agreement"], 0.5);

    // What cannot be kept is still the same failure.
    let error = set_aside(&store, &order, &encoded, Error::new(Code::ShardUnfaithful, "off")).await;
    assert_eq!(error.code, Code::ShardUnfaithful);
    assert!(error.message.starts_with("off; it could not be kept at "), "{}", error.message);
}
