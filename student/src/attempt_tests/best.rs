//! `promote: best` where the best is damaged.

use std::{collections::BTreeMap, fs};

use retort_artifact::{checkpoint, paths, sha256_file};
use retort_core::Code;
use retort_proto::{TrainFinished, worker_event::What};

use super::world::{JOB, STEPS, World};

fn finished(world: &World) -> TrainFinished {
    let Some(What::TrainFinished(finished)) = world.events().pop() else { panic!("not finished") };
    finished
}

/// Hashes of all objects of the job's checkpoints, by key.
async fn checkpoints(world: &World) -> BTreeMap<String, String> {
    let entries = world.store.list(&paths::checkpoints_prefix(JOB)).await.unwrap();
    entries.into_iter().map(|entry| (entry.key.clone(), sha256_file(&world.object(&entry.key)).unwrap())).collect()
}

/// Step and KL of the checkpoints, the best first.
fn by_quality(finished: &TrainFinished) -> Vec<(u32, f64)> {
    let mut judged: Vec<(u32, f64)> = finished.curve[1..].iter().map(|point| (point.step, point.kl)).collect();
    judged.sort_by(|a, b| a.1.total_cmp(&b.1));
    judged
}

/// Has a checkpoint be the best, or the second: which one is by itself depends on the processor's rounding.
fn rate(world: &World, step: u32, kl: f64) {
    let path = world.object(&paths::manifest(&paths::checkpoint(JOB, step, 1)));
    let mut manifest: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    manifest["held_out"]["kl"] = kl.into();
    fs::write(path, manifest.to_string()).unwrap();
}

fn step_of(key: &str) -> u32 {
    paths::parse_checkpoint(JOB, key).unwrap().0
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_damaged_checkpoints_none_is_judged_and_none_is_touched() {
    let mut world = World::published().await;
    world.train = "keep: {last: 100}, promote: best".to_owned();
    world.run(&world.train_attempt(1)).await.unwrap();
    let steps: Vec<u32> =
        by_quality(&finished(&world)).iter().map(|(step, _)| *step).filter(|&step| step < STEPS).collect();
    rate(&world, steps[0], 1e-6);
    rate(&world, steps[1], 2e-6);
    world.run(&world.train_attempt(2)).await.unwrap();
    let best = finished(&world);
    assert_eq!(step_of(&best.checkpoint_key), steps[0]);

    // Its manifest cannot be read: the next best is judged. Nothing is left to train for this attempt.
    fs::write(world.object(&paths::manifest(&best.checkpoint_key)), "{").unwrap();
    let before = checkpoints(&world).await;
    world.run(&world.train_attempt(3)).await.unwrap();
    let next = finished(&world);
    assert_eq!(step_of(&next.checkpoint_key), steps[1]);
    assert_eq!(checkpoints(&world).await, before);

    // The weights of that one are damaged: the last is judged, and can be.
    world.damage(&format!("{}model/model.safetensors", next.checkpoint_key));
    let before = checkpoints(&world).await;
    world.run(&world.train_attempt(4)).await.unwrap();
    let last = finished(&world);
    assert_eq!(last.checkpoint_key, paths::checkpoint(JOB, STEPS, 1));
    world.run(&world.evaluate_attempt(1, &last.initial_key, &last.checkpoint_key)).await.unwrap();
    assert_eq!(checkpoints(&world).await, before);

    // One that is damaged after it was chosen is told by name.
    let error = world.run(&world.evaluate_attempt(2, &next.initial_key, &next.checkpoint_key)).await.unwrap_err();
    assert_eq!(error.code, Code::CheckpointCorrupt);
    assert!(error.message.contains(&format!("{}model/model.safetensors", next.checkpoint_key)), "{}", error.message);
    assert_eq!(checkpoints(&world).await, before);
}

/// A student with adapters has its merged folder only where it was the best so far.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoint_that_became_the_best_by_damage_gives_way_to_the_last() {
    let mut world = World::published().await;
    world.student = ", lora: {rank: 4, alpha: 8}";
    world.train = "learning_rate: 0.5, schedule: constant, keep: {last: 100}, promote: best".to_owned();
    world.run(&world.train_attempt(1)).await.unwrap();
    let judged = by_quality(&finished(&world));
    let mut bare = None;
    for (step, _) in judged.into_iter().filter(|(step, _)| *step < STEPS) {
        let manifest = checkpoint::manifest(&world.store, &paths::checkpoint(JOB, step, 1)).await.unwrap();
        if manifest.files.iter().all(|file| file.path != "model/config.json") {
            bare = Some(step);
        }
    }
    rate(&world, bare.expect("one that was not the best when it was written"), 1e-6);

    world.run(&world.train_attempt(2)).await.unwrap();
    let last = finished(&world);
    assert_eq!(last.checkpoint_key, paths::checkpoint(JOB, STEPS, 1));
    world.run(&world.evaluate_attempt(1, &last.initial_key, &last.checkpoint_key)).await.unwrap();
}
