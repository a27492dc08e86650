//! A trainer of adapters: they learn, nothing else changes, and it goes on bit for bit.

use std::collections::HashMap;

use retort_core::spec::{Lora, LoraBase};
use tch::Device;

use super::{
    tests::{STEPS, VOCAB, model, options, rows, save, weights},
    *,
};
use crate::{
    init::tests::{tiny_config, tiny_teacher},
    measure::{Tally, measure},
    resume,
};

const SEED: u64 = 17;

fn lora() -> Lora {
    Lora { rank: 4, alpha: 8.0, dropout: 0.3, ..Lora::default() }
}

fn with(change: impl FnOnce(&mut Train)) -> Options {
    let mut options = options();
    options.train.learning_rate = 2e-2;
    change(&mut options.train);
    options
}

fn trainer(lora: &Lora, options: Options) -> Trainer {
    Trainer::new(model(true).adapt(lora, SEED).unwrap(), options).unwrap()
}

/// Every adapter's numbers.
fn adapters(trainer: &Trainer) -> Vec<Vec<f32>> {
    let numbers = |tensor: &Tensor| Vec::<f32>::try_from(tensor.detach().to_kind(Kind::Float).view([-1])).unwrap();
    trainer.model.adapters().iter().map(|(_, tensor)| numbers(tensor)).collect()
}

fn kl(model: &Model, loss: &mut ChunkedLoss) -> f64 {
    let mut sum = Tally::default();
    let tallies = measure(model, loss, &rows(0), options().limits, &|| Ok(())).unwrap();
    tallies.iter().for_each(|tally| sum.add(tally));
    sum.mean_kl()
}

/// And the folder of the last step is as good as the trainer: it says the same.
#[test]
fn adapters_bring_the_student_closer_and_nothing_else_changes() {
    let folder = tempfile::tempdir().unwrap();
    let teacher = tiny_teacher(&folder.path().join("teacher"), 1, VOCAB.into());
    for base in [LoraBase::Model, LoraBase::Int8] {
        let lora = Lora { base, dropout: 0.1, ..lora() };
        let mut trainer = trainer(&lora, Options { steps: 60, ..with(|_| {}) });
        let (frozen, before) = (weights(&trainer), kl(&trainer.model, &mut trainer.loss));
        for _ in 0..60 {
            trainer.step(&rows(0), &|| Ok(())).unwrap();
        }
        let after = kl(&trainer.model, &mut trainer.loss);
        assert!(after < 0.8 * before, "{base:?}: {before} -> {after}");
        assert!(weights(&trainer) == frozen, "{base:?}");
        let trained: u64 = 2 * 4 * (2 * (16 + 16) + 2 * (16 + 8) + 3 * (16 + 24));
        assert_eq!(trainer.trainable(), trained);

        let dir = folder.path().join(format!("{base:?}"));
        save(&mut trainer, &teacher.folder, &dir, true);
        let merged = Model::load(&dir.join("model"), Device::Cpu, Kind::Float).unwrap();
        assert!((kl(&merged, &mut trainer.loss) - after).abs() < 1e-5);
        assert!(dir.join("adapter/adapter_config.json").exists());
    }
}

/// Stopped anywhere, with dropped inputs, on either base and in either kind.
#[test]
fn resumed_adapters_end_with_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let teacher = tiny_teacher(&folder.path().join("teacher"), 1, VOCAB.into());
    for (base, kind, twice) in [
        (LoraBase::Model, Kind::Float, false),
        (LoraBase::Model, Kind::Float, true),
        (LoraBase::Int8, Kind::Float, true),
        (LoraBase::Model, Kind::BFloat16, false),
        (LoraBase::Int8, Kind::BFloat16, false),
    ] {
        let what = format!("{base:?}-{kind:?}-{twice}");
        let lora = Lora { base, ..lora() };
        let options = || with(|train| train.activation_checkpointing = twice);
        let initial = folder.path().join(format!("{what}-initial"));
        let config = tiny_config(2, VOCAB.into());
        let plain = Model::init(config, Device::Cpu, kind, 5).unwrap();
        resume::export(&plain, &teacher.folder, &initial).unwrap();
        let begin = || {
            let plain = Model::load(&initial, Device::Cpu, kind).unwrap();
            Trainer::new(plain.adapt(&lora, SEED).unwrap(), options()).unwrap()
        };
        let mut straight = begin();
        for step in 0..STEPS {
            straight.step(&rows(step), &|| Ok(())).unwrap();
        }
        for stop in [1, 3, STEPS] {
            let dir = folder.path().join(format!("{what}-{stop}"));
            let mut first = begin();
            for step in 0..stop {
                first.step(&rows(step), &|| Ok(())).unwrap();
            }
            save(&mut first, &teacher.folder, &dir, stop == STEPS);
            // The base is in the store already.
            assert_eq!(dir.join("model").exists(), stop == STEPS);
            drop(first);
            let mut second = resume::load_adapted(&dir, &initial, (&lora, SEED), options(), Device::Cpu, kind).unwrap();
            for step in stop..STEPS {
                second.step(&rows(step), &|| Ok(())).unwrap();
            }
            assert!(adapters(&second) == adapters(&straight), "{what} stopped after {stop}");
            assert_eq!(second.progress().loss, straight.progress().loss);
        }
    }
}

/// With dropped inputs, on heads tied and not.
#[test]
fn computing_blocks_twice_changes_no_adapter() {
    for tied in [true, false] {
        let run = |activation_checkpointing: bool| {
            let options = with(|train| train.activation_checkpointing = activation_checkpointing);
            let mut trainer = Trainer::new(model(tied).adapt(&lora(), SEED).unwrap(), options).unwrap();
            for step in 0..3 {
                trainer.step(&rows(step), &|| Ok(())).unwrap();
            }
            (adapters(&trainer), trainer.progress().loss)
        };
        assert!(run(true) == run(false), "tied {tied}");
    }
}

/// A step that leaps is left out of adapters too.
#[test]
fn a_leap_leaves_no_trace_in_adapters() {
    let mut trainer = trainer(&lora(), Options { steps: 40, ..with(|_| {}) });
    for step in 0..12 {
        trainer.step(&rows(step), &|| Ok(())).unwrap();
    }
    let before = adapters(&trainer);
    let mut leap = rows(1);
    leap.iter_mut().for_each(|row| row.support.masses.iter_mut().for_each(|mass| *mass *= 1e4));
    trainer.step(&leap, &|| Ok(())).unwrap();
    assert_eq!(trainer.progress().left_out, 1);
    assert!(adapters(&trainer) == before);
}

/// Neither the base nor the head has a gradient, so their moments are not kept either.
#[test]
fn a_checkpoint_of_adapters_holds_them_and_their_moments_alone() {
    let folder = tempfile::tempdir().unwrap();
    let teacher = tiny_teacher(&folder.path().join("teacher"), 1, VOCAB.into());
    let mut trainer = trainer(&lora(), with(|_| {}));
    trainer.step(&rows(0), &|| Ok(())).unwrap();
    save(&mut trainer, &teacher.folder, folder.path(), false);
    let moments: HashMap<String, Tensor> =
        Tensor::read_safetensors(folder.path().join("state/optimizer.safetensors")).unwrap().into_iter().collect();
    assert_eq!(moments.len(), 2 * trainer.model.adapters().len());
    assert!(moments.keys().all(|name| name.contains("lora_")));
    assert!(trainer.model.parameters().iter().all(|(_, tensor)| !tensor.grad().defined()));
    assert!(!folder.path().join("model").exists());
}
