//! Distributions such as a teacher gives, made from a seed.

use retort_artifact::soft_targets::{Header, Position, QUANTISER, SCHEMA_VERSION, Sequence};
use retort_core::random::{Counter, Purpose};

pub fn header(vocab_size: u32, head: u32, draws: u32) -> Header {
    Header {
        schema_version: SCHEMA_VERSION,
        job: "0190a0b0c0d0e0f00102030405060708".to_owned(),
        shard: 3,
        epoch: 2,
        split: "train".to_owned(),
        engine: "native".to_owned(),
        engine_version: "0.1.0".to_owned(),
        dtype: "f32".to_owned(),
        teacher_sha256: "aa".repeat(32),
        tokenizer_sha256: "bb".repeat(32),
        chat_template_sha256: "cc".repeat(32),
        vocab_size,
        head,
        draws,
        capture_temperature: 1.0,
        seed: 7,
        prompt_set_sha256: "dd".repeat(32),
        mode: "generate".to_owned(),
        sampling_json: r#"{"temperature":0.7,"top_p":0.95}"#.to_owned(),
        quantiser: QUANTISER.to_owned(),
    }
}

/// The whole distribution, natural logarithms; more peaked at some positions than at others.
pub fn logprobs(vocab: u32, rng: &mut Counter) -> Vec<f64> {
    let sharpness = 0.9 + 1.6 * rng.next_f64();
    // Likely tokens are mostly low ids, as a byte-pair vocabulary has them.
    let mut order: Vec<u32> = (0..vocab).collect();
    for i in 0..vocab.min(512) as usize {
        let to = (rng.next_f64().powi(2) * f64::from(vocab)) as usize;
        order.swap(i, to.min(vocab as usize - 1));
    }
    let mut logits = vec![0.0; vocab as usize];
    for (rank, &id) in order.iter().enumerate() {
        logits[id as usize] = -sharpness * ((rank + 1) as f64).ln() + 0.8 * rng.next_f64();
    }
    let norm = logits.iter().map(|l| l.exp()).sum::<f64>().ln();
    logits.iter().map(|l| l - norm).collect()
}

/// Head and tail of one distribution, and the token that follows.
pub fn position(logprobs: &[f64], head: u32, draws: u32, rng: &mut Counter) -> (Position, u32) {
    let mut order: Vec<u32> = (0..logprobs.len() as u32).collect();
    order.sort_by(|&a, &b| logprobs[b as usize].total_cmp(&logprobs[a as usize]));
    let (kept, rest) = order.split_at((head as usize).min(order.len()));
    let entry = |&id: &u32| (id, logprobs[id as usize] as f32);
    let mut tail: Vec<(u32, u8, f32)> = Vec::new();
    let rest_mass: f64 = rest.iter().map(|&id| logprobs[id as usize].exp()).sum();
    for _ in 0..if rest.is_empty() { 0 } else { draws } {
        let id = draw(rest, logprobs, rest_mass, rng);
        match tail.iter_mut().find(|(other, ..)| *other == id) {
            Some((_, count, _)) => *count += 1,
            None => tail.push((id, 1, logprobs[id as usize] as f32)),
        }
    }
    let label = draw(&order, logprobs, 1.0, rng);
    let label_logprob = logprobs[label as usize] as f32;
    (Position { head: kept.iter().map(entry).collect(), tail, label_logprob }, label)
}

fn draw(ids: &[u32], logprobs: &[f64], mass: f64, rng: &mut Counter) -> u32 {
    let mut left = rng.next_f64() * mass;
    for &id in ids {
        left -= logprobs[id as usize].exp();
        if left < 0.0 {
            return id;
        }
    }
    ids[ids.len() - 1]
}

pub fn sequences(header: &Header, rows: u64, targets: usize) -> Vec<Sequence> {
    (0..rows)
        .map(|row| {
            let prompt = 3 + row as usize % 4;
            let mut rng = Counter::new(header.seed, Purpose::Tail, row, 0);
            let mut sequence = Sequence {
                row_id: format!("row-{row}"),
                row: 16 + row,
                tags: (0..row % 3).map(|tag| format!("tag {tag} \u{e9}")).collect(),
                token_ids: (0..prompt).map(|_| rng.below(u64::from(header.vocab_size)) as u32).collect(),
                target_mask: vec![false; prompt],
                finish_reason: if row % 2 == 0 { "stop" } else { "length" }.to_owned(),
                positions: Vec::new(),
            };
            for _ in 0..targets {
                let logprobs = logprobs(header.vocab_size, &mut rng);
                let (position, label) = position(&logprobs, header.head, header.draws, &mut rng);
                sequence.positions.push(position);
                sequence.token_ids.push(label);
                sequence.target_mask.push(true);
            }
            sequence
        })
        .collect()
}
