//! Against Hugging Face transformers: tiny random models of every supported family, in fp32. The
//! golden files and the script that makes them lie in `tests/parity/` at the repository's root.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use retort_llama::{KvCache, Model, greedy};
use tch::{Device, Kind, Tensor};

/// The largest difference of a logit that counts as equal.
const TOLERANCE: f64 = 1e-4;

struct Golden {
    model: Model,
    ids_bt: Tensor,
    logits_btv: Tensor,
    prompt: Vec<u32>,
    greedy: Vec<u32>,
}

#[test]
fn llama_3() {
    check("llama3");
}

/// Scaled rotary positions, far beyond the original context.
#[test]
fn llama_31() {
    check("llama31");
}

/// Biases on queries, keys and values.
#[test]
fn qwen2() {
    check("qwen2");
}

/// A sliding window that the texts exceed.
#[test]
fn mistral() {
    check("mistral");
}

/// Heads that do not divide the hidden size, biases everywhere, weights in several f16 files.
#[test]
fn odd_heads() {
    check("odd_heads");
}

fn check(name: &str) {
    let golden = load(name);
    let full_btv = tch::no_grad(|| golden.model.head(&golden.model.hidden(&golden.ids_bt).unwrap()).unwrap());
    let difference = max_difference(&full_btv, &golden.logits_btv);
    println!("{name}: largest difference of a logit from transformers {difference:.2e}");
    assert!(difference <= TOLERANCE, "{name}: {difference}");

    let cached = cached_difference(&golden, &full_btv);
    println!("{name}: largest difference of a cached logit from the full forward's {cached:.2e}");
    assert!(cached <= TOLERANCE, "{name}: {cached}");

    let tokens = greedy(&golden.model, &golden.prompt, golden.greedy.len()).unwrap();
    assert_eq!(tokens, golden.greedy, "{name}: greedy tokens");
}

/// Feeds every row through the cache, rows at different lengths: a first part at once, a second
/// part on top of it, the rest one by one. Compares each logit met with the full forward's.
fn cached_difference(golden: &Golden, full_btv: &Tensor) -> f64 {
    let Golden { model, ids_bt, .. } = golden;
    let (rows, tokens) = ids_bt.size2().unwrap();
    let mut cache = KvCache::new(model.config(), rows, tokens + 8, Device::Cpu, Kind::Float).unwrap();
    let mut worst = 0.0_f64;
    let mut compare = |hidden_bh: &Tensor, lengths: &[i64]| {
        let logits_bv = tch::no_grad(|| model.head(hidden_bh)).unwrap();
        for (row, &length) in lengths.iter().enumerate() {
            let expected_v = full_btv.get(row as i64).get(length - 1);
            worst = worst.max(max_difference(&logits_bv.get(row as i64), &expected_v));
        }
    };

    for part in [vec![3, 5], vec![4, 1]] {
        let part = &part[..rows as usize];
        let widest = part.iter().copied().max().unwrap();
        let rows_of_part: Vec<_> = (0..rows)
            .map(|row| {
                let (start, length) = (cache.lengths()[row as usize], part[row as usize]);
                let real = ids_bt.get(row).narrow(0, start, length);
                // Padding must not matter, so it is a token that would.
                Tensor::cat(&[real, Tensor::full([widest - length], 7, (Kind::Int64, Device::Cpu))], 0)
            })
            .collect();
        let hidden_bh = model.prefill(&Tensor::stack(&rows_of_part, 0), part, &mut cache).unwrap();
        compare(&hidden_bh, cache.lengths());
    }
    while cache.lengths().iter().all(|&length| length < tokens) {
        let next: Vec<i64> =
            cache.lengths().iter().enumerate().map(|(row, &at)| ids_bt.int64_value(&[row as i64, at])).collect();
        let hidden_bh = model.decode(&Tensor::from_slice(&next), &mut cache).unwrap();
        compare(&hidden_bh, cache.lengths());
    }
    worst
}

fn load(name: &str) -> Golden {
    let dir: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/golden").join(name);
    let model = Model::load(&dir, Device::Cpu, Kind::Float).unwrap();
    let tensors = Tensor::read_safetensors(dir.join("golden.safetensors")).unwrap();
    let find = |wanted: &str| {
        let (_, tensor) = tensors.iter().find(|(name, _)| name == wanted).unwrap();
        tensor.shallow_clone()
    };
    let ids = |name: &str| -> Vec<u32> {
        Vec::<i64>::try_from(&find(name)).unwrap().into_iter().map(|id| id as u32).collect()
    };
    Golden { model, ids_bt: find("ids"), logits_btv: find("logits"), prompt: ids("prompt"), greedy: ids("greedy") }
}

fn max_difference(one: &Tensor, other: &Tensor) -> f64 {
    assert_eq!(one.size(), other.size());
    (one - other).abs().max().double_value(&[])
}
