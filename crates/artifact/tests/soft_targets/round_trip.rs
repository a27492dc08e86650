//! What goes in comes out, and what cannot be a distribution does not go in.

use retort_artifact::soft_targets::{
    Encoded, Limits, Position, QUANTISER_MAX_ERROR, QUANTISER_NEAR_ERROR, QUANTISER_RANGE, Sequence, decode, describe,
    encode,
};
use retort_core::{
    Code,
    random::{Counter, Purpose},
};

use crate::sample;

#[test]
fn a_shard_reads_back_as_it_was_written() {
    let header = sample::header(600, 32, 16);
    let sequences = sample::sequences(&header, 5, 20);
    let encoded = encode(&header, &sequences).unwrap();
    assert_eq!((encoded.rows, encoded.target_tokens), (5, 100));
    let shard = decode(encoded.bytes, Limits::default()).unwrap();
    assert_eq!(shard.header, header);
    assert_eq!(shard.target_tokens(), 100);
    for (raw, read) in sequences.iter().zip(&shard.sequences) {
        assert_eq!((&raw.row_id, raw.row, &raw.tags), (&read.row_id, read.row, &read.tags));
        assert_eq!((&raw.token_ids, &raw.target_mask), (&read.token_ids, &read.target_mask));
        assert_eq!(raw.finish_reason, read.finish_reason);
        let targets = &read.targets;
        assert_eq!(targets.offsets.len(), targets.len() + 1);
        for (p, position) in raw.positions.iter().enumerate() {
            check_position(position, &header, targets, p);
        }
    }
}

fn check_position(
    raw: &Position,
    header: &retort_artifact::soft_targets::Header,
    targets: &retort_artifact::soft_targets::SparseTargets,
    p: usize,
) {
    let range = targets.range(p);
    let ids = &targets.ids[range.clone()];
    assert!(ids.windows(2).all(|pair| pair[0] < pair[1]) && ids.iter().all(|&id| id < header.vocab_size));
    let masses = &targets.masses[range.clone()];
    let whole: f64 = masses.iter().map(|&mass| f64::from(mass)).sum();
    assert!((whole - 1.0).abs() < 1e-5, "{whole}");
    let true_head: f64 = raw.head.iter().map(|&(_, logprob)| f64::from(logprob).exp()).sum();
    let max = raw.head.iter().map(|&(_, logprob)| logprob).fold(f32::MIN, f32::max);
    for &(id, logprob) in &raw.head {
        let at = ids.binary_search(&id).unwrap();
        assert!((masses[at].ln() - targets.logprobs[range.start + at]).abs() < 1e-4);
        // The factor that makes the head whole adds what rounding can have taken elsewhere.
        let error = (targets.logprobs[range.start + at] - logprob).abs();
        assert!(error <= bound(max - logprob) + QUANTISER_MAX_ERROR, "{error}");
    }
    for &(id, count, logprob) in &raw.tail {
        let at = ids.binary_search(&id).unwrap();
        let expected = (1.0 - true_head) * f64::from(count) / f64::from(header.draws);
        assert!((f64::from(masses[at]) - expected).abs() < 1e-6);
        let error = (targets.logprobs[range.start + at] - logprob).abs();
        assert!(error <= bound(max - logprob), "{error}");
    }
    let top = raw.head.iter().max_by(|a, b| a.1.total_cmp(&b.1)).unwrap().0;
    assert_eq!(targets.top_ids[p], top);
    assert_eq!(targets.label_logprobs[p], raw.label_logprob);
}

/// Largest error of a log-probability so far below the maximum.
fn bound(below: f32) -> f32 {
    let stated = if below < 8.0 { QUANTISER_NEAR_ERROR } else { QUANTISER_MAX_ERROR };
    stated + 1e-5 + (below - QUANTISER_RANGE).max(0.0)
}

#[test]
fn fidelity_says_what_storing_cost() {
    let header = sample::header(600, 32, 16);
    let sequences = sample::sequences(&header, 4, 50);
    let fidelity = encode(&header, &sequences).unwrap().fidelity;
    assert_eq!(fidelity.argmax_agreement, 1.0);
    assert!((0.005..0.03).contains(&fidelity.mean_abs_error), "{fidelity:?}");
    assert!((1e-6..0.01).contains(&fidelity.kl), "{fidelity:?}");
    let mass = |position: &Position| position.head.iter().map(|&(_, lp)| f64::from(lp).exp()).sum::<f64>();
    let expected = sequences.iter().flat_map(|s| &s.positions).map(mass).sum::<f64>() / 200.0;
    assert!((fidelity.head_mass - expected).abs() < 1e-9, "{fidelity:?}, {expected}");
}

#[test]
fn the_same_input_gives_the_same_bytes_and_the_order_of_a_support_does_not_matter() {
    let header = sample::header(600, 8, 4);
    let mut sequences = sample::sequences(&header, 3, 9);
    let first = encode(&header, &sequences).unwrap();
    assert_eq!(first.bytes, encode(&header, &sequences).unwrap().bytes);
    for position in sequences.iter_mut().flat_map(|sequence| &mut sequence.positions) {
        position.head.reverse();
        position.tail.reverse();
    }
    let reversed = encode(&header, &sequences).unwrap();
    assert_eq!(first.bytes, reversed.bytes);
    assert_eq!(first.sha256, retort_artifact::sha256_hex(&first.bytes));
}

/// The audit of a shard compares this: another attempt's file differs in its epoch alone.
#[test]
fn two_attempts_that_computed_the_same_have_the_same_content_hash() {
    let mut header = sample::header(600, 8, 4);
    let sequences = sample::sequences(&header, 2, 5);
    let content = |encoded: &Encoded| {
        let text = String::from_utf8_lossy(&encoded.bytes).into_owned();
        text.split("retort.content_sha256").nth(1).unwrap()[..67].to_owned()
    };
    let first = encode(&header, &sequences).unwrap();
    header.epoch = 9;
    let second = encode(&header, &sequences).unwrap();
    assert_ne!(first.sha256, second.sha256);
    assert_eq!(content(&first), content(&second));
    header.seed = 8;
    assert_ne!(content(&first), content(&encode(&header, &sequences).unwrap()));
}

#[test]
fn equal_maxima_keep_the_smaller_id_on_top() {
    let header = sample::header(100, 3, 0);
    let tie = Position { head: vec![(70, -1.5), (20, -1.5), (5, -1.501)], tail: vec![], label_logprob: -1.5 };
    let sequence = one(vec![tie]);
    let shard = decode(encode(&header, &[sequence]).unwrap().bytes, Limits::default()).unwrap();
    let targets = &shard.sequences[0].targets;
    assert_eq!(targets.top_ids, [20]);
    assert_eq!(targets.ids, [5, 20, 70]);
    assert!(targets.masses[1] >= targets.masses[0] && targets.masses[1] >= targets.masses[2]);
    assert_eq!(targets.logprobs[1], -1.5);
}

#[test]
fn extremes_are_kept() {
    // All mass on one token; an entry 60 nats below; the first and the last id; no draws needed.
    let header = sample::header(49_152, 4, 16);
    let sharp = Position {
        head: vec![(0, -1e-7), (49_151, -16.2), (7, -40.0), (8, -60.0)],
        tail: vec![],
        label_logprob: -60.0,
    };
    // One token drawn every time.
    let drawn = Position { head: vec![(9, -0.7)], tail: vec![(3, 16, -3.0)], label_logprob: -3.0 };
    let encoded = encode(&header, &[one(vec![sharp, drawn])]).unwrap();
    assert_eq!(encoded.fidelity.argmax_agreement, 1.0);
    let targets = decode(encoded.bytes, Limits::default()).unwrap().sequences.remove(0).targets;
    assert_eq!(targets.ids, [0, 7, 8, 49_151, 3, 9]);
    assert_eq!(targets.top_ids, [0, 9]);
    assert!((targets.logprobs[2] + 39.625).abs() < 0.2, "clamped to the range: {}", targets.logprobs[2]);
    let tail = 1.0 - f64::from(-0.7f32).exp();
    assert!((f64::from(targets.masses[4]) - tail).abs() < 1e-6);
}

#[test]
fn rows_without_targets_and_shards_without_rows_are_fine() {
    let header = sample::header(100, 4, 0);
    let mut empty = one(vec![]);
    empty.token_ids.clear();
    empty.target_mask.clear();
    let shard = decode(encode(&header, &[empty, one(vec![])]).unwrap().bytes, Limits::default()).unwrap();
    assert_eq!(shard.sequences.len(), 2);
    assert!(shard.sequences.iter().all(|sequence| sequence.targets.is_empty()));
    let none = encode(&header, &[]).unwrap();
    assert_eq!((none.rows, none.target_tokens), (0, 0));
    assert_eq!(decode(none.bytes, Limits::default()).unwrap().sequences, []);
}

#[test]
fn what_cannot_be_a_distribution_is_named_and_refused() {
    let header = sample::header(100, 2, 2);
    let good = Position { head: vec![(1, -0.5), (2, -1.5)], tail: vec![(3, 2, -3.0)], label_logprob: -0.5 };
    encode(&header, &[one(vec![good.clone()])]).unwrap();
    let broken = |change: fn(&mut Position)| {
        let mut position = good.clone();
        change(&mut position);
        let error = encode(&header, &[one(vec![good.clone(), position])]).unwrap_err();
        assert_eq!(error.code, Code::ShardUnfaithful);
        error.message
    };
    let place = "row \"r\": position 1: ";
    let cases: [(fn(&mut Position), &str); 12] = [
        (|p| p.head[1].1 = f32::NAN, "the head's mass is NaN"),
        (|p| p.tail[0].2 = f32::NEG_INFINITY, "a log-probability is -inf; the teacher's output cannot be trusted"),
        (
            |p| p.label_logprob = f32::INFINITY,
            "the label's log-probability is inf; the teacher's output cannot be trusted",
        ),
        (|p| p.head[0].1 = -0.1, "the head's mass is 1.127968"),
        (|p| p.head[0].0 = 100, "token 100 is outside the vocabulary of 100"),
        (|p| p.head[1].0 = 1, "token 1 is in the support twice"),
        (|p| p.tail[0].0 = 2, "token 2 is in the support twice"),
        (|p| p.tail[0].1 = 3, "the tail has 3 draws, the header says 2"),
        (|p| p.tail[0].1 = 0, "a tail entry was drawn 0 times"),
        (|p| p.tail[0].2 = -0.1, "tail token 3 is likelier (-0.1) than the head's best (-0.5)"),
        (|p| p.tail.clear(), "the tail has mass 0.170339 and no draws"),
        (|p| p.head.clear(), "the head is empty"),
    ];
    for (change, expected) in cases {
        assert_eq!(broken(change), format!("{place}{expected}"));
    }
    assert_eq!(broken(|p| p.head.push((9, -9.0))), format!("{place}the head has 3 entries, the header says 2"));
}

#[test]
fn what_cannot_be_a_row_is_named_and_refused() {
    let header = sample::header(100, 2, 0);
    let position = Position { head: vec![(1, -0.5)], tail: vec![], label_logprob: -0.5 };
    let cases: [(fn(&mut Sequence), &str); 4] = [
        (|s| s.token_ids.push(1), "row \"r\": 3 tokens have a target mask of 2"),
        (|s| s.target_mask[1] = false, "row \"r\": 0 targets have 1 distributions"),
        (
            |s| s.target_mask = vec![true, false],
            "row \"r\": the first token is marked as a target, but nothing precedes it",
        ),
        (|s| s.token_ids[0] = 100, "row \"r\": token 100 is outside the vocabulary of 100"),
    ];
    for (change, expected) in cases {
        let mut sequence = one(vec![position.clone()]);
        change(&mut sequence);
        let error = encode(&header, &[sequence]).unwrap_err();
        assert_eq!((error.code, error.message.as_str()), (Code::ShardUnfaithful, expected));
    }
    let mut header = header;
    header.capture_temperature = 0.7;
    let error = encode(&header, &[]).unwrap_err();
    assert_eq!(error.message, "the shard's header cannot be written: capture_temperature is 0.7; only 1 is stored");
}

#[test]
fn a_description_adds_up() {
    let header = sample::header(600, 8, 4);
    let sequences = sample::sequences(&header, 4, 10);
    let encoded = encode(&header, &sequences).unwrap();
    let description = describe(encoded.bytes.clone(), Limits::default(), 2).unwrap();
    assert_eq!((description.rows, description.target_tokens), (4, 40));
    assert_eq!(description.tokens, sequences.iter().map(|s| s.token_ids.len() as u64).sum::<u64>());
    assert_eq!((&description.sha256, description.bytes), (&encoded.sha256, encoded.bytes.len() as u64));
    assert!((description.mean_tail_mass - (1.0 - encoded.fidelity.head_mass)).abs() < 1e-6);
    assert!(description.columns.iter().map(|column| column.bytes).sum::<u64>() < description.bytes);
    assert_eq!(description.columns[7].name, "support_delta");
    assert_eq!(description.sequences.len(), 2);
    assert_eq!(description.sequences[1].tags, ["tag 0 \u{e9}"]);
    let json = serde_json::to_string(&description).unwrap();
    assert_eq!(serde_json::from_str::<serde_json::Value>(&json).unwrap()["header"]["head"], 8);
}

/// The tail's draws make the stored masses unbiased: averaged over many draws they are the truth.
#[test]
fn stored_masses_are_unbiased() {
    let header = sample::header(40, 4, 8);
    let mut rng = Counter::new(5, Purpose::Tail, 0, 0);
    let truth = sample::logprobs(40, &mut rng);
    let positions: Vec<Position> = (0..4000).map(|_| sample::position(&truth, 4, 8, &mut rng).0).collect();
    let shard = decode(encode(&header, &[one(positions)]).unwrap().bytes, Limits::default()).unwrap();
    let targets = &shard.sequences[0].targets;
    let mut mean = vec![0.0f64; 40];
    for (&id, &mass) in targets.ids.iter().zip(&targets.masses) {
        mean[id as usize] += f64::from(mass) / 4000.0;
    }
    for (id, (&mean, logprob)) in mean.iter().zip(&truth).enumerate() {
        assert!((mean - logprob.exp()).abs() < 0.005, "token {id}: {mean} against {}", logprob.exp());
    }
}

fn one(positions: Vec<Position>) -> Sequence {
    let targets = positions.len();
    Sequence {
        row_id: "r".to_owned(),
        row: 0,
        tags: vec![],
        token_ids: vec![1; targets + 1],
        target_mask: [vec![false], vec![true; targets]].concat(),
        finish_reason: "stop".to_owned(),
        positions,
    }
}
