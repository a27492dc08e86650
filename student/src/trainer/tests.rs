use std::path::Path;

use retort_core::spec::{Lora, LoraTarget, Loss, Weight};
use tch::Device;

use super::*;
use crate::{
    example::tests::example,
    init::tests::{tiny_config, tiny_teacher},
    measure::{Tally, measure},
    resume,
};

pub(super) const VOCAB: u32 = 40;
pub(super) const STEPS: u32 = 6;

pub(super) fn options() -> Options {
    let loss = Loss { forward_kl: Weight::constant(0.9), label_ce: Weight::constant(0.1), ..Loss::default() };
    let train = Train { learning_rate: 5e-3, loss, batch_rows: 4, ..Train::default() };
    Options { train, steps: STEPS, limits: batch::Limits { max_tokens: 60 } }
}

pub(super) fn model(tied: bool) -> Model {
    let config = retort_llama::Config { tie_word_embeddings: tied, ..tiny_config(2, VOCAB.into()) };
    Model::init(config, Device::Cpu, Kind::Float, 5).unwrap()
}

pub(super) fn rows(step: u32) -> Vec<Example> {
    let seed = |i: u64| u64::from(step % 2) * 10 + i;
    (0..4).map(|i| example(seed(i), 3 + i as usize, 6 + 3 * i as usize, 5, VOCAB)).collect()
}

/// A checkpoint of the trainer as it is.
pub(super) fn save(trainer: &mut Trainer, teacher: &Path, dir: &Path, whole: bool) {
    resume::Snapshot::of(trainer, dir, whole).unwrap().write(teacher, dir).unwrap();
}

pub(super) fn weights(trainer: &Trainer) -> Vec<(String, Vec<u8>)> {
    let bytes = |tensor: &Tensor| {
        let mut bytes = vec![0; tensor.numel() * 4];
        tensor.detach().f_copy_data_u8(&mut bytes, tensor.numel()).unwrap();
        bytes
    };
    trainer.model().parameters().iter().map(|(name, tensor)| (name.clone(), bytes(tensor))).collect()
}

#[test]
fn training_brings_the_student_closer_to_the_teacher() {
    let mut trainer = Trainer::new(model(true), Options { steps: 40, ..options() }).unwrap();
    let kl = |trainer: &mut Trainer| {
        let mut sum = Tally::default();
        let tallies = measure(&trainer.model, &mut trainer.loss, &rows(0), trainer.options.limits, &|| Ok(())).unwrap();
        tallies.iter().for_each(|tally| sum.add(tally));
        assert_eq!(sum.tokens, 42);
        sum.mean_kl()
    };
    let before = kl(&mut trainer);
    let first = trainer.step(&rows(0), &|| Ok(())).unwrap();
    for _ in 1..40 {
        trainer.step(&rows(0), &|| Ok(())).unwrap();
    }
    let after = kl(&mut trainer);
    assert!(after < 0.6 * before, "{before} -> {after}");
    assert_eq!(first.tokens, (8 + 12 + 16 + 20));
    assert_eq!(trainer.progress().target_tokens, 40 * 42);
    assert!(trainer.progress().loss < first.loss.unwrap());
}

/// Stopped anywhere and read back from disk, it ends with the bytes it would have ended with.
#[test]
fn resumed_it_ends_with_the_same_bytes() {
    for ema_decay in [0.0, 0.8] {
        resumed(&Options { train: Train { ema_decay, ..options().train }, ..options() });
    }
}

fn resumed(options: &Options) {
    let options = || options.clone();
    let folder = tempfile::tempdir().unwrap();
    let teacher = tiny_teacher(&folder.path().join("teacher"), 1, VOCAB.into());
    let mut straight = Trainer::new(model(true), options()).unwrap();
    for step in 0..STEPS {
        straight.step(&rows(step), &|| Ok(())).unwrap();
    }
    for stop in [1, 3, STEPS] {
        let dir = folder.path().join(format!("checkpoint-{stop}"));
        let mut first = Trainer::new(model(true), options()).unwrap();
        for step in 0..stop {
            first.step(&rows(step), &|| Ok(())).unwrap();
        }
        save(&mut first, &teacher.folder, &dir, true);
        let mut second = resume::load(&dir, options(), Device::Cpu, Kind::Float).unwrap();
        assert_eq!(second.progress().step, stop);
        drop(first);
        for step in stop..STEPS {
            second.step(&rows(step), &|| Ok(())).unwrap();
        }
        assert!(weights(&second) == weights(&straight), "stopped after {stop}");
        // What is judged and exported, too.
        let judged = |trainer: &mut Trainer| trainer.judged(|model, _| Ok(model.head_weight().copy())).unwrap();
        assert!(judged(&mut second).equal(&judged(&mut straight)));
        let averaged = options().train.ema_decay > 0.0;
        assert_eq!(judged(&mut second).equal(&second.model().head_weight()), !averaged);
        let all = |trainer: &Trainer| Progress { seconds: 0.0, ..trainer.progress() };
        assert_eq!(all(&second), all(&straight), "what the guard has watched, too");
    }
}

/// What a guard decides after a stop hangs on the last bit.
#[test]
fn progress_survives_its_json() {
    let mut random = retort_core::random::Counter::new(1, retort_core::random::Purpose::Sample, 0, 0);
    for _ in 0..1000 {
        let progress = Progress { loss: random.next_f64() * 10.0, seconds: random.next_f64(), ..Progress::default() };
        let read: Progress = serde_json::from_str(&serde_json::to_string(&progress).unwrap()).unwrap();
        assert_eq!(read, progress);
    }
}

/// A target token's weight is its part of the mean, however the rows are cut; one of weight 0 is as if it were none.
#[test]
fn target_tokens_count_by_their_weights() {
    let weigh = |(i, row): (usize, Example)| {
        let weights: Vec<f64> = (0..row.targets.len()).map(|p| [0.0, 1.0, 2.5, 0.125][(i + p) % 4]).collect();
        row.weighing(&weights)
    };
    let rows: Vec<Example> = rows(0).into_iter().enumerate().map(weigh).collect();
    let share = |rows: &[Example], max_tokens: usize| {
        let limits = batch::Limits { max_tokens };
        let mut trainer = Trainer::new(model(true), Options { limits, ..options() }).unwrap();
        let share = trainer.share(rows, weight(rows), &|| Ok(())).unwrap();
        let gradients = trainer.optimizer.trained().map(|(_, _, gradient)| gradient.view([-1])).collect::<Vec<_>>();
        (share, Tensor::cat(&gradients, 0))
    };
    let (whole, gradient) = share(&rows, 10_000);
    assert_eq!(whole.weight, weight(&rows));
    for max_tokens in [1, 45] {
        let (cut, of_cut) = share(&rows, max_tokens);
        assert!((cut.loss - whole.loss).abs() < 1e-6 * whole.loss, "{} and {}", cut.loss, whole.loss);
        let difference = difference(&gradient, &of_cut);
        assert!(difference < 1e-6, "the gradient differs by {difference}");
    }
    // Each target by itself, times its weight.
    let mut sum = 0.0;
    for row in &rows {
        for p in 0..row.targets.len() {
            let only: Vec<f64> = (0..row.targets.len()).map(|other| f64::from(u8::from(other == p))).collect();
            sum += f64::from(row.weights[p]) * share(&[row.clone().weighing(&only)], 10_000).0.loss;
        }
    }
    assert!((whole.loss - sum).abs() < 1e-5 * sum, "{} is not {sum}", whole.loss);
}

#[test]
fn an_exported_folder_is_whole_and_a_damaged_state_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let teacher = tiny_teacher(&folder.path().join("teacher"), 1, VOCAB.into());
    let mut trainer = Trainer::new(model(true), options()).unwrap();
    let dir = folder.path().join("checkpoint");
    save(&mut trainer, &teacher.folder, &dir, true);
    for name in ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"] {
        assert!(dir.join("model").join(name).exists(), "{name}");
    }
    let config = retort_llama::Config::from_dir(&dir.join("model")).unwrap();
    assert_eq!(config.num_hidden_layers, 2);

    let load = || resume::load(&dir, options(), Device::Cpu, Kind::Float).map(drop).unwrap_err();
    let (state, moments) = (dir.join("state/trainer.json"), dir.join("state/optimizer.safetensors"));
    let sound = std::fs::read_to_string(&state).unwrap();
    // Of another spec, of another build, or out of reach: nothing says that the bytes are damaged.
    let averaged = Options { train: Train { ema_decay: 0.5, ..options().train }, ..options() };
    let other = resume::load(&dir, averaged, Device::Cpu, Kind::Float).map(drop).unwrap_err();
    assert_eq!(other.code, Code::CheckpointMismatch, "{}", other.message);
    assert!(other.message.contains("tensors"), "{}", other.message);
    std::fs::write(&state, sound.replace("\"schema_version\": 1", "\"schema_version\": 2")).unwrap();
    let newer = load();
    assert_eq!(newer.code, Code::CheckpointMismatch);
    assert!(newer.message.contains("schema version 2, this build reads 1"), "{}", newer.message);
    std::fs::write(&state, sound.replace("\"updates\"", "\"uptimes\"")).unwrap();
    assert_eq!(load().code, Code::CheckpointMismatch);
    std::fs::remove_file(&state).unwrap();
    assert_eq!(load().code, Code::CheckpointUnreadable);
    std::fs::write(&state, &sound).unwrap();
    std::fs::rename(&moments, dir.join("elsewhere")).unwrap();
    assert_eq!(load().code, Code::CheckpointUnreadable);

    std::fs::write(&moments, b"short").unwrap();
    assert_eq!(load().code, Code::CheckpointCorrupt);
    for torn in ["{}", &sound[..sound.len() / 2]] {
        std::fs::write(&state, torn).unwrap();
        assert_eq!(load().code, Code::CheckpointCorrupt);
    }
}

/// How far the numbers of `b` lie from those of `a`, relative to these, in Euclidean norm.
fn difference(a: &Tensor, b: &Tensor) -> f64 {
    let norm = |tensor: &Tensor| tensor.to_kind(Kind::Double).norm().double_value(&[]);
    norm(&(a.detach() - b.detach())) / norm(&a.detach()).max(f64::MIN_POSITIVE)
}

#[test]
fn the_cut_changes_nothing_tied_or_not() {
    for tied in [true, false] {
        let trainer = |max_tokens: usize| {
            let limits = batch::Limits { max_tokens };
            Trainer::new(model(tied), Options { limits, ..options() }).unwrap()
        };
        let run = |max_tokens: usize| {
            let mut trainer = trainer(max_tokens);
            let losses: Vec<f64> =
                (0..3).map(|step| trainer.step(&rows(step), &|| Ok(())).unwrap().loss.unwrap()).collect();
            (losses, trainer)
        };
        let gradient = |max_tokens: usize| {
            let mut trainer = trainer(max_tokens);
            trainer.share(&rows(0), 42.0, &|| Ok(())).unwrap();
            let flat = |gradient: &Tensor| gradient.view([-1]);
            Tensor::cat(&trainer.optimizer.trained().map(|(_, _, gradient)| flat(gradient)).collect::<Vec<_>>(), 0)
        };
        let whole_gradient = gradient(10_000);
        let (losses, whole) = run(10_000);
        for max_tokens in [1, 45] {
            let gradient = difference(&whole_gradient, &gradient(max_tokens));
            assert!(gradient < 1e-6, "the gradient differs by {gradient}");
            let (other_losses, other) = run(max_tokens);
            assert!((losses[0] - other_losses[0]).abs() < 1e-6 * losses[0]);
            for ((name, a), (_, b)) in whole.model().parameters().iter().zip(other.model().parameters()) {
                // Adam divides by the gradient's own size, so rounding of tiny gradients grows to parts of a step.
                let difference = difference(a, &b);
                assert!(difference < 1e-5, "{name}: {difference}");
            }
        }
    }
}

/// The obvious twin: all logits, and autograd from the loss to the embedding.
#[test]
fn gradients_are_those_of_autograd_through_the_whole_student() {
    let label_ce = Loss { forward_kl: Weight::default(), label_ce: Weight::constant(1.0), ..Loss::default() };
    let micros = batch::cut(&rows(0), options().limits);
    for (tied, kind) in [(true, Kind::Float), (false, Kind::Float), (true, Kind::BFloat16), (false, Kind::BFloat16)] {
        let model = || {
            let config = retort_llama::Config { tie_word_embeddings: tied, ..tiny_config(2, VOCAB.into()) };
            Model::init(config, Device::Cpu, kind, 5).unwrap()
        };
        let twin = model();
        twin.set_trainable(true);
        for micro in &micros {
            let (ids_n, positions_m) = (Tensor::from_slice(&micro.ids_n), Tensor::from_slice(&micro.positions_m));
            let hidden_mh = twin.hidden_packed(&ids_n, &micro.lengths).unwrap().index_select(0, &positions_m);
            let logprobs_mv = twin.head(&hidden_mh).unwrap().log_softmax(-1, Kind::Float);
            let labels_m1 = Tensor::from_slice(&micro.targets.labels).unsqueeze(1);
            (-logprobs_mv.gather(1, &labels_m1, false).sum(Kind::Float) / 42.0).backward();
        }
        for activation_checkpointing in [false, true] {
            let train = Train { loss: label_ce.clone(), activation_checkpointing, ..options().train };
            let mut trainer = Trainer::new(model(), Options { train, ..options() }).unwrap();
            trainer.share(&rows(0), 42.0, &|| Ok(())).unwrap();
            for ((name, parameter), (_, _, gradient)) in twin.parameters().iter().zip(trainer.optimizer.trained()) {
                let difference = difference(&parameter.grad().to_kind(Kind::Float), gradient);
                let rounding = if kind == Kind::Float { 1e-5 } else { 3e-2 };
                assert!(difference < rounding, "{name}, tied {tied}, {kind:?}: {difference}");
            }
        }
    }
}

#[test]
fn a_loss_that_is_not_finite_stops_before_the_weights_change() {
    let mut trainer = Trainer::new(model(true), options()).unwrap();
    trainer.step(&rows(0), &|| Ok(())).unwrap();
    let before = weights(&trainer);
    let mut poisoned = rows(1);
    poisoned[2].support.masses[0] = f32::NAN;
    let error = trainer.step(&poisoned, &|| Ok(())).unwrap_err();
    assert_eq!(error.code, Code::LossNotFinite);
    assert!(error.message.contains("step 2"), "{}", error.message);
    assert!(weights(&trainer) == before);
    // And what it had summed up is gone.
    assert!(trainer.step(&rows(1), &|| Ok(())).unwrap().loss.unwrap().is_finite());
}

#[test]
fn weights_that_are_not_finite_before_training_are_named() {
    let model = model(true);
    let (name, tensor) = model.parameters().swap_remove(3);
    let _ = tch::no_grad(|| tensor.view([-1]).get(0).fill_(f64::NAN));
    let error = Trainer::new(model, options()).unwrap().step(&rows(0), &|| Ok(())).unwrap_err();
    assert_eq!(error.code, Code::ModelMalformed);
    assert!(error.message.contains("before training") && error.message.contains(&name), "{error}");
}

#[test]
fn rows_without_targets_count_a_step_and_change_nothing() {
    let mut trainer = Trainer::new(model(true), options()).unwrap();
    let before = weights(&trainer);
    let report = trainer.step(&[example(1, 5, 0, 3, VOCAB)], &|| Ok(())).unwrap();
    assert_eq!((report.step, report.loss, report.tokens), (1, None, 0));
    assert!(weights(&trainer) == before);
    trainer.step(&[], &|| Ok(())).unwrap();
    assert_eq!(trainer.progress().step, 2);
}

#[test]
fn a_cancelled_step_ends_between_micro_batches() {
    let mut trainer = Trainer::new(model(true), options()).unwrap();
    let cancelled = || Err(Error::new(Code::JobCancelled, "the job was cancelled"));
    assert_eq!(trainer.step(&rows(0), &cancelled).unwrap_err().code, Code::JobCancelled);
}

/// Frozen embeddings and head keep their bytes, everything else learns, and a checkpoint goes on as it was.
#[test]
fn frozen_embeddings_stay_as_they_are() {
    for tied in [true, false] {
        let mut frozen_options = options();
        frozen_options.train.freeze_embeddings = true;
        let mut frozen = Trainer::new(model(tied), frozen_options.clone()).unwrap();
        let mut free = Trainer::new(model(tied), options()).unwrap();
        let before = weights(&frozen);
        let report = frozen.step(&rows(0), &|| Ok(())).unwrap();
        let other = free.step(&rows(0), &|| Ok(())).unwrap();
        assert_eq!(report.loss, other.loss);
        assert!(report.gradient_norm < other.gradient_norm, "the frozen part has no gradient");
        let after = weights(&frozen);
        for ((name, old), (_, new)) in before.iter().zip(&after) {
            let is_frozen = [EMBEDDINGS, HEAD].contains(&name.as_str());
            assert_eq!(old == new, is_frozen, "{name}");
        }
        let folder = tempfile::tempdir().unwrap();
        let teacher = tiny_teacher(&folder.path().join("teacher"), 1, VOCAB.into());
        save(&mut frozen, &teacher.folder, &folder.path().join("checkpoint"), true);
        let mut resumed =
            resume::load(&folder.path().join("checkpoint"), frozen_options, Device::Cpu, Kind::Float).unwrap();
        frozen.step(&rows(1), &|| Ok(())).unwrap();
        resumed.step(&rows(1), &|| Ok(())).unwrap();
        assert_eq!(weights(&frozen), weights(&resumed));
    }
}

/// Computing blocks twice changes no bit of the weights, tied or not, frozen or not.
#[test]
fn activation_checkpointing_changes_nothing() {
    for (tied, freeze_embeddings) in [(true, false), (false, false), (true, true)] {
        let run = |activation_checkpointing: bool| {
            let train = Train { activation_checkpointing, freeze_embeddings, ..options().train };
            let mut trainer = Trainer::new(model(tied), Options { train, ..options() }).unwrap();
            let losses: Vec<f64> =
                (0..3).map(|step| trainer.step(&rows(step), &|| Ok(())).unwrap().loss.unwrap()).collect();
            (losses, weights(&trainer))
        };
        assert!(run(true) == run(false), "tied {tied}, frozen {freeze_embeddings}");
    }
}

/// Steps follow the schedules of their weights: what the loss is at the end is what it would be alone.
#[test]
fn a_losss_weights_follow_their_schedule() {
    let ramp = Weight { from: 0.0, to: 2.0, until: 0.5 };
    let loss = Loss { forward_kl: Weight::constant(1.0), label_ce: ramp, ..Loss::default() };
    let train = Train { learning_rate: 1e-9, loss, ..options().train };
    let mut trainer = Trainer::new(model(true), Options { train, ..options() }).unwrap();
    let losses: Vec<f64> = (0..STEPS).map(|_| trainer.step(&rows(0), &|| Ok(())).unwrap().loss.unwrap()).collect();
    // Weights hardly move at this learning rate: what is added is the cross-entropy's part.
    let added: Vec<f64> = losses.iter().map(|loss| loss - losses[0]).collect();
    assert!((added[1] - added[3] / 3.0).abs() < 1e-4 && (added[3] - added[5]).abs() < 1e-4, "{added:?}");
    assert!(added[3] > 2.0, "{added:?}");
}

/// A step that leaps is left out, and a trainer read back leaves the same one out.
#[test]
fn a_leap_is_left_out_and_leaves_no_trace_in_the_weights() {
    let folder = tempfile::tempdir().unwrap();
    let teacher = tiny_teacher(&folder.path().join("teacher"), 1, VOCAB.into());
    let long = Options { steps: 40, ..options() };
    let mut trainer = Trainer::new(model(true), long.clone()).unwrap();
    for step in 0..12 {
        trainer.step(&rows(step), &|| Ok(())).unwrap();
    }
    save(&mut trainer, &teacher.folder, &folder.path().join("checkpoint"), true);
    let resumed = resume::load(&folder.path().join("checkpoint"), long, Device::Cpu, Kind::Float).unwrap();
    let mut leap = rows(1);
    leap.iter_mut().for_each(|row| row.support.masses.iter_mut().for_each(|mass| *mass *= 1e4));
    for mut trainer in [trainer, resumed] {
        let before = weights(&trainer);
        let report = trainer.step(&leap, &|| Ok(())).unwrap();
        assert!(report.gradient_norm > 1000.0);
        assert_eq!((trainer.progress().left_out, trainer.progress().step), (1, 13));
        assert!(weights(&trainer) == before);
        trainer.step(&rows(0), &|| Ok(())).unwrap();
        assert_eq!(trainer.progress().left_out, 1);
        assert!(weights(&trainer) != before);
    }
}

/// What a job's plan says of sizes, the student does.
#[test]
fn the_plan_knows_the_sizes() {
    use retort_plan::training::{self, Dtype, Student, head_positions};
    for vocab in [40, 512, 49_152, 128_256] {
        for (kind, dtype) in [(Kind::Float, Dtype::F32), (Kind::BFloat16, Dtype::Bf16)] {
            let loss = ChunkedLoss::new(vocab, kind, Device::Cpu).unwrap();
            let planned = head_positions(vocab.unsigned_abs(), training::Device::Cpu, dtype);
            assert_eq!(loss.positions() as u64, planned);
        }
    }
    let lora = Lora { rank: 3, targets: vec![LoraTarget::KProj, LoraTarget::DownProj], ..Lora::default() };
    for (lora, freeze_embeddings) in [(None, false), (None, true), (Some(&lora), false)] {
        for tied in [true, false] {
            let train = Train { freeze_embeddings, ..options().train };
            let model = model(tied);
            let config = model.config().clone();
            let planned = Student { config: &config, lora, train: &train, longest_row: 9 }.training();
            let model = match lora {
                Some(lora) => model.adapt(lora, 1).unwrap(),
                None => model,
            };
            let trainer = Trainer::new(model, Options { train, ..options() }).unwrap();
            assert_eq!(trainer.trainable(), planned.trained_parameters, "{lora:?} {freeze_embeddings} {tied}");
        }
    }
    for device in [Device::Cpu, Device::Cuda(0)] {
        for micro_batch_tokens in [None, Some(77)] {
            let train = Train { micro_batch_tokens, ..options().train };
            let planned =
                Student { config: model(true).config(), lora: None, train: &train, longest_row: 9 }.training();
            let tokens = planned.places[usize::from(device != Device::Cpu)].micro_batch_tokens;
            assert_eq!(batch::Limits::of(&train, device).max_tokens, tokens as usize);
        }
    }
}

#[test]
fn a_checkpoint_of_before_its_figures_were_renamed_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let teacher = tiny_teacher(&folder.path().join("teacher"), 1, VOCAB.into());
    let mut trainer = Trainer::new(model(true), options()).unwrap();
    trainer.step(&rows(0), &|| Ok(())).unwrap();
    let dir = folder.path().join("saved");
    save(&mut trainer, &teacher.folder, &dir, true);
    let path = dir.join("state/trainer.json");
    let mut state: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let fields = state.as_object_mut().unwrap();
    let tokens = fields.remove("processed_tokens").unwrap();
    fields.insert("trained_tokens".to_owned(), tokens);
    fields.remove("workers").unwrap();
    std::fs::write(&path, state.to_string()).unwrap();
    let read = resume::load(&dir, options(), Device::Cpu, Kind::Float).unwrap().progress();
    assert_eq!(Progress { workers: 1, ..read }, trainer.progress());
}
