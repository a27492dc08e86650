use bytes::Bytes;
use retort_artifact::paths;
use retort_core::{id::TaskId, state::JobState};
use retort_proto::worker_event;

use super::*;
use crate::testing::*;

async fn exists(world: &World, key: &str) -> bool {
    world.context.store.exists(key).await.unwrap()
}

#[tokio::test]
async fn a_candidate_that_passes_becomes_a_version() {
    let world = World::new().await;
    let job = world.job().await;
    world.complete(&job, 0.25).await;
    judge_ready(&world.context).await.unwrap();

    let read = world.read_job(&job).await;
    assert_eq!(read.state, JobState::Succeeded);
    let report = read.report.unwrap();
    assert_eq!(report.promoted, "models/support/versions/1");
    assert_eq!(report.artifacts["model"], "models/support/000001/");
    assert_eq!((report.target_tokens, report.store_bytes, report.bytes_per_token), (100, 5000, 50.0));
    assert_eq!((report.teacher_tokens_per_second, report.student_tokens_per_second), (10.0, 40.0));
    assert_eq!(report.gates.len(), 1);
    assert!(report.gates[0].passed);
    assert!(exists(&world, "models/support/000001/config.json").await);
    let card = world.context.store.get("models/support/000001/README.md", 1 << 20).await.unwrap();
    assert!(String::from_utf8(card.to_vec()).unwrap().contains("# support, version 1\n"));

    let stored = world.context.store.get(&paths::report(job.as_str()), 1 << 20).await.unwrap();
    assert_eq!(serde_json::from_slice::<Report>(&stored).unwrap(), report);
    let pointer = read_pointer(&world.context, "models/support/versions/000001.json").await.unwrap().unwrap();
    assert_eq!((pointer.job.as_str(), pointer.folder.as_str()), (job.as_str(), "models/support/000001/"));

    // Judging what has ended changes nothing.
    judge_ready(&world.context).await.unwrap();
    judge(&world.context, &job).await.unwrap();
    let next = world.job().await;
    world.complete(&next, 0.25).await;
    judge_ready(&world.context).await.unwrap();
    assert_eq!(world.read_job(&next).await.report.unwrap().promoted, "models/support/versions/2");
}

/// As PEFT reads them, beside the merged weights.
#[tokio::test]
async fn adapters_are_promoted_with_their_model() {
    let world = World::new().await;
    let mut spec = spec(std::path::Path::new("/nowhere"));
    spec.student.lora = Some(Default::default());
    let job = world.job_with(spec).await;
    world.complete(&job, 0.25).await;
    let finish = world.read_job(&job).await.train_finish.unwrap();
    let adapters = paths::adapter_prefix(&finish.checkpoint_key);
    let put = format!("{adapters}adapter_config.json");
    world.context.store.put_new(&put, Bytes::from_static(b"{}")).await.unwrap();
    judge_ready(&world.context).await.unwrap();
    assert_eq!(world.read_job(&job).await.state, JobState::Succeeded);
    assert!(exists(&world, "models/support/000001/config.json").await);
    assert!(exists(&world, "models/support/000001/adapter/adapter_config.json").await);
}

#[tokio::test]
async fn a_candidate_that_fails_a_gate_stays_one() {
    let world = World::new().await;
    let job = world.job().await;
    world.complete(&job, 0.75).await;
    judge_ready(&world.context).await.unwrap();
    let read = world.read_job(&job).await;
    assert_eq!(read.state, JobState::Rejected);
    let report = read.report.unwrap();
    assert_eq!(report.promoted, "");
    assert_eq!(report.artifacts["model"], paths::candidate(job.as_str()));
    assert!(!exists(&world, "models/support/versions/000001.json").await);
}

/// What a promoted one's folder has, a candidate's has too.
#[tokio::test]
async fn a_candidate_that_fails_a_gate_is_left_whole_and_marked() {
    let world = World::new().await;
    let mut spec = spec(std::path::Path::new("/nowhere"));
    spec.student.lora = Some(Default::default());
    spec.train.ema_decay = 0.5;
    let job = world.job_with(spec).await;
    world.complete(&job, 0.75).await;
    let finish = world.read_job(&job).await.train_finish.unwrap();
    let put = format!("{}adapter_config.json", paths::adapter_prefix(&finish.checkpoint_key));
    world.context.store.put_new(&put, Bytes::from_static(b"{}")).await.unwrap();
    // Died half way, with a card of another try.
    let folder = paths::candidate(job.as_str());
    for name in ["README.md", "half-copied.bin"] {
        world.context.store.put_new(&format!("{folder}{name}"), Bytes::from_static(b"x")).await.unwrap();
    }
    judge_ready(&world.context).await.unwrap();
    let read = world.read_job(&job).await;
    assert_eq!(read.state, JobState::Rejected);
    let mut files: Vec<String> = world
        .context
        .store
        .list(&folder)
        .await
        .unwrap()
        .into_iter()
        .map(|entry| entry.key.replace(&folder, ""))
        .collect();
    files.sort();
    assert_eq!(files, ["README.md", "adapter/adapter_config.json", "config.json"]);
    let card = world.context.store.get(&format!("{folder}README.md"), 1 << 20).await.unwrap();
    let card = String::from_utf8(card.to_vec()).unwrap();
    assert!(card.contains("# support, a candidate that was not promoted\n"), "{card}");
    assert!(card.contains("**Not promoted: it failed the gate <code>max&#95;kl</code>.**"), "{card}");
    let report = read.report.unwrap();
    assert_eq!((report.processed_tokens, report.trained_target_tokens, report.trained_parameters), (120, 70, 90));
    assert_eq!((report.lora_rank, report.ema_decay, report.workers, report.left_out_steps), (16, 0.5, 2, 3));
    let sent = crate::to_proto::report_to_proto(&report);
    assert_eq!((sent.processed_tokens, sent.lora_rank, sent.workers, sent.left_out_steps), (120, 16, 2, 3));
}

#[tokio::test]
async fn a_crash_anywhere_promotes_once() {
    let world = World::new().await;
    let job = world.job().await;
    world.complete(&job, 0.25).await;
    let read = world.read_job(&job).await;
    let (finish, quality) = (read.train_finish.clone().unwrap(), read.evaluation.clone().unwrap().after);

    // Died after reserving, with half a copy made.
    let reserved = reserve(&world.context, &read, &quality).await.unwrap();
    let half = format!("{}half-copied.bin", reserved.key);
    world.context.store.put_new(&half, Bytes::from_static(b"x")).await.unwrap();
    // From here on it is too late to cancel.
    assert_eq!(crate::intake::cancel(&world.context, &job).await.unwrap().state, JobState::Running);
    // Died after the pointer, and again after the report.
    let model = promote(&world.context, &read, &finish, &quality).await.unwrap();
    assert!(!exists(&world, &half).await);
    world.context.store.put_new(&paths::report(job.as_str()), Bytes::from_static(b"{}")).await.unwrap();
    assert_eq!(promote(&world.context, &read, &finish, &quality).await.unwrap(), model);
    // Died before the pointer, the card written.
    let pointer = paths::model_version(&model.name, model.version);
    let key = format!("{}README.md", model.key);
    let card = world.context.store.get(&key, 1 << 20).await.unwrap();
    world.context.store.delete(&pointer).await.unwrap();
    assert_eq!(promote(&world.context, &read, &finish, &quality).await.unwrap(), model);
    assert_eq!(world.context.store.get(&key, 1 << 20).await.unwrap(), card);

    judge_ready(&world.context).await.unwrap();
    let read = world.read_job(&job).await;
    assert_eq!(read.state, JobState::Succeeded);
    assert_eq!(read.report.unwrap().promoted, "models/support/versions/1");
    assert_eq!(world.context.store.list("models/support/versions/").await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_version_of_another_database_is_left_alone() {
    let world = World::new().await;
    let put = |key: &'static str, text: String| world.context.store.put_new(key, Bytes::from(text));
    let quality = Quality {
        kl: 0.1,
        top1_agreement: 0.9,
        student_perplexity: 5.0,
        teacher_perplexity: 4.0,
        tokens: 9,
        calibration_error: Some(0.2),
        teacher_calibration_error: None,
    };
    let pointer = |version| Pointer {
        name: "support".into(),
        version,
        job: "f".repeat(32),
        folder: format!("models/support/{version:06}/"),
        teacher: "/teacher".into(),
        promote_ms: 1,
        quality: quality.clone(),
    };
    put("models/support/versions/000001.json", serde_json::to_string(&pointer(1)).unwrap()).await.unwrap();
    put("models/support/000001/config.json", "theirs".into()).await.unwrap();
    let job = world.job().await;
    world.complete(&job, 0.25).await;

    // Somebody takes the next number after it was reserved here.
    let read = world.read_job(&job).await;
    let reserved = reserve(&world.context, &read, &quality).await.unwrap();
    assert_eq!(reserved.version, 2);
    put("models/support/versions/000002.json", serde_json::to_string(&pointer(2)).unwrap()).await.unwrap();
    put("models/support/000002/config.json", "theirs".into()).await.unwrap();

    judge_ready(&world.context).await.unwrap();
    assert_eq!(world.read_job(&job).await.report.unwrap().promoted, "models/support/versions/3");
    for key in ["models/support/000001/config.json", "models/support/000002/config.json"] {
        assert_eq!(world.context.store.get(key, 100).await.unwrap().as_ref(), b"theirs");
    }
}

#[tokio::test]
async fn a_candidate_without_files_fails_the_job() {
    let world = World::new().await;
    let job = world.job().await;
    world.complete(&job, 0.25).await;
    world.context.store.delete_prefix(&paths::checkpoints_prefix(job.as_str())).await.unwrap();
    judge_ready(&world.context).await.unwrap();
    let read = world.read_job(&job).await;
    assert_eq!(read.state, JobState::Failed);
    assert_eq!(read.error.unwrap().0, "object-not-found");
    let snapshot = &mut world.context.database.read().await.unwrap();
    assert_eq!(models::find_by_job(snapshot, &job).await.unwrap(), None);
}

#[tokio::test]
async fn nothing_is_judged_while_a_shard_is_being_redone() {
    let world = World::new().await;
    let job = world.job().await;
    world.complete(&job, 0.25).await;
    crate::intake::withdraw(&world.context, &job, 0, 1, "student", "bad").await.unwrap();
    judge_ready(&world.context).await.unwrap();
    assert_eq!(world.read_job(&job).await.state, JobState::Running);
    world.publish(&job, 0).await;
    judge_ready(&world.context).await.unwrap();
    let report = world.read_job(&job).await.report.unwrap();
    assert_eq!(report.redone.len(), 1);
    assert_eq!(report.redone[0].reason, "corrupt: bad");
}

#[tokio::test]
async fn the_report_says_what_was_reused_and_what_storing_cost() {
    let world = World::new().await;
    let (first, second) = (world.job().await, world.job().await);
    let work = "c".repeat(64);
    let epoch = world.publish_work(&first, 0, &work).await;
    let key = paths::shard(first.as_str(), 0, epoch);
    world.reuse(&second, 0, &work, &key).await;
    // A shard of twice as many tokens, stored five times as badly, and a held-out one not measured.
    for (shard, tokens, kl) in [(1, 40, 0.01), (2, 0, 9.0), (3, 20, 0.004), (4, 20, f64::NAN)] {
        let task = TaskId::shard(&second, shard);
        let epoch = world.claim(&task, "teacher-1").await;
        let worker_event::What::ShardReady(mut ready) = shard_ready(&second, shard, epoch) else { unreachable!() };
        ready.target_tokens = tokens;
        ready.fidelity.as_mut().unwrap().kl = kl;
        world.emit(&task, epoch, worker_event::What::ShardReady(ready)).await;
    }
    world.train(&second).await;
    world.evaluate(&second, 0.1).await;
    judge_ready(&world.context).await.unwrap();
    let report = world.read_job(&second).await.report.unwrap();
    assert_eq!(report.reused, 1);
    assert_eq!(report.artifacts[&format!("shards of {first}")], paths::shards_prefix(first.as_str()));
    let train = report.soft_targets.train;
    assert!((train.kl.unwrap() - (20.0 * 0.002 + 40.0 * 0.01) / 60.0).abs() < 1e-12, "{train:?}");
    assert!((train.head_mass.unwrap() - 0.9).abs() < 1e-12, "{train:?}");
    assert_eq!(report.soft_targets.held_out.kl, Some(0.004));
}

#[tokio::test]
async fn the_best_checkpoint_is_promoted_and_the_curve_reported() {
    let world = World::new().await;
    let job = world.job().await;
    for shard in 0..5 {
        world.publish(&job, shard).await;
    }
    let task = TaskId::train(&job);
    let epoch = world.claim(&task, "student-1").await;
    let mut finished = train_finished(&job, epoch);
    // The checkpoint of step 4 was better than that of step 6; one point is none.
    finished.checkpoint_key = paths::checkpoint(job.as_str(), 4, epoch);
    let point = |step: u32, kl: f64| {
        let target_tokens = u64::from(step) * 1000;
        retort_proto::CurvePoint { step, target_tokens, kl, tokens: 40, top1_agreement: 0.5, calibration_error: 0.1 }
    };
    finished.curve = (0..=6).map(|step| point(step, 0.2 + 2.0 / f64::from(step).max(0.5))).collect();
    finished.curve.push(point(7, f64::NAN));
    let written = retort_proto::CheckpointWritten {
        step: 4,
        key: finished.checkpoint_key.clone(),
        held_out: finished.curve.get(4).copied(),
    };
    for prefix in [&finished.checkpoint_key, &finished.initial_key] {
        let model = format!("{}config.json", paths::model_prefix(prefix));
        world.context.store.put_new(&model, Bytes::from_static(b"best")).await.unwrap();
    }
    world.emit(&task, epoch, worker_event::What::CheckpointWritten(written)).await;
    world.emit(&task, epoch, worker_event::What::TrainFinished(finished)).await;
    world.evaluate(&job, 0.1).await;
    judge_ready(&world.context).await.unwrap();

    let read = world.read_job(&job).await;
    let report = read.report.clone().unwrap();
    assert_eq!(report.artifacts["checkpoint"], paths::checkpoint(job.as_str(), 4, epoch));
    assert_eq!(world.context.store.get("models/support/000001/config.json", 100).await.unwrap().as_ref(), b"best");
    let forecast = report.forecast.clone().unwrap();
    assert_eq!((forecast.curve.len(), forecast.fit.as_ref().unwrap().points), (7, 6));
    assert_eq!((report.before_by_tag["billing"].kl, report.after_by_tag["billing"].kl), (2.0, 0.1));
    assert_eq!(report.after.calibration_error, Some(0.1));
    let sent = crate::to_proto::report_to_proto(&report);
    assert_eq!(sent.forecast.unwrap().predictions.len(), 2);
    assert_eq!(sent.after.unwrap().teacher_calibration_error, Some(0.05));
    // The journal says how good a checkpoint is, and which step was judged.
    let events = journal::list(&mut world.context.database.read().await.unwrap(), &job, 0, 100).await.unwrap();
    use retort_proto::job_event::What;
    assert!(events.iter().any(|event| matches!(&event.what, Some(What::CheckpointSaved(saved))
        if saved.step == 4 && saved.held_out.is_some_and(|point| point.kl == 0.7))));
    assert!(events.iter().any(|event| matches!(&event.what, Some(What::Evaluated(evaluated)) if evaluated.step == 4)));
}

#[test]
fn a_report_of_before_still_reads() {
    let quality =
        r#"{"kl": 1.0, "top1_agreement": 0.5, "student_perplexity": null, "teacher_perplexity": 2.0, "tokens": 9}"#;
    let read: Quality = serde_json::from_str(quality).unwrap();
    assert_eq!((read.calibration_error, read.teacher_calibration_error), (None, None));
    let finish = r#"{"steps": 4, "checkpoint_key": "c/", "initial_key": "i/", "trained_tokens": 9, "seconds": 1.0,
        "tokens_per_second": 2.0, "final_loss": 1.0}"#;
    let read: TrainFinish = serde_json::from_str(finish).unwrap();
    assert!(read.curve.is_empty());
    assert_eq!((read.processed_tokens, read.target_tokens, read.workers), (9, 0, 0));
    let plan = r#"{"train_rows": 1, "held_out_rows": 1, "train_shards": 1, "held_out_shards": 1, "max_target_tokens": 1,
        "optimizer_steps": 1, "teacher_parameters": 1, "student_parameters": 1, "max_store_bytes": 1}"#;
    assert_eq!(serde_json::from_str::<crate::planner::Plan>(plan).unwrap().training, None);
}
