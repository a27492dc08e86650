//! What goes in comes out, and what cannot be a distribution does not go in.

use retort_artifact::soft_targets::{
    Encoded, Header, Limits, Position, QUANTISER_MAX_ERROR, QUANTISER_NEAR_ERROR, QUANTISER_RANGE, Reader, Sequence,
    Source, SparseTargets, TailLogprobs, Writer, decode, describe, encode,
};
use retort_core::{
    Code,
    random::{Counter, Purpose},
    spec::{Codec, Quantiser, SoftTargets},
};

use crate::sample;

const CODECS: [Codec; 8] = [
    Codec::Full,
    Codec::TopK { head: 12 },
    Codec::TopKTail { head: 12 },
    Codec::HeadDraws { head: 32, draws: 16 },
    Codec::HeadDraws { head: 8, draws: 0 },
    Codec::Threshold { threshold: 0.02 },
    Codec::Threshold { threshold: 0.3 },
    Codec::Random { draws: 40 },
];

/// Every codec, with bytes and with floats, with the tail's log-probabilities and without.
fn headers() -> Vec<Header> {
    let mut headers = Vec::new();
    for codec in CODECS {
        for (quantiser, tail_logprobs, temperatures) in [
            (Quantiser::U8, TailLogprobs::Mean(0.0), vec![]),
            (Quantiser::U8, TailLogprobs::Stored, vec![0.5, 2.0]),
            (Quantiser::F32, TailLogprobs::Stored, vec![]),
        ] {
            let soft_targets = SoftTargets { codec, quantiser, temperatures };
            headers.push(Header { soft_targets, tail_logprobs, ..sample::with_codec(600, codec) });
        }
    }
    headers
}

#[test]
fn a_shard_reads_back_as_it_was_written_with_every_codec() {
    for header in headers() {
        let sequences = sample::sequences(&header, 5, 20);
        let encoded = encode(&header, &sequences).unwrap();
        assert_eq!((encoded.rows, encoded.target_tokens), (5, 100));
        let shard = decode(encoded.bytes, Limits::default()).unwrap();
        let tail_logprobs = match (header.tail_logprobs, shard.header.tail_logprobs) {
            (TailLogprobs::Mean(_), mean @ TailLogprobs::Mean(_)) => mean,
            (asked, _) => asked,
        };
        assert_eq!(shard.header, Header { tail_logprobs, ..header.clone() });
        assert_eq!(shard.target_tokens(), 100);
        for (raw, read) in sequences.iter().zip(&shard.sequences) {
            assert_eq!((&raw.row_id, raw.row, &raw.tags), (&read.row_id, read.row, &read.tags));
            assert_eq!((&raw.token_ids, &raw.target_mask), (&read.token_ids, &read.target_mask));
            assert_eq!(raw.finish_reason, read.finish_reason);
            let targets = &read.targets;
            assert_eq!(targets.offsets.len(), targets.len() + 1);
            for (p, position) in raw.positions.iter().enumerate() {
                check_position(position, &shard.header, targets, p);
            }
        }
    }
}

/// Relative error of a mass that is stored with eight bits.
const COARSE: f64 = 1.0 / 256.0;

fn check_position(raw: &Position, header: &Header, targets: &SparseTargets, p: usize) {
    let codec = header.soft_targets.codec;
    let range = targets.range(p);
    let ids = &targets.ids[range.clone()];
    assert!(ids.windows(2).all(|pair| pair[0] < pair[1]) && ids.iter().all(|&id| id < header.vocab_size));
    assert_eq!(ids.len(), raw.head.len() + raw.tail.len());
    let masses = &targets.masses[range.clone()];
    let true_head: f64 = raw.head.iter().map(|&(_, logprob)| f64::from(logprob).exp()).sum();
    let outside = 1.0 - true_head;
    let head_max = raw.head.iter().map(|&(_, logprob)| logprob).fold(f32::MIN, f32::max);
    let max = raw.tail.iter().filter(|_| raw.head.is_empty()).map(|entry| entry.2).fold(head_max, f32::max);
    // What all entries stand for.
    let drawn: f64 = raw.tail.iter().map(|&(_, count, _)| f64::from(count)).sum();
    let tail = match codec {
        Codec::Threshold { threshold } if drawn > 0.0 => outside.max(threshold),
        _ if drawn > 0.0 => outside,
        _ => 0.0,
    };
    let whole: f64 = masses.iter().map(|&mass| f64::from(mass)).sum::<f64>() + f64::from(targets.residuals[p]);
    let expected = true_head + tail + if codec.has_bucket() { outside } else { 0.0 };
    assert!((whole - expected).abs() < 0.01, "{codec:?}: {whole}, not {expected}");
    if codec.has_bucket() {
        assert!((f64::from(targets.residuals[p]) - outside).abs() <= outside * COARSE + 1e-6);
    } else {
        assert_eq!(targets.residuals[p], 0.0);
    }
    for &(id, logprob) in &raw.head {
        let at = ids.binary_search(&id).unwrap();
        assert!(targets.heads[range.start + at]);
        assert!((masses[at].ln() - targets.logprobs[range.start + at]).abs() < 1e-4);
        // The factor that makes the head whole adds what rounding can have taken elsewhere.
        let error = (targets.logprobs[range.start + at] - logprob).abs();
        assert!(error <= bound(max - logprob) + QUANTISER_MAX_ERROR, "{error}");
    }
    for &(id, count, logprob) in &raw.tail {
        let at = ids.binary_search(&id).unwrap();
        assert!(!targets.heads[range.start + at]);
        let expected = tail * f64::from(count) / drawn;
        assert!((f64::from(masses[at]) - expected).abs() < expected * COARSE + 1e-6, "{codec:?}");
        match header.tail_logprobs {
            TailLogprobs::Stored => {
                let error = (targets.logprobs[range.start + at] - logprob).abs();
                assert!(error <= bound(max - logprob) + max.abs() / 256.0, "{error}");
            }
            TailLogprobs::Mean(mean) => assert_eq!(targets.logprobs[range.start + at], mean),
        }
    }
    let by_count = raw.tail.iter().max_by_key(|&&(id, count, _)| (count, std::cmp::Reverse(id))).map(|entry| entry.0);
    let top = raw.head.iter().max_by(|a, b| a.1.total_cmp(&b.1).then(b.0.cmp(&a.0))).map(|entry| entry.0);
    assert_eq!(Some(targets.top_ids[p]), top.or(by_count));
    assert!((targets.label_logprobs[p] - raw.label_logprob).abs() <= raw.label_logprob.abs() / 256.0);
    let temperatures = header.soft_targets.temperatures.len();
    assert_eq!(targets.log_sum_exps[p * temperatures..(p + 1) * temperatures], raw.log_sum_exps);
}

#[test]
fn the_mean_of_the_tails_log_probabilities_makes_the_shards_mean_kl_right() {
    let stored = sample::with_codec(600, Codec::Threshold { threshold: 0.05 });
    let mean = Header { tail_logprobs: TailLogprobs::Mean(0.0), ..stored.clone() };
    let sequences = sample::sequences(&stored, 6, 40);
    let negative_entropy = |header: &Header| {
        let shard = decode(encode(header, &sequences).unwrap().bytes, Limits::default()).unwrap();
        let of = |targets: &SparseTargets| -> f64 {
            targets.masses.iter().zip(&targets.logprobs).map(|(&t, &logprob)| f64::from(t) * f64::from(logprob)).sum()
        };
        shard.sequences.iter().map(|sequence| of(&sequence.targets)).sum::<f64>() / 240.0
    };
    let (stored, mean) = (negative_entropy(&stored), negative_entropy(&mean));
    assert!((stored - mean).abs() < 0.005, "{stored} {mean}");
}

#[test]
fn at_another_temperature_a_shard_gives_that_temperatures_distribution() {
    let mut rng = Counter::new(3, Purpose::Tail, 0, 0);
    let truth = sample::logprobs(60, &mut rng);
    for codec in CODECS {
        let soft_targets = SoftTargets { temperatures: vec![0.5, 2.0], ..SoftTargets::of(codec) };
        let header = Header { soft_targets, ..sample::with_codec(60, codec) };
        let positions: Vec<Position> =
            (0..3000).map(|_| sample::position(&truth, &header.soft_targets, &mut rng).0).collect();
        let shard = decode(encode(&header, &[one(positions)]).unwrap().bytes, Limits::default()).unwrap();
        for (index, temperature) in [(0, 0.5), (1, 2.0)] {
            let tempered = shard.sequences[0].targets.at_temperature(index, temperature).unwrap();
            let norm: f64 = truth.iter().map(|logprob| (logprob / temperature).exp()).sum();
            let mut mean = vec![0.0f64; 60];
            for (&id, &mass) in tempered.ids.iter().zip(&tempered.masses) {
                mean[id as usize] += f64::from(mass) / 3000.0;
            }
            let residual = tempered.residuals.iter().map(|&mass| f64::from(mass)).sum::<f64>() / 3000.0;
            let mut missing = 0.0;
            for (id, (&mean, logprob)) in mean.iter().zip(&truth).enumerate() {
                let exact = (logprob / temperature).exp() / norm;
                let kept =
                    !matches!(codec, Codec::TopK { .. } | Codec::TopKTail { .. } | Codec::HeadDraws { draws: 0, .. });
                if kept || mean > 0.0 {
                    assert!((mean - exact).abs() < 0.03, "{codec:?} at {temperature}, token {id}: {mean}, not {exact}");
                } else {
                    missing += exact;
                }
            }
            if codec.has_bucket() {
                assert!((residual - missing).abs() < 0.02, "{residual} {missing}");
            }
        }
        assert!(shard.sequences[0].targets.at_temperature(2, 3.0).is_none());
    }
}

#[test]
fn a_file_of_many_row_groups_reads_as_one_of_few() {
    let header = sample::with_codec(600, Codec::Full);
    let sequences = sample::sequences(&header, 4, 3);
    let whole = decode(encode(&header, &sequences).unwrap().bytes, Limits::default()).unwrap();
    // Written row by row into a file, read group by group.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("shard.parquet");
    let mut writer = Writer::new(header.clone(), std::fs::File::create(&path).unwrap()).unwrap();
    sequences.iter().cloned().for_each(|sequence| writer.push(sequence).unwrap());
    let (_, written) = writer.finish().unwrap();
    assert_eq!(written.bytes, std::fs::metadata(&path).unwrap().len());
    assert_eq!(written.sha256, retort_artifact::sha256_hex(&std::fs::read(&path).unwrap()));
    written.verify(Source::open(&path).unwrap()).unwrap();
    let read: Vec<_> =
        Reader::open(Source::open(&path).unwrap(), Limits::default()).unwrap().flat_map(Result::unwrap).collect();
    assert_eq!(read, whole.sequences);
    // Another file does not pass for it.
    let other = encode(&Header { epoch: 9, ..header.clone() }, &sequences).unwrap();
    assert_eq!(written.verify(other.bytes).unwrap_err().code, Code::ShardUnfaithful);
    let fewer = encode(&header, &sequences[..3]).unwrap();
    assert_eq!(written.verify(fewer.bytes).unwrap_err().message, "1 rows of the shard do not read back");
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
    let tie = Position {
        head: vec![(70, -1.5), (20, -1.5), (5, -1.501)],
        tail: vec![],
        label_logprob: -1.5,
        log_sum_exps: vec![],
    };
    let sequence = one(vec![tie]);
    let shard = decode(encode(&header, &[sequence]).unwrap().bytes, Limits::default()).unwrap();
    let targets = &shard.sequences[0].targets;
    assert_eq!(targets.top_ids, [20]);
    assert_eq!(targets.ids, [5, 20, 70]);
    assert!(targets.masses[1] > targets.masses[0] && targets.masses[1] > targets.masses[2]);
    assert!((targets.logprobs[1] + 1.5).abs() < 0.005);
}

/// Positions whose likeliest tokens are nearly alike, as many as it takes to meet every rounding.
#[test]
fn rounding_never_changes_the_first_place() {
    let header = Header { tail_logprobs: TailLogprobs::Mean(0.0), ..sample::with_codec(100, Codec::TopK { head: 6 }) };
    let mut rng = Counter::new(8, Purpose::Tail, 0, 0);
    let position = |_| {
        let best = -1.2 - 2.0 * rng.next_f64() as f32;
        let near = |id: u32| (id, best - 0.04 * (rng.next_f64() * 8.0).floor() as f32 / 8.0);
        let head: Vec<(u32, f32)> = [90, 4, 17, 60].map(near).to_vec();
        Position { head, tail: vec![], label_logprob: best, log_sum_exps: vec![] }
    };
    let positions: Vec<Position> = (0..20_000).map(position).collect();
    let positions: Vec<Position> = positions
        .into_iter()
        .filter(|position| position.head.iter().map(|entry| entry.1.exp()).sum::<f32>() <= 1.0)
        .collect();
    assert!(positions.len() > 10_000);
    let shard = decode(encode(&header, &[one(positions.clone())]).unwrap().bytes, Limits::default()).unwrap();
    let targets = &shard.sequences[0].targets;
    for (p, raw) in positions.iter().enumerate() {
        let top = raw.head.iter().max_by(|a, b| a.1.total_cmp(&b.1).then(b.0.cmp(&a.0))).unwrap().0;
        let range = targets.range(p);
        let heaviest = range.max_by(|&a, &b| targets.masses[a].total_cmp(&targets.masses[b])).unwrap();
        assert_eq!((targets.top_ids[p], targets.ids[heaviest]), (top, top), "position {p}: {raw:?}");
    }
}

#[test]
fn extremes_are_kept() {
    // All mass on one token; an entry 60 nats below; the first and the last id; no draws needed.
    let header = sample::header(49_152, 4, 16);
    let sharp = Position {
        head: vec![(0, -1e-7), (49_151, -16.2), (7, -40.0), (8, -60.0)],
        tail: vec![],
        label_logprob: -60.0,
        log_sum_exps: vec![],
    };
    // One token drawn every time.
    let drawn =
        Position { head: vec![(9, -0.7)], tail: vec![(3, 16, -3.0)], label_logprob: -3.0, log_sum_exps: vec![] };
    let encoded = encode(&header, &[one(vec![sharp, drawn])]).unwrap();
    assert_eq!(encoded.fidelity.argmax_agreement, 1.0);
    let targets = decode(encoded.bytes, Limits::default()).unwrap().sequences.remove(0).targets;
    assert_eq!(targets.ids, [0, 7, 8, 49_151, 3, 9]);
    assert_eq!(targets.top_ids, [0, 9]);
    assert!((targets.logprobs[2] + 31.625).abs() < 0.2, "clamped to the range: {}", targets.logprobs[2]);
    let tail = 1.0 - f64::from(-0.7f32).exp();
    assert!((f64::from(targets.masses[4]) - tail).abs() < tail * COARSE);
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
    let good = Position {
        head: vec![(1, -0.5), (2, -1.5)],
        tail: vec![(3, 2, -3.0)],
        label_logprob: -0.5,
        log_sum_exps: vec![],
    };
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
        (|p| p.head[1].1 = f32::NAN, "a log-probability is NaN; the teacher's output cannot be trusted"),
        (|p| p.tail[0].2 = f32::NEG_INFINITY, "a log-probability is -inf; the teacher's output cannot be trusted"),
        (
            |p| p.label_logprob = f32::INFINITY,
            "the label's log-probability is inf; the teacher's output cannot be trusted",
        ),
        (|p| p.head[0].1 = -0.1, "the head's mass is 1.127968"),
        (|p| p.head[0].0 = 100, "token 100 is outside the vocabulary of 100"),
        (|p| p.head[1].0 = 1, "token 1 is in the support twice"),
        (|p| p.tail[0].0 = 2, "token 2 is in the support twice"),
        (|p| p.tail[0].1 = 3, "the tail has mass 0.170339 and 3 draws, which head_draws cannot have"),
        (|p| p.tail[0].1 = 0, "a tail entry was drawn 0 times"),
        (|p| p.tail[0].2 = -0.1, "tail token 3 is likelier (-0.1) than the head's best (-0.5)"),
        (|p| p.tail.clear(), "the tail has mass 0.170339 and 0 draws, which head_draws cannot have"),
        (|p| p.head.clear(), "the head is empty"),
    ];
    for (change, expected) in cases {
        assert_eq!(broken(change), format!("{place}{expected}"));
    }
    assert_eq!(
        broken(|p| p.head.push((9, -9.0))),
        format!("{place}the head has 3 entries, the codec head_draws has 2")
    );
}

#[test]
fn what_cannot_be_a_row_is_named_and_refused() {
    let header = sample::header(100, 2, 0);
    let position = Position { head: vec![(1, -0.5)], tail: vec![], label_logprob: -0.5, log_sum_exps: vec![] };
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
    header.vocab_size = 0;
    let error = encode(&header, &[]).unwrap_err();
    assert_eq!(
        error.message,
        "the shard's header cannot be written: vocab_size is 0; it must lie between 1 and 16777216"
    );
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
    assert!((description.mean_tail_mass - (1.0 - encoded.fidelity.head_mass)).abs() < COARSE);
    assert!(description.columns.iter().map(|column| column.bytes).sum::<u64>() < description.bytes);
    assert_eq!(description.columns[8].name, "head_delta");
    assert_eq!(description.sequences.len(), 2);
    assert_eq!(description.sequences[1].tags, ["tag 0 \u{e9}"]);
    let json = serde_json::to_string(&description).unwrap();
    assert_eq!(serde_json::from_str::<serde_json::Value>(&json).unwrap()["header"]["soft_targets"]["head"], 8);
}

/// Samples make the stored masses unbiased: averaged over many captures they are the truth.
#[test]
fn sampled_codecs_are_unbiased() {
    for (codec, tolerance) in [
        (Codec::HeadDraws { head: 4, draws: 8 }, 0.005),
        (Codec::Threshold { threshold: 0.1 }, 0.007),
        (Codec::Threshold { threshold: 0.4 }, 0.015),
        (Codec::Random { draws: 12 }, 0.008),
    ] {
        let header = sample::with_codec(40, codec);
        let mut rng = Counter::new(5, Purpose::Tail, 0, 0);
        let truth = sample::logprobs(40, &mut rng);
        let positions: Vec<Position> =
            (0..4000).map(|_| sample::position(&truth, &header.soft_targets, &mut rng).0).collect();
        let shard = decode(encode(&header, &[one(positions)]).unwrap().bytes, Limits::default()).unwrap();
        let targets = &shard.sequences[0].targets;
        let mut mean = vec![0.0f64; 40];
        for (&id, &mass) in targets.ids.iter().zip(&targets.masses) {
            mean[id as usize] += f64::from(mass) / 4000.0;
        }
        for (id, (&mean, logprob)) in mean.iter().zip(&truth).enumerate() {
            assert!((mean - logprob.exp()).abs() < tolerance, "{codec:?}, token {id}: {mean}, not {}", logprob.exp());
        }
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
