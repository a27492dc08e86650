//! A real, tiny teacher over several stages: the shard is the single process's, byte for byte.

use std::collections::BTreeMap;

use tch::{Device, Kind};

use super::*;
use crate::{
    engine::native::{Loaded as Models, Native},
    stage::Arithmetic,
    tests::{compute, order, rows, spec, tiny},
};

const GENERATE: &str =
    "  sampling: {temperature: 1.0, top_p: 0.9, max_new_tokens: 24}\n  soft_targets: {head: 12, draws: 20}\n";
const SCORE: &str = "  mode: score\n  soft_targets: {head: 12, draws: 20}\n";

fn arithmetic() -> Arithmetic {
    Arithmetic::on(Device::Cpu, Kind::Float, Some(1))
}

fn layers() -> Layers {
    Layers::new(arithmetic())
}

/// Bytes and SHA-256 of the shard, computed by a group of this many stages, and what each stage read.
fn in_group(stages: usize, dir: &Path, order: &crate::shard::Order) -> (String, Vec<u64>) {
    let peers = addresses(stages);
    let members: Vec<_> = (1..stages)
        .map(|stage| member_of(place(&peers, stage), || Box::new(layers()), CancellationToken::new()))
        .collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let formed = runtime.block_on(Formed::new(place(&peers, 0), "f32", &CancellationToken::new())).unwrap();
    let mut group = Group::new(formed.parts, Box::new(layers()));
    let bytes_read = group.load(dir).unwrap().bytes_read.clone();
    let mut models = Models::in_group(group, arithmetic());
    let engine = models.get(dir).unwrap();
    let encoded = compute(engine, order, &mut |_| Ok(())).unwrap();
    models.report();
    runtime.block_on(formed.keeper.end(&Error::new(Code::WorkerStopped, "the test is over")));
    for member in members {
        member.recv_timeout(WAIT).unwrap().unwrap_err();
    }
    (encoded.sha256, bytes_read)
}

#[test]
fn a_groups_shard_is_the_single_process_s() {
    let folder = tempfile::tempdir().unwrap();
    tiny::write(folder.path(), 3);
    let mut alone = Native::load(folder.path(), &arithmetic()).unwrap();
    for what in [SCORE, GENERATE] {
        let order = order(spec(folder.path(), what), rows(40), 0..40);
        let expected = compute(&mut alone, &order, &mut |_| Ok(())).unwrap();
        for stages in [2, 3] {
            let (sha256, _) = in_group(stages, folder.path(), &order);
            assert_eq!(sha256, expected.sha256, "{stages} stages, {what}");
        }
    }
}

#[test]
fn each_stage_reads_its_own_tensors_and_no_others() {
    let folder = tempfile::tempdir().unwrap();
    tiny::write(folder.path(), 3);
    let order = order(spec(folder.path(), SCORE), rows(3), 0..3);
    let (_, bytes_read) = in_group(3, folder.path(), &order);
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
