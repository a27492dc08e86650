//! Distributions such as a teacher gives, made from a seed.

use retort_artifact::soft_targets::{Header, Position, SCHEMA_VERSION, Sequence, TailLogprobs};
use retort_core::{
    random::{Counter, Purpose},
    spec::{Codec, SoftTargets},
};

pub fn header(vocab_size: u32, head: u32, draws: u32) -> Header {
    with_codec(vocab_size, Codec::HeadDraws { head, draws })
}

pub fn with_codec(vocab_size: u32, codec: Codec) -> Header {
    Header {
        schema_version: SCHEMA_VERSION,
        job: "0190a0b0c0d0e0f00102030405060708".to_owned(),
        shard: 3,
        epoch: 2,
        work_sha256: "ee".repeat(32),
        split: "train".to_owned(),
        engine: "native".to_owned(),
        engine_version: "0.1.0".to_owned(),
        dtype: "f32".to_owned(),
        teacher_sha256: "aa".repeat(32),
        tokenizer_sha256: "bb".repeat(32),
        chat_template_sha256: "cc".repeat(32),
        vocab_size,
        soft_targets: SoftTargets::of(codec),
        tail_logprobs: TailLogprobs::Stored,
        seed: 7,
        prompt_set_sha256: "dd".repeat(32),
        mode: "generate".to_owned(),
        sampling_json: r#"{"temperature":0.7,"top_p":0.95}"#.to_owned(),
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

/// What a codec keeps of one distribution, slowly and obviously, and the token that follows.
pub fn position(logprobs: &[f64], soft_targets: &SoftTargets, rng: &mut Counter) -> (Position, u32) {
    let mut order: Vec<u32> = (0..logprobs.len() as u32).collect();
    order.sort_by(|&a, &b| logprobs[b as usize].total_cmp(&logprobs[a as usize]));
    let p = |id: u32| logprobs[id as usize].exp();
    let head = match soft_targets.codec {
        Codec::Threshold { threshold } => order.iter().take_while(|&&id| p(id) >= threshold).count().max(1),
        codec => codec.max_head(logprobs.len() as u32) as usize,
    };
    let (kept, rest) = order.split_at(head);
    let entry = |&id: &u32| (id, logprobs[id as usize] as f32);
    let rest_mass: f64 = rest.iter().map(|&id| p(id)).sum();
    let (draws, systematic) = match soft_targets.codec {
        _ if rest.is_empty() => (0, false),
        Codec::Full | Codec::TopK { .. } | Codec::TopKTail { .. } => (0, false),
        Codec::HeadDraws { draws, .. } | Codec::Random { draws } => (draws, false),
        Codec::Threshold { threshold } if rest_mass < threshold => {
            (u32::from(rng.next_f64() * threshold < rest_mass), true)
        }
        Codec::Threshold { threshold } => ((rest_mass / threshold) as u32, true),
    };
    let mut tail: Vec<(u32, u8, f32)> = Vec::new();
    let offset = rng.next_f64();
    for draw in 0..draws {
        let uniform = if systematic { (f64::from(draw) + offset) / f64::from(draws) } else { rng.next_f64() };
        let id = at(rest, logprobs, uniform * rest_mass);
        match tail.iter_mut().find(|(other, ..)| *other == id) {
            Some((_, count, _)) => *count += 1,
            None => tail.push((id, 1, logprobs[id as usize] as f32)),
        }
    }
    let label = at(&order, logprobs, rng.next_f64());
    let log_sum_exp = |&t: &f64| logprobs.iter().map(|logprob| (logprob / t).exp()).sum::<f64>().ln() as f32;
    let position = Position {
        head: kept.iter().map(entry).collect(),
        tail,
        label_logprob: logprobs[label as usize] as f32,
        log_sum_exps: soft_targets.temperatures.iter().map(log_sum_exp).collect(),
    };
    (position, label)
}

/// Where `mass` falls when the ids' probabilities are laid end to end.
fn at(ids: &[u32], logprobs: &[f64], mass: f64) -> u32 {
    let mut left = mass;
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
                let (position, label) = position(&logprobs, &header.soft_targets, &mut rng);
                sequence.positions.push(position);
                sequence.token_ids.push(label);
                sequence.target_mask.push(true);
            }
            sequence
        })
        .collect()
}
