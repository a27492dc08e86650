//! A real, tiny teacher over several stages: the shard is the single process's, byte for byte.

use std::collections::BTreeMap;

use retort_artifact::soft_targets::{self, Encoded};
use serde_json::{Value, json};
use tch::{Device, Kind};

use super::*;
use crate::{
    engine::{
        Engine,
        native::{Loaded as Models, Native},
    },
    stage::Arithmetic,
    tests::{compute, order, rows, spec, tiny},
};

const GENERATE: &str =
    "  sampling: {temperature: 1.0, top_p: 0.9, max_new_tokens: 24}\n  soft_targets: {head: 12, draws: 20}\n";
const SCORE: &str = "  mode: score\n  soft_targets: {head: 12, draws: 20}\n";

fn arithmetic(kind: Kind) -> Arithmetic {
    Arithmetic::on(Device::Cpu, kind, Some(1))
}

/// What `work` makes of the models of a group of this many stages, given how many bytes of `dir` each read.
fn with_group<T>(stages: usize, dir: &Path, kind: Kind, work: impl FnOnce(&mut Models, Vec<u64>) -> T) -> T {
    let layers = move || Layers::new(arithmetic(kind));
    let peers = addresses(stages);
    let members: Vec<_> = (1..stages)
        .map(|stage| member_of(place(&peers, stage), move || Box::new(layers()), CancellationToken::new()))
        .collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let formed = runtime.block_on(Formed::new(place(&peers, 0), "f32", &CancellationToken::new())).unwrap();
    let mut group = Group::new(formed.parts, Box::new(layers()));
    let bytes_read = group.load(dir).unwrap().bytes_read.clone();
    let mut models = Models::in_group(group, arithmetic(kind));
    let made = work(&mut models, bytes_read);
    models.report();
    runtime.block_on(formed.keeper.end(&Error::new(Code::WorkerStopped, "the test is over")));
    for member in members {
        member.recv_timeout(WAIT).unwrap().unwrap_err();
    }
    made
}

/// The shard, computed by a group of this many stages, and how many bytes each stage read.
fn in_group(stages: usize, dir: &Path, order: &crate::shard::Order, kind: Kind) -> (Encoded, Vec<u64>) {
    with_group(stages, dir, kind, |models, bytes_read| {
        let engine = models.get(dir).unwrap();
        (compute(engine, order, &mut |_| Ok(())).unwrap(), bytes_read)
    })
}

#[test]
fn a_groups_shard_is_the_single_process_s() {
    let folder = tempfile::tempdir().unwrap();
    tiny::write(folder.path(), 3);
    let mut alone = Native::load(folder.path(), &arithmetic(Kind::Float)).unwrap();
    for what in [SCORE, GENERATE] {
        let order = order(spec(folder.path(), what), rows(40), 0..40);
        let expected = compute(&mut alone, &order, &mut |_| Ok(())).unwrap();
        for stages in [2, 3] {
            let (encoded, _) = in_group(stages, folder.path(), &order, Kind::Float);
            assert_eq!(encoded.sha256, expected.sha256, "{stages} stages, {what}");
        }
    }
}

/// A text of many steps among short ones: cut wherever a step is full, it is what it is whole.
#[test]
fn a_text_of_many_steps_is_the_single_process_s() {
    let folder = tempfile::tempdir().unwrap();
    tiny::write(folder.path(), 3);
    let config = folder.path().join("config.json");
    let mut about: serde_json::Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    about["max_position_embeddings"] = 600.into();
    std::fs::write(&config, about.to_string()).unwrap();
    let mut alone = Native::load(folder.path(), &arithmetic(Kind::Float)).unwrap();
    let mut rows = rows(12);
    for (row, words) in [(3, 210), (4, 150), (9, 96)] {
        let completion: Vec<String> = (0..words).map(|word| format!("w{}", 20 + word % 40)).collect();
        rows[row].completion = Some(completion.join(" "));
    }
    let order = order(spec(folder.path(), SCORE), rows, 0..12);
    let expected = compute(&mut alone, &order, &mut |_| Ok(())).unwrap();
    let (encoded, _) = in_group(2, folder.path(), &order, Kind::Float);
    assert_eq!(encoded.sha256, expected.sha256);
}

/// What docs/teacher-groups.md says of bf16.
#[test]
fn in_bf16_a_group_agrees_with_the_single_process_to_rounding() {
    let folder = tempfile::tempdir().unwrap();
    tiny::write(folder.path(), 3);
    let mut alone = Native::load(folder.path(), &arithmetic(Kind::BFloat16)).unwrap();
    let order = order(spec(folder.path(), SCORE), rows(40), 0..40);
    let expected = compute(&mut alone, &order, &mut |_| Ok(())).unwrap();
    let masses = |encoded: &Encoded| -> Vec<f32> {
        let shard = soft_targets::decode(encoded.bytes.clone(), Default::default()).unwrap();
        let sequences = shard.sequences.iter();
        // Of the likeliest token at each target; the likeliest comes first.
        sequences.flat_map(|s| (0..s.targets.len()).map(|p| s.targets.masses[s.targets.range(p)][0])).collect()
    };
    let expected = masses(&expected);
    for stages in [2, 3] {
        let (encoded, _) = in_group(stages, folder.path(), &order, Kind::BFloat16);
        let found = masses(&encoded);
        assert_eq!(found.len(), expected.len());
        let furthest = expected.iter().zip(&found).map(|(a, b)| (a.ln() - b.ln()).abs()).fold(0.0, f32::max);
        assert!(furthest < 0.05, "{stages} stages: {furthest} nats");
    }
}

#[test]
fn each_stage_reads_its_own_tensors_and_no_others() {
    let folder = tempfile::tempdir().unwrap();
    tiny::write(folder.path(), 3);
    let order = order(spec(folder.path(), SCORE), rows(3), 0..3);
    let (_, bytes_read) = in_group(3, folder.path(), &order, Kind::Float);
    let config = retort_llama::Config::from_dir(folder.path()).unwrap();
    let sizes: BTreeMap<String, u64> =
        config.tensors().into_iter().map(|(name, shape)| (name, 4 * shape.iter().product::<i64>() as u64)).collect();
    let of =
        |prefix: &str| -> u64 { sizes.iter().filter(|(name, _)| name.starts_with(prefix)).map(|(_, size)| size).sum() };
    // The head is the embedding once more.
    let embedding = of("model.embed_tokens");
    let expected = [
        embedding + of("model.layers.0."),
        of("model.layers.1."),
        of("model.layers.2.") + of("model.norm") + embedding,
    ];
    assert_eq!(bytes_read, expected);
}

#[test]
fn a_group_takes_texts_of_131_072_tokens_and_no_longer_ones() {
    let folder = tempfile::tempdir().unwrap();
    tiny::write(folder.path(), 3);
    let context = |positions: u32| {
        let path = folder.path().join("config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        config["max_position_embeddings"] = json!(positions);
        std::fs::write(&path, config.to_string()).unwrap();
        let alone = Native::load(folder.path(), &arithmetic(Kind::Float)).unwrap();
        let in_group = with_group(2, folder.path(), Kind::Float, |models, _| {
            let engine: &Native = models.get(folder.path()).unwrap();
            Engine::capabilities(engine).context
        });
        (Engine::capabilities(&alone).context, in_group)
    };
    assert_eq!(context(1000), (1000, 1000));
    assert_eq!(context(1 << 20), (1 << 20, MAX_CONTEXT));
    assert_eq!(MAX_CONTEXT, 131_072);
}
