//! A lead whose replica lies, replicas whose lead does, and a replica that makes room.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use retort_artifact::{
    Store,
    checkpoint::{self, Manifest},
    paths,
};
use retort_core::{Code, Error};
use retort_proto::{TrainFinished, worker_event::What};
use retort_worker::{Stop, StopSwitch};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::{
    exchange::{Delivery, Exchange, Part, Replica, Round},
    outer,
};
use crate::{
    attempt_tests::{
        log,
        world::{JOB, STEPS, World},
    },
    init, resume,
    train::spec_sha256,
    trainer::{Options, Trainer},
};

const EPOCH: u64 = 31;
const REPLICA: Replica = (1, 1);
const SOON: Duration = Duration::from_secs(20);
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Of constant rate, so that who else takes part changes nothing of a step.
async fn diloco() -> World {
    let mut world = World::published().await;
    world.train = "learning_rate: 0.01, schedule: constant, warmup_ratio: 0, \
                   parallel: {workers: 2, mode: diloco, inner_steps: 3, outer_momentum: 0.3}"
        .to_owned();
    world
}

fn finished(world: &World) -> TrainFinished {
    let Some(What::TrainFinished(finished)) = world.events().pop() else { panic!("not finished") };
    finished
}

/// SHA-256 of the weights that a job ended with.
async fn final_weights(world: &World) -> String {
    let manifest = checkpoint::manifest(&world.store, &finished(world).checkpoint_key).await.unwrap();
    manifest.files.iter().find(|file| file.path == "model/model.safetensors").unwrap().sha256.clone()
}

type Tensors = Vec<(String, Tensor)>;

/// What is wrong with weights or a difference.
struct Lie {
    /// What is said of it.
    told: &'static str,
    /// Changed before it is hashed.
    tensors: fn(&mut Tensors),
    /// Changed after it was.
    stored: fn(&mut Stored),
}

/// Of an object that is about to be placed.
struct Stored {
    weights: Option<Vec<u8>>,
    manifest: Value,
    /// In the manifest's place.
    garbage: Option<Vec<u8>>,
}

const UNTRUE: Lie = Lie { told: "", tensors: |_| {}, stored: |_| {} };

/// What can be wrong with either.
const LIES: [Lie; 13] = [
    Lie { told: "bytes, the manifest says", stored: |of| halve(of.weights.as_mut().unwrap()), ..UNTRUE },
    Lie { told: "it has sha256", stored: |of| of.weights.as_mut().unwrap()[2000] ^= 1, ..UNTRUE },
    Lie { told: "it is missing", stored: |of| of.weights = None, ..UNTRUE },
    Lie { told: "it is no manifest", stored: |of| of.garbage = Some(b"{".to_vec()), ..UNTRUE },
    Lie { told: "at most 16777216 are read here", stored: |of| of.garbage = Some(vec![b' '; 17 << 20]), ..UNTRUE },
    Lie { told: "it is of another spec", stored: |of| of.manifest["spec_sha256"] = json!("f00d"), ..UNTRUE },
    Lie {
        told: "it is not one file weights.safetensors of at most",
        stored: |of| of.manifest["files"][0]["bytes"] = json!(1_u64 << 50),
        ..UNTRUE
    },
    Lie {
        told: "it is not one file weights.safetensors of at most",
        tensors: |tensors| tensors.push(("more".to_owned(), Tensor::zeros([1 << 20], (Kind::Float, Device::Cpu)))),
        ..UNTRUE
    },
    Lie {
        told: "not f32 [",
        tensors: |tensors| {
            let (_, wide) = tensors.iter_mut().find(|(_, of)| of.dim() == 2 && of.size()[0] != of.size()[1]).unwrap();
            *wide = wide.transpose(0, 1).contiguous().copy();
        },
        ..UNTRUE
    },
    Lie { told: "is Half [", tensors: |tensors| tensors[1].1 = tensors[1].1.to_kind(Kind::Half), ..UNTRUE },
    Lie { told: "is not finite", tensors: |tensors| drop(tensors[2].1.fill_(f64::NAN)), ..UNTRUE },
    Lie { told: "it lacks", tensors: |tensors| tensors[3].0.push('x'), ..UNTRUE },
    Lie { told: "the student trains", tensors: |tensors| drop(tensors.pop()), ..UNTRUE },
];

/// What a replica alone can say.
const OF_ITS_WORK: [Lie; 2] = [
    Lie {
        told: "987654321 target tokens",
        stored: |of| of.manifest["exchange"]["target_tokens"] = json!(987_654_321),
        ..UNTRUE
    },
    Lie { told: "invalid type: string", stored: |of| of.manifest["exchange"]["loss"] = json!("low"), ..UNTRUE },
];

fn halve(bytes: &mut Vec<u8>) {
    bytes.truncate(bytes.len() / 2);
}

/// Publishes into a store of its own, tells `lie` of it, and places that at `prefix` of `store`.
async fn place(store: &Store, prefix: &str, sound: &Path, manifest: Manifest, lie: &Lie) {
    let folder = tempfile::tempdir().unwrap();
    let (draft, aside) = (folder.path().join("draft"), folder.path().join("store"));
    fs::create_dir_all(&draft).unwrap();
    let mut tensors = Tensor::read_safetensors(sound).unwrap();
    (lie.tensors)(&mut tensors);
    Tensor::write_safetensors(&tensors, Exchange::file(&draft)).unwrap();
    let aside = Store::open(&aside.display().to_string()).unwrap();
    let manifest = checkpoint::publish(&aside, "x/", &draft, manifest).await.unwrap();
    let weights = Some(fs::read(Exchange::file(&draft)).unwrap());
    let mut stored = Stored { weights, manifest: json!(manifest), garbage: None };
    (lie.stored)(&mut stored);

    let target = store.root().join(prefix);
    fs::create_dir_all(&target).unwrap();
    if let Some(weights) = stored.weights {
        fs::write(Exchange::file(&target), weights).unwrap();
    }
    // Under a name that the store does not list until it is whole.
    let written = target.join("manifest.json#1");
    fs::write(&written, stored.garbage.unwrap_or_else(|| stored.manifest.to_string().into_bytes())).unwrap();
    fs::rename(written, target.join("manifest.json")).unwrap();
}

fn manifest(spec_sha256: &str, said: Value) -> Manifest {
    let mut manifest = Manifest { job: JOB.to_owned(), spec_sha256: spec_sha256.to_owned(), ..Manifest::default() };
    manifest.extra.insert("exchange".to_owned(), said);
    manifest
}

/// Takes part in the first rounds of the lead, one for each lie.
async fn lie(world: &World, lies: &[&Lie]) {
    let spec = spec_sha256(&world.train_attempt(EPOCH).spec).unwrap();
    let lead = loop {
        match Exchange::newest(&world.store, JOB, &spec).await.unwrap() {
            Some(lead) => break lead,
            None => tokio::time::sleep(LOOK_AGAIN).await,
        }
    };
    // However often it is found out: in all of these rounds, and in none after them.
    lead.say_ready(REPLICA, lies.len() as u32 - 1, None).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    for (number, lie) in (0_u32..).zip(lies) {
        let round = loop {
            match lead.next_round(number.checked_sub(1)).await.unwrap() {
                Some(round) => break round,
                None => tokio::time::sleep(LOOK_AGAIN).await,
            }
        };
        assert_eq!((round.round, round.parts.len()), (number, 1), "the replica was given a part");
        let start = lead.fetch_weights(number, u64::MAX, folder.path()).await.unwrap();
        let delivery = Delivery { loss: 1.0, target_tokens: 1, tokens: 1 };
        let prefix = paths::exchange_delta(JOB, EPOCH, number, REPLICA);
        place(&world.store, &prefix, &start, manifest(&spec, json!(delivery)), lie).await;
    }
}

/// The training ends with the bytes of one without the replica, and the log says of each lie what was wrong.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_replica_should_not_have_sent_changes_nothing() {
    log::start();
    let (alone, world) = (diloco().await, diloco().await);
    let lies: Vec<&Lie> = LIES.iter().chain(&OF_ITS_WORK).collect();
    assert!(lies.len() as u32 <= STEPS / 3, "a round for each");
    let (attempt, of_alone) = (world.train_attempt(EPOCH), alone.train_attempt(EPOCH));
    let (trained, trained_alone, ()) = tokio::join!(world.run(&attempt), alone.run(&of_alone), lie(&world, &lies));
    trained.unwrap();
    trained_alone.unwrap();
    let (ended, expected) = (finished(&world), finished(&alone));
    assert_eq!((ended.steps, ended.processed_tokens), (STEPS, expected.processed_tokens));
    assert_eq!(final_weights(&world).await, final_weights(&alone).await);

    let work_dir = world.work_dir().display().to_string();
    let told = log::warnings("what a replica sent does not count");
    for lie in lies {
        let of_this = |line: &&String| {
            line.contains(&format!("exchange/{EPOCH:06}/")) || line.contains(&work_dir) || line.contains("987654321")
        };
        assert!(
            told.iter().filter(of_this).any(|line| line.contains(lie.told)),
            "{:?} is not among {told:#?}",
            lie.told
        );
    }
}

/// The job's weights before training in the store, and those that are trained in a file; where each lies.
async fn initial(world: &World, folder: &Path) -> (String, PathBuf) {
    let attempt = world.train_attempt(EPOCH);
    let place = (Device::Cpu, Kind::Float);
    let (model, _) = init::initial_model(&attempt.spec, &world.teacher, &[], place, &|| Ok(())).unwrap();
    resume::export(&model, &world.teacher.folder, &folder.join("initial/model")).unwrap();
    let key = paths::initial(JOB, EPOCH);
    checkpoint::publish(&world.store, &key, &folder.join("initial"), Manifest::default()).await.unwrap();
    let options = Options::of(&attempt.spec.train, STEPS, &world.settings());
    let (mut trainer, weights) = (Trainer::new(model, options).unwrap(), folder.join("weights.safetensors"));
    trainer.begin_round(None, Some(&weights)).unwrap();
    assert!(fs::metadata(&weights).unwrap().len() <= outer::max_bytes(&trainer.optimizer.masters()));
    (key, weights)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_trains_from_no_weights_but_its_leads() {
    log::start();
    let world = diloco().await;
    let folder = tempfile::tempdir().unwrap();
    let (initial_key, weights) = initial(&world, folder.path()).await;
    let attempt = world.replica_attempt(REPLICA.0, REPLICA.1);
    let spec = spec_sha256(&attempt.spec).unwrap();
    let beyond = Lie {
        told: "round 0 names batches beyond the plan's 48",
        stored: |of| of.manifest["exchange"]["parts"][0]["batches"] = json!([1, 48]),
        ..UNTRUE
    };
    let elsewhere =
        Lie { told: "it is not of this round", stored: |of| of.manifest["exchange"]["round"] = json!(7), ..UNTRUE };
    let parts = vec![Part { replica: REPLICA, batches: vec![2, 3] }];
    let round = Round { round: 0, initial_key, step: 0, parts, workers: 2 };
    let publish = async |epoch: u64, lie: &Lie| {
        let lead = Exchange::new(world.store.clone(), JOB, epoch, &spec);
        lead.open().await.unwrap();
        let prefix = paths::exchange_weights(JOB, epoch, 0);
        place(&world.store, &prefix, &weights, manifest(&spec, json!(round)), lie).await;
        lead
    };
    // Each of another lead, which is followed in the place of the one before.
    for (epoch, lie) in (EPOCH..).zip(LIES.iter().chain([&beyond, &elsewhere])) {
        let lead = publish(epoch, lie).await;
        // It costs that round alone and is said in the log, or ends the attempt.
        let said = || {
            let lines = log::warnings(lie.told);
            lines.iter().filter(|line| line.contains("takes no part") || line.contains("cannot be read")).count()
        };
        let (before, stop) = (said(), StopSwitch::default());
        let seen = async {
            while said() == before {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
            stop.stop(Stop::JobCancelled);
            std::future::pending().await
        };
        let ended = async {
            tokio::select! {
                ended = world.run_until(&attempt, stop.clone()) => ended,
                ended = seen => ended,
            }
        };
        let ended = tokio::time::timeout(SOON, ended).await;
        let refused = ended.unwrap_or_else(|_| panic!("{:?} was taken", lie.told)).unwrap_err();
        assert!([Code::JobCancelled, Code::ObjectTooLarge].contains(&refused.code), "{}", refused.chain());
        assert!(said() > before || refused.chain().contains(lie.told), "{:?}: {}", lie.told, refused.chain());
        assert_eq!(lead.delivered(0).await.unwrap(), []);
    }

    // Of sound ones it delivers.
    let lead = publish(EPOCH + 100, &UNTRUE).await;
    let stop = StopSwitch::default();
    let delivered = async {
        while lead.delivered(0).await.unwrap().is_empty() {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        stop.stop(Stop::JobCancelled);
    };
    let both = async { tokio::join!(world.run_until(&attempt, stop.clone()), delivered).0 };
    let ended = tokio::time::timeout(SOON, both).await.expect("it delivers");
    assert_eq!(ended.unwrap_err().code, Code::JobCancelled);
    assert_eq!(lead.delivered(0).await.unwrap(), [REPLICA]);
}

/// Waits until an attempt at replica 1 has delivered in some round of the lead.
async fn delivered(world: &World, of: Replica) {
    let manifest = format!("/deltas/{:05}-{}/manifest.json", of.0, of.1);
    let rounds = format!("{}rounds/", paths::exchange(JOB, EPOCH));
    while !world.store.list(&rounds).await.unwrap().iter().any(|entry| entry.key.ends_with(&manifest)) {
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_makes_room_for_another_task_and_comes_again() {
    let world = diloco().await;
    let alone = World::published().await;
    alone.run(&alone.train_attempt(1)).await.unwrap();

    let (lead, first, second) = (world.train_attempt(EPOCH), world.replica_attempt(1, 1), world.replica_attempt(1, 2));
    let (stop, last) = (StopSwitch::default(), StopSwitch::default());
    let training = async {
        world.run(&lead).await.unwrap();
        last.stop(Stop::JobCancelled);
    };
    let replicas = async {
        let waits = async {
            delivered(&world, (1, 1)).await;
            stop.set_others_wait(true);
        };
        let (ended, ()) = tokio::join!(world.run_until(&first, stop.clone()), waits);
        let again = world.run_until(&second, last.clone());
        let (again, ()) = tokio::join!(again, delivered(&world, (1, 2)));
        [ended, again].map(|ended| ended.map_err(|error: Error| error.code))
    };
    let both = async { tokio::join!(training, replicas).1 };
    let ended = tokio::time::timeout(3 * SOON, both).await.expect("it comes again");
    assert_eq!(ended, [Err(Code::AttemptYielded), Err(Code::JobCancelled)]);
    // Every batch was trained once by someone who delivered.
    let (ended, expected) = (finished(&world), finished(&alone));
    assert_eq!((ended.steps, ended.processed_tokens), (STEPS, expected.processed_tokens));
}
