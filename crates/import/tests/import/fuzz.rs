//! Seeded damage: any bytes give a model or an error, never a panic, and an error leaves nothing.

use std::panic::{AssertUnwindSafe, catch_unwind};

use retort_core::random::{Counter, Purpose};

use crate::Bench;
use crate::models::{llama, qwen2};

const ROUNDS: u64 = 4000;

fn damage(bytes: &mut Vec<u8>, random: &mut Counter) {
    // Most of the structure lies in front, so half of the changes do as well.
    let near = (bytes.len() as u64).min(if random.below(2) == 0 { 700 } else { u64::MAX });
    for _ in 0..=random.below(4) {
        let at = random.below(near.min(bytes.len() as u64).max(1)) as usize;
        if at >= bytes.len() {
            return;
        }
        match random.below(7) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = random.next_u64() as u8,
            2 => bytes.truncate(at),
            3 => {
                let end = (at + 1 + random.below(40) as usize).min(bytes.len());
                bytes.drain(at..end);
            }
            4 => {
                let end = (at + 1 + random.below(40) as usize).min(bytes.len());
                let again = bytes[at..end].to_vec();
                bytes.splice(at..at, again);
            }
            5 => {
                let hostile = [0, 1, 0x7fff_ffff, 0xffff_ffff, 1 << 32, i64::MAX as u64, u64::MAX, u64::MAX - 31];
                let number = hostile[random.below(hostile.len() as u64) as usize].to_le_bytes();
                let width = if random.below(2) == 0 { 4 } else { 8 };
                let end = (at + width).min(bytes.len());
                bytes[at..end].copy_from_slice(&number[..end - at]);
            }
            _ => bytes[at] = bytes[at].wrapping_add(1),
        }
    }
}

#[test]
fn damaged_gguf_files_never_panic() {
    let sources = [llama().bytes(), qwen2().bytes()];
    let bench = Bench::new();
    let (mut good, mut bad) = (0, 0);
    for round in 0..ROUNDS {
        let mut random = Counter::new(7, Purpose::Shuffle, round, 0);
        let mut bytes = sources[(round % 2) as usize].clone();
        damage(&mut bytes, &mut random);
        let result = catch_unwind(AssertUnwindSafe(|| bench.import(&bytes)));
        let Ok(result) = result else { panic!("round {round} panicked") };
        match result {
            Ok(_) => {
                std::fs::remove_dir_all(bench.out()).unwrap();
                good += 1;
            }
            Err(error) => {
                assert!(!error.message.is_empty());
                bad += 1;
            }
        }
        assert_eq!(bench.names(), ["model.gguf"], "round {round}");
    }
    // Damage in the values of a quantised tensor goes unseen; most of the rest must not.
    assert!(good > 50 && bad > ROUNDS / 3, "{good} imported, {bad} refused");
}

#[test]
fn damaged_folders_never_panic() {
    let first = Bench::new();
    first.import(&llama().bytes()).unwrap();
    let bench = Bench::new();
    let source = bench.path("source");
    std::fs::create_dir(&source).unwrap();
    let names = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"];
    let whole: Vec<Vec<u8>> = names.iter().map(|name| std::fs::read(first.out().join(name)).unwrap()).collect();
    for round in 0..ROUNDS / 4 {
        let mut random = Counter::new(8, Purpose::Shuffle, round, 0);
        let hit = (round % names.len() as u64) as usize;
        for (i, name) in names.iter().enumerate() {
            let mut bytes = whole[i].clone();
            if i == hit {
                damage(&mut bytes, &mut random);
            }
            std::fs::write(source.join(name), bytes).unwrap();
        }
        let result = catch_unwind(AssertUnwindSafe(|| bench.import_from(&source)));
        let Ok(result) = result else { panic!("round {round} panicked") };
        if result.is_ok() {
            std::fs::remove_dir_all(bench.out()).unwrap();
        }
        assert_eq!(bench.names(), ["source"], "round {round}");
    }
}
