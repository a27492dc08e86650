//! Whole attempts against a real store and a stand-in orchestrator and broker: what a job would see.

mod best;
mod diloco;
pub(crate) mod log;
pub(crate) mod world;

use std::{fs, time::Duration};

use retort_artifact::{checkpoint, paths};
use retort_core::{
    Code,
    pruning::Pruning,
    spec::{Choose, Init, Prune},
    wire::pruning_from_proto,
};
use retort_proto::worker_event::What;
use retort_worker::Stop;
use world::{HELD_OUT_SHARDS, JOB, STEPS, TRAIN_SHARDS, World};

/// Weights of the job's last checkpoint, by hash.
async fn final_weights(world: &World) -> String {
    let (prefix, manifest) = checkpoint::latest(&world.store, JOB).await.unwrap().unwrap();
    assert_eq!(manifest.step, STEPS, "{prefix}");
    manifest.files.iter().find(|file| file.path == "model/model.safetensors").unwrap().sha256.clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_trains_while_shards_appear_and_the_student_gets_closer() {
    let world = World::new();
    let attempt = world.train_attempt(1);
    let publish = async {
        for shard in 0..TRAIN_SHARDS + HELD_OUT_SHARDS {
            tokio::time::sleep(Duration::from_millis(50)).await;
            world.publish(shard, 1).await;
        }
    };
    let (done, ()) = tokio::join!(world.run(&attempt), publish);
    done.unwrap();

    let events = world.events();
    let What::TrainFinished(finished) = events.last().unwrap() else { panic!("{:?}", events.last()) };
    assert_eq!(finished.steps, STEPS);
    assert_eq!(finished.checkpoint_key, paths::checkpoint(JOB, STEPS, 1));
    assert_eq!(finished.initial_key, paths::initial(JOB, 1));
    assert!(finished.processed_tokens > 0 && finished.tokens_per_second > 0.0 && finished.final_loss < 1.0);
    assert!(events.iter().any(|what| matches!(what, What::CheckpointWritten(written) if written.step == STEPS)));
    let measured = events.iter().filter_map(|what| match what {
        What::TrainProgress(progress) => progress.held_out_kl,
        _ => None,
    });
    assert!(measured.count() > 0);
    let manifest = checkpoint::manifest(&world.store, &finished.checkpoint_key).await.unwrap();
    assert_eq!(manifest.extra["shards"].as_array().unwrap().len(), TRAIN_SHARDS as usize);
    // What a checkpoint's event says of it stands in its manifest, and the curve ends with it.
    let held_out = manifest.held_out().unwrap();
    assert_eq!((held_out.step, held_out.target_tokens), (STEPS, manifest.target_tokens));
    let written = events.iter().rev().find_map(|what| match what {
        What::CheckpointWritten(written) => written.held_out,
        _ => None,
    });
    assert_eq!(written, finished.curve.last().copied());
    assert_eq!(written.unwrap().kl, held_out.kl);
    assert!(held_out.calibration_error > 0.0 && held_out.calibration_error < 1.0 && held_out.top1_agreement > 0.0);
    assert!(finished.curve.is_sorted_by_key(|point| point.step) && finished.curve.len() > 3);
    assert_eq!(fs::read_dir(world.work_dir()).unwrap().count(), 0, "the attempt tidied up");

    let finished = finished.clone();
    world.run(&world.evaluate_attempt(1, &finished.initial_key, &finished.checkpoint_key)).await.unwrap();
    let events = world.events();
    let What::EvaluationReady(ready) = events.last().unwrap() else { panic!("{:?}", events.last()) };
    let (before, after) = (ready.before.unwrap(), ready.after.unwrap());
    assert!(after.kl < 0.75 * before.kl, "{} -> {}", before.kl, after.kl);
    assert!(after.top1_agreement > before.top1_agreement);
    assert!(after.student_perplexity < before.student_perplexity);
    assert_eq!(after.teacher_perplexity, before.teacher_perplexity);
    assert!(after.student_perplexity > after.teacher_perplexity);
    for quality in [&before, &after, &ready.before_by_tag["even"], &ready.after_by_tag["even"]] {
        let errors = [quality.calibration_error.unwrap(), quality.teacher_calibration_error.unwrap()];
        assert!(errors.iter().all(|error| (0.0..1.0).contains(error)), "{errors:?}");
        assert!(quality.student_perplexity > 1.0 && quality.teacher_perplexity > 1.0);
    }
    assert_eq!(before.teacher_calibration_error, after.teacher_calibration_error);
    let of_tags: u64 = ["even", "odd"].iter().map(|tag| ready.after_by_tag[*tag].tokens).sum();
    assert_eq!((of_tags, after.tokens), (before.tokens, before.tokens));
    assert_eq!(ready.samples.len(), 3);
    for sample in &ready.samples {
        assert!(sample.prompt.starts_with("question "), "{sample:?}");
        assert!(!sample.teacher.is_empty() && !sample.row_id.is_empty());
        assert_ne!(sample.student_before, sample.student_after);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_training_goes_on_and_ends_with_the_same_bytes() {
    let straight = World::published().await;
    straight.run(&straight.train_attempt(1)).await.unwrap();

    let world = World::published().await;
    world.stop_after_checkpoints(1, Stop::Fenced);
    assert_eq!(world.run(&world.train_attempt(1)).await.unwrap_err().code, Code::AttemptFenced);
    let (_, manifest) = checkpoint::latest(&world.store, JOB).await.unwrap().unwrap();
    assert!(manifest.step < STEPS);
    world.stop_after_checkpoints(1, Stop::WorkerStopping);
    assert_eq!(world.run(&world.train_attempt(2)).await.unwrap_err().code, Code::WorkerStopped);
    world.never_stop();
    world.run(&world.train_attempt(3)).await.unwrap();
    assert_eq!(final_weights(&world).await, final_weights(&straight).await);
    // The weights before training are those of the first attempt.
    let What::TrainFinished(finished) = world.events().pop().unwrap() else { panic!("not finished") };
    assert_eq!(finished.initial_key, paths::initial(JOB, 1));

    // Killed between the last checkpoint and its event: nothing is left to train, only to tell.
    world.run(&world.train_attempt(4)).await.unwrap();
    let What::TrainFinished(again) = world.events().pop().unwrap() else { panic!("not finished") };
    assert_eq!((again.checkpoint_key, again.steps), (finished.checkpoint_key, STEPS));
    assert_eq!(again.processed_tokens, finished.processed_tokens);
}

/// Step and KL of every checkpoint's event, in their order.
fn judged(world: &World) -> Vec<(u32, f64)> {
    let judged = |what| match what {
        What::CheckpointWritten(written) => written.held_out.map(|point| (point.step, point.kl)),
        _ => None,
    };
    world.events().into_iter().filter_map(judged).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_best_checkpoint_is_kept_and_judged_whoever_was_killed() {
    let mut world = World::published().await;
    // Too fast: the end is not the best.
    world.train =
        "learning_rate: 0.3, adam_embedding_epsilon: 1e-8, schedule: constant, keep: {last: 1}, promote: best"
            .to_owned();
    world.stop_after_checkpoints(4, Stop::Fenced);
    assert_eq!(world.run(&world.train_attempt(1)).await.unwrap_err().code, Code::AttemptFenced);
    world.never_stop();
    world.run(&world.train_attempt(2)).await.unwrap();

    let What::TrainFinished(finished) = world.events().pop().unwrap() else { panic!("not finished") };
    let curve: Vec<(u32, f64)> = finished.curve.iter().map(|point| (point.step, point.kl)).collect();
    // The second attempt went on with the curve of the first.
    let steps: Vec<u32> = curve.iter().map(|(step, _)| *step).collect();
    assert_eq!(steps, [0, 7, 14, 21, 28, 35, 42, STEPS]);
    let judged = judged(&world);
    // To the last bit, though a manifest is text.
    assert!(judged.len() >= 4 && judged.iter().all(|point| curve.contains(point)), "{judged:?} {curve:?}");
    let (best, _) = *curve[1..].iter().rev().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    assert!(best < STEPS, "{curve:?}");
    assert_eq!(paths::parse_checkpoint(JOB, &finished.checkpoint_key).unwrap().0, best);
    // It is all there, beside the last.
    let folder = world.work_dir().join("best");
    checkpoint::fetch(&world.store, &finished.checkpoint_key, &folder).await.unwrap();
    let (newest, manifest) = checkpoint::latest(&world.store, JOB).await.unwrap().unwrap();
    assert_eq!(manifest.step, STEPS);
    let left = world.store.list(&paths::checkpoints_prefix(JOB)).await.unwrap();
    assert!(left.iter().all(|entry| entry.key.starts_with(&newest) || entry.key.starts_with(&finished.checkpoint_key)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_held_out_rows_the_last_checkpoint_is_the_best() {
    let mut world = World::new();
    world.train = "learning_rate: 0.02, promote: best".to_owned();
    for shard in 0..TRAIN_SHARDS {
        world.publish(shard, 1).await;
    }
    world.run(&world.train_attempt(1)).await.unwrap();
    let What::TrainFinished(finished) = world.events().pop().unwrap() else { panic!("not finished") };
    assert_eq!(finished.checkpoint_key, paths::checkpoint(JOB, STEPS, 1));
    assert!(finished.curve.is_empty() && judged(&world).is_empty());
    assert_eq!(checkpoint::manifest(&world.store, &finished.checkpoint_key).await.unwrap().held_out(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_checkpoint_alone_holds_the_gguf_files() {
    let mut world = World::published().await;
    world.gguf = "q8_0, f16";
    world.run(&world.train_attempt(1)).await.unwrap();
    let (prefix, manifest) = checkpoint::latest(&world.store, JOB).await.unwrap().unwrap();
    let mut keys: Vec<String> = world.store.list("jobs/").await.unwrap().into_iter().map(|entry| entry.key).collect();
    keys.retain(|key| key.ends_with(".gguf"));
    keys.sort();
    assert_eq!(keys, ["t-F16.gguf", "t-Q8_0.gguf"].map(|name| format!("{prefix}model/{name}")));
    let file = manifest.files.iter().find(|file| file.path == "model/t-F16.gguf").unwrap();
    let bytes = fs::read(world.object(&keys[0])).unwrap();
    assert!(bytes.starts_with(b"GGUF") && bytes.len() as u64 == file.bytes);

    // Nothing is left to train, and the checkpoint is read as any other.
    world.run(&world.train_attempt(2)).await.unwrap();
    let What::TrainFinished(finished) = world.events().pop().unwrap() else { panic!("not finished") };
    assert_eq!(finished.checkpoint_key, prefix);
}

/// With inputs dropped, on a base of bytes; what lies in the store is what the evaluation and PEFT read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopped_adapters_go_on_and_end_with_the_same_bytes() {
    let adapted = || async {
        let mut world = World::published().await;
        world.student = ", lora: {rank: 4, alpha: 8, dropout: 0.1, base: int8}";
        world
    };
    let straight = adapted().await;
    straight.run(&straight.train_attempt(1)).await.unwrap();

    let world = adapted().await;
    world.stop_after_checkpoints(1, Stop::Fenced);
    assert_eq!(world.run(&world.train_attempt(1)).await.unwrap_err().code, Code::AttemptFenced);
    let (prefix, manifest) = checkpoint::latest(&world.store, JOB).await.unwrap().unwrap();
    assert!(manifest.step < STEPS);
    let files: Vec<&str> = manifest.files.iter().map(|file| file.path.as_str()).collect();
    let adapter = ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"];
    assert_eq!(files, [&adapter[..], &["state/optimizer.safetensors", "state/trainer.json"]].concat(), "{prefix}");
    world.never_stop();
    world.run(&world.train_attempt(2)).await.unwrap();
    assert_eq!(final_weights(&world).await, final_weights(&straight).await);

    let What::TrainFinished(finished) = world.events().pop().unwrap() else { panic!("not finished") };
    assert_eq!(finished.initial_key, paths::initial(JOB, 1));
    world.run(&world.evaluate_attempt(1, &finished.initial_key, &finished.checkpoint_key)).await.unwrap();
    let What::EvaluationReady(ready) = world.events().pop().unwrap() else { panic!("not judged") };
    let (before, after) = (ready.before.unwrap(), ready.after.unwrap());
    assert!(after.kl < 0.9 * before.kl, "{} -> {}", before.kl, after.kl);

    // The weights that it began with are made again, and the adapters stay those of its last checkpoint.
    fs::remove_file(world.object(&format!("{}model/model.safetensors", finished.initial_key))).unwrap();
    world.run(&world.train_attempt(3)).await.unwrap();
    let What::TrainFinished(again) = world.events().pop().unwrap() else { panic!("not finished") };
    assert_eq!(
        (again.initial_key, again.checkpoint_key),
        (paths::initial(JOB, 3), finished.checkpoint_key),
        "nothing is trained again"
    );
    assert_eq!(final_weights(&world).await, final_weights(&straight).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_checkpoint_is_passed_over_for_the_one_before() {
    let straight = World::published().await;
    straight.run(&straight.train_attempt(1)).await.unwrap();

    let world = World::published().await;
    world.stop_after_checkpoints(2, Stop::Fenced);
    world.run(&world.train_attempt(1)).await.unwrap_err();
    let (newest, _) = checkpoint::latest(&world.store, JOB).await.unwrap().unwrap();
    world.damage(&format!("{newest}state/optimizer.safetensors"));
    world.never_stop();
    world.run(&world.train_attempt(2)).await.unwrap();
    assert!(!world.store.exists(&paths::manifest(&newest)).await.unwrap());
    assert_eq!(final_weights(&world).await, final_weights(&straight).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoint_of_another_spec_is_refused_by_name_and_stays() {
    let mut world = World::published().await;
    let averaged = "learning_rate: 0.02, ema_decay: 0.5";
    let plain = std::mem::replace(&mut world.train, averaged.to_owned());
    world.stop_after_checkpoints(1, Stop::Fenced);
    world.run(&world.train_attempt(1)).await.unwrap_err();
    world.never_stop();
    let (prefix, manifest) = checkpoint::latest(&world.store, JOB).await.unwrap().unwrap();

    world.train = plain;
    let error = world.run(&world.train_attempt(2)).await.unwrap_err();
    assert_eq!(error.code, Code::CheckpointMismatch);
    assert!(error.message.contains(&prefix) && error.message.contains(&manifest.spec_sha256), "{}", error.message);
    assert!(error.is_retryable());
    assert_eq!(checkpoint::latest(&world.store, JOB).await.unwrap().unwrap().0, prefix);
    let folder = world.work_dir().join("still");
    checkpoint::fetch(&world.store, &prefix, &folder).await.unwrap();

    // What it is of goes on with it.
    world.train = averaged.to_owned();
    world.run(&world.train_attempt(3)).await.unwrap();
    let What::TrainFinished(finished) = world.events().pop().unwrap() else { panic!("not finished") };
    assert_eq!(finished.initial_key, paths::initial(JOB, 1));
}

/// Gone, as an attempt leaves it that wrote a checkpoint after the next one had swept its weights before training; or
/// damaged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_weights_before_training_are_made_again_and_the_checkpoint_is_kept() {
    let straight = World::published().await;
    straight.run(&straight.train_attempt(1)).await.unwrap();
    let weights = |epoch| format!("{}model/model.safetensors", paths::initial(JOB, epoch));
    let before = fs::read(straight.object(&weights(1))).unwrap();

    for gone in [true, false] {
        let world = World::published().await;
        world.stop_after_checkpoints(1, Stop::Fenced);
        world.run(&world.train_attempt(1)).await.unwrap_err();
        world.never_stop();
        let (_, newest) = checkpoint::latest(&world.store, JOB).await.unwrap().unwrap();
        let told = world.events().len();
        if gone {
            world.store.delete(&paths::manifest(&paths::initial(JOB, 1))).await.unwrap();
            world.store.delete_prefix(&paths::initial(JOB, 1)).await.unwrap();
        } else {
            world.damage(&weights(1));
        }
        world.run(&world.train_attempt(2)).await.unwrap();
        let What::TrainFinished(finished) = world.events().pop().unwrap() else { panic!("not finished") };
        assert_eq!(finished.initial_key, paths::initial(JOB, 2));
        assert!(fs::read(world.object(&weights(2))).unwrap() == before);
        let events = world.events();
        let steps = events[told..].iter().filter_map(|what| match what {
            What::TrainProgress(progress) => Some(progress.step),
            _ => None,
        });
        assert!(steps.min() > Some(newest.step), "it goes on from its checkpoint");
        assert_eq!(final_weights(&world).await, final_weights(&straight).await);
        world.run(&world.evaluate_attempt(1, &finished.initial_key, &finished.checkpoint_key)).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_corrupt_shard_is_reported_and_trained_on_only_when_published_again() {
    let clean = World::published().await;
    clean.run(&clean.train_attempt(1)).await.unwrap();

    let world = World::published().await;
    world.damage(&paths::shard(JOB, 1, 1));
    fs::remove_file(world.object(&paths::shard(JOB, TRAIN_SHARDS, 1))).unwrap();
    world.run(&world.train_attempt(1)).await.unwrap();
    let mut reported = world.reported();
    reported.sort_unstable();
    assert_eq!(reported, [(1, 1), (TRAIN_SHARDS, 1)]);
    assert_eq!(final_weights(&world).await, final_weights(&clean).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_that_stays_corrupt_ends_the_attempt() {
    let world = World::published().await;
    world.always_damage(0);
    world.damage(&paths::shard(JOB, 0, 1));
    let error = world.run(&world.train_attempt(1)).await.unwrap_err();
    assert_eq!(error.code, Code::ShardCorrupt);
    assert!(error.message.contains("shard 0 was found corrupt 6 times"), "{}", error.message);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shards_that_another_job_computed_train_the_same_student() {
    let own = World::published().await;
    own.run(&own.train_attempt(1)).await.unwrap();

    let mut world = World::new();
    world.reuse();
    for shard in 0..TRAIN_SHARDS + HELD_OUT_SHARDS {
        world.publish(shard, 1).await;
    }
    world.run(&world.train_attempt(1)).await.unwrap();
    assert_eq!(world.reported(), []);
    assert_eq!(final_weights(&world).await, final_weights(&own).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reused_shard_of_other_rows_or_that_is_not_called_reused_is_refused() {
    let mut world = World::new();
    world.reuse();
    world.shift = 1;
    world.publish(0, 1).await;
    let error = world.run(&world.train_attempt(1)).await.unwrap_err();
    assert_eq!(error.code, Code::ShardCorrupt);
    let expected = r#"it has row "row-1" of line 1, where the train rows go on with "row-0" of line 0"#;
    assert!(error.message.contains(expected), "{}", error.message);

    let mut world = World::new();
    let other = "0190a5b4c6d87e8fa0b1c2d3e4f5eeee";
    world.header.job = other.to_owned();
    world.publish(0, 1).await;
    let error = world.run(&world.train_attempt(1)).await.unwrap_err();
    assert_eq!(error.code, Code::ShardCorrupt);
    assert!(error.message.contains(other) && error.message.contains(JOB), "{}", error.message);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_of_another_teacher_than_was_published_is_refused_with_both_named() {
    let mut world = World::new();
    world.header.teacher_sha256 = "f00d".repeat(16);
    world.published_teacher = Some("feed".repeat(16));
    world.publish(0, 1).await;
    let error = world.run(&world.train_attempt(1)).await.unwrap_err();
    assert_eq!(error.code, Code::ShardCorrupt);
    assert!(error.message.contains("f00df00d") && error.message.contains("feedfeed"), "{}", error.message);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shards_of_another_tokenizer_or_vocabulary_are_refused_with_both_named() {
    let mut world = World::new();
    world.header.tokenizer_sha256 = "f00d".to_owned();
    world.publish(0, 1).await;
    let error = world.run(&world.train_attempt(1)).await.unwrap_err();
    assert_eq!(error.code, Code::TokenizerMismatch);
    assert!(
        error.message.contains("f00d") && error.message.contains(&world.teacher.tokenizer_sha256),
        "{}",
        error.message
    );

    let mut world = World::new();
    world.header.vocab_size += 7;
    world.publish(0, 1).await;
    let error = world.run(&world.train_attempt(1)).await.unwrap_err();
    assert_eq!(error.code, Code::VocabularyMismatch);
    assert!(error.message.contains("47") && error.message.contains("40"), "{}", error.message);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plan_that_does_not_fit_the_rows_is_refused_before_training() {
    let world = World::published().await;
    let mut attempt = world.train_attempt(1);
    attempt.work = World::train_task(STEPS + 1);
    assert_eq!(world.run(&attempt).await.unwrap_err().code, Code::Internal);
    let mut attempt = world.train_attempt(2);
    attempt.spec.student.init = Init::Prune(Prune::to_layers(9));
    assert_eq!(world.run(&attempt).await.unwrap_err().code, Code::SpecInvalid);
    assert!(world.events().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_attempt_that_waits_for_shards_stops_at_once() {
    let world = World::new();
    let attempt = world.train_attempt(1);
    let cancel = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        world.stop(Stop::JobCancelled);
    };
    let (done, ()) = tokio::time::timeout(Duration::from_secs(20), async { tokio::join!(world.run(&attempt), cancel) })
        .await
        .unwrap();
    assert_eq!(done.unwrap_err().code, Code::JobCancelled);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_student_pruned_by_importance_waits_for_its_rows_and_is_the_same_after_a_stop() {
    let by_importance = Init::Prune(Prune {
        choose: Choose::BlockInfluence,
        hidden_size: Some(12),
        intermediate_size: Some(20),
        num_key_value_heads: Some(1),
        // More than the first shard has.
        calibration_rows: 6,
        ..Prune::to_layers(2)
    });
    let straight = World::new();
    let mut attempt = straight.train_attempt(1);
    attempt.spec.student.init = by_importance.clone();
    let publish = async {
        for shard in 0..TRAIN_SHARDS + HELD_OUT_SHARDS {
            tokio::time::sleep(Duration::from_millis(50)).await;
            straight.publish(shard, 1).await;
        }
    };
    let (done, ()) = tokio::join!(straight.run(&attempt), publish);
    done.unwrap();
    let What::TrainFinished(finished) = straight.events().pop().unwrap() else { panic!("not finished") };
    let pruning = pruning_from_proto(finished.pruning.as_ref().unwrap()).unwrap();
    assert_eq!((pruning.depth.kept, pruning.hidden.kept, pruning.calibration_rows), (2, 12, 6));
    assert!(pruning.hidden.share.is_some_and(|share| share > 0.5 && share < 1.0), "{:?}", pruning.hidden);
    let written = fs::read(straight.object(&format!("{}pruning.json", finished.initial_key))).unwrap();
    assert_eq!(serde_json::from_slice::<Pruning>(&written).unwrap(), pruning);

    let world = World::published().await;
    world.stop_after_checkpoints(1, Stop::Fenced);
    attempt = world.train_attempt(1);
    attempt.spec.student.init = by_importance.clone();
    assert_eq!(world.run(&attempt).await.unwrap_err().code, Code::AttemptFenced);
    world.never_stop();
    attempt = world.train_attempt(2);
    attempt.spec.student.init = by_importance;
    world.run(&attempt).await.unwrap();
    let What::TrainFinished(resumed) = world.events().pop().unwrap() else { panic!("not finished") };
    assert_eq!(resumed.pruning, finished.pruning);
    assert_eq!(final_weights(&world).await, final_weights(&straight).await);
}
