use retort_core::Code;
use tch::{Device, Kind, Tensor};

use super::*;

const DEVICE: Device = Device::Cpu;

fn capture(head: u32, draws: u32, seed: u64) -> Capture {
    Capture { codec: Codec::HeadDraws { head, draws }, temperatures: vec![], seed }
}

fn targets(n: i64, token: u32) -> Vec<Target> {
    (0..n as u64).map(|position| Target { row: 5, position, token }).collect()
}

/// Log-softmax of one row, slowly, in f64.
fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let largest = logits.iter().copied().map(f64::from).fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - largest).exp()).sum();
    logits.iter().map(|&logit| f64::from(logit) - largest - sum.ln()).collect()
}

/// The obvious head: sort everything, take the first.
fn reference_head(log_probs: &[f64], head: usize) -> Vec<(u32, f64)> {
    let mut all: Vec<(u32, f64)> = log_probs.iter().enumerate().map(|(id, &lp)| (id as u32, lp)).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1));
    all.truncate(head);
    all
}

/// The obvious tail: walk all ids in order with a running f64 sum.
fn reference_draw(log_probs: &[f64], head: &[(u32, f64)], uniform: f64) -> u32 {
    let in_head = |id: usize| head.iter().any(|(top, _)| *top as usize == id);
    let mass = |id: usize| if in_head(id) { 0.0 } else { log_probs[id].exp() };
    let total: f64 = (0..log_probs.len()).map(mass).sum();
    let mut running = 0.0;
    for id in 0..log_probs.len() {
        running += mass(id);
        if running > uniform * total {
            return id as u32;
        }
    }
    unreachable!("a uniform below one falls somewhere")
}

fn random_logits(rows: i64, vocab: i64, seed: u64) -> Tensor {
    retort_llama::normal(&[rows, vocab], 3.0, (seed, 0)).unwrap()
}

fn row(logits_nv: &Tensor, index: i64) -> Vec<f32> {
    Vec::<f32>::try_from(&logits_nv.get(index).to_kind(Kind::Float)).unwrap()
}

#[test]
fn head_label_and_tail_are_the_obvious_ones() {
    // 1000 is no multiple of the block size, 40 is less than one block.
    for (vocab, head, draws) in [(1000, 16, 40), (40, 8, 5), (512, 1, 255), (300, 256, 16)] {
        let logits_nv = random_logits(7, vocab, 11);
        let capture = capture(head, draws, 3);
        let targets = targets(7, 2);
        let positions = capture.positions(&logits_nv, &targets).unwrap();
        let (mut draws_seen, mut draws_equal) = (0, 0);
        for (index, (position, target)) in positions.iter().zip(&targets).enumerate() {
            let log_probs = log_softmax(&row(&logits_nv, index as i64));
            let expected = reference_head(&log_probs, head as usize);
            assert_eq!(position.head.len(), expected.len());
            for (got, want) in position.head.iter().zip(&expected) {
                assert_eq!(got.0, want.0, "vocab {vocab}, row {index}");
                assert!((f64::from(got.1) - want.1).abs() < 2e-6, "{got:?} {want:?}");
            }
            assert!((f64::from(position.label_logprob) - log_probs[2]).abs() < 2e-6);

            let mut random = Counter::new(3, Purpose::Tail, target.row, target.position);
            let mut counts = std::collections::BTreeMap::<u32, u32>::new();
            let offset = random.next_f64();
            for draw in 0..draws {
                let uniform = (f64::from(draw) + offset) / f64::from(draws);
                *counts.entry(reference_draw(&log_probs, &expected, uniform)).or_default() += 1;
            }
            assert_eq!(position.tail.iter().map(|(_, count, _)| u32::from(*count)).sum::<u32>(), draws);
            assert!(position.tail.windows(2).all(|pair| pair[0].0 < pair[1].0), "sorted, no id twice");
            for &(id, count, log_prob) in &position.tail {
                assert!(expected.iter().all(|(top, _)| *top != id), "{id} is in the head");
                assert!((f64::from(log_prob) - log_probs[id as usize]).abs() < 1e-5);
                draws_equal += u32::from(count).min(counts.get(&id).copied().unwrap_or(0));
            }
            draws_seen += draws;
        }
        // A uniform within rounding of a boundary may fall on the neighbour.
        assert!(draws_equal + 2 >= draws_seen, "{draws_equal} of {draws_seen} draws agree");
    }
}

#[test]
fn tail_draws_follow_the_renormalised_tail() {
    let logits_v = row(&random_logits(1, 300, 5), 0);
    let (head, draws, n) = (20, 250, 400);
    let logits_nv = Tensor::from_slice(&logits_v).view([1, 300]).expand([n, 300], false);
    let capture = capture(head, draws, 8);
    let positions = capture.positions(&logits_nv, &targets(n, 0)).unwrap();
    let log_probs = log_softmax(&logits_v);
    let top = reference_head(&log_probs, head as usize);
    let in_head = |id: usize| top.iter().any(|(other, _)| *other as usize == id);
    let mass: Vec<f64> = (0..300).map(|id| if in_head(id) { 0.0 } else { log_probs[id].exp() }).collect();
    let total: f64 = mass.iter().sum();

    let mut counts = vec![0.0; 300];
    for position in &positions {
        for &(id, count, _) in &position.tail {
            counts[id as usize] += f64::from(count);
        }
    }
    let all = n as f64 * f64::from(draws);
    // Cells with fewer than five expected draws are pooled.
    let (mut chi2, mut cells, mut rest) = (0.0, 0.0, (0.0, 0.0));
    for id in (0..300).filter(|&id| mass[id] > 0.0) {
        let expected = all * mass[id] / total;
        if expected < 5.0 {
            rest = (rest.0 + counts[id], rest.1 + expected);
        } else {
            chi2 += (counts[id] - expected) * (counts[id] - expected) / expected;
            cells += 1.0;
        }
    }
    if rest.1 > 0.0 {
        chi2 += (rest.0 - rest.1) * (rest.0 - rest.1) / rest.1;
    }
    // Mean `cells`, deviation sqrt(2 cells); five deviations out is one in a million.
    assert!(chi2 < cells + 5.0 * (2.0f64 * cells).sqrt(), "chi-squared {chi2} over {cells} cells");
}

#[test]
fn head_plus_weighted_tail_is_unbiased() {
    // The expectation of sum_v t_v f(v) over draws must be sum_v p_v f(v), for an f that lies mostly
    // on the tail.
    let logits_v = row(&random_logits(1, 2000, 21), 0);
    let (head, draws, n) = (8, 16, 3000);
    let logits_nv = Tensor::from_slice(&logits_v).view([1, 2000]).expand([n, 2000], false);
    let capture = capture(head, draws, 1);
    let positions = capture.positions(&logits_nv, &targets(n, 0)).unwrap();
    let log_probs = log_softmax(&logits_v);
    let value = |id: u32| f64::from(id % 7) - 2.0;
    let truth: f64 = log_probs.iter().enumerate().map(|(id, lp)| lp.exp() * value(id as u32)).sum();

    let estimates: Vec<f64> = positions
        .iter()
        .map(|position| {
            let head: f64 = position.head.iter().map(|&(id, lp)| f64::from(lp).exp() * value(id)).sum();
            let head_mass: f64 = position.head.iter().map(|&(_, lp)| f64::from(lp).exp()).sum();
            let share = (1.0 - head_mass) / f64::from(draws);
            head + position.tail.iter().map(|&(id, count, _)| share * f64::from(count) * value(id)).sum::<f64>()
        })
        .collect();
    let mean = estimates.iter().sum::<f64>() / n as f64;
    let variance = estimates.iter().map(|e| (e - mean) * (e - mean)).sum::<f64>() / (n as f64 - 1.0);
    let error = (variance / n as f64).sqrt();
    assert!((mean - truth).abs() < 4.5 * error, "mean {mean}, truth {truth}, standard error {error}");
    assert!(error < 0.02, "the test would not see a bias: {error}");
}

fn of(codec: Codec) -> Capture {
    Capture { codec, temperatures: vec![], seed: 3 }
}

#[test]
fn a_threshold_keeps_what_reaches_it_and_samples_the_rest_once_a_step() {
    let logits_nv = random_logits(40, 900, 6);
    for threshold in [0.002, 0.02, 0.2] {
        let positions = of(Codec::Threshold { threshold }).positions(&logits_nv, &targets(40, 1)).unwrap();
        for (index, position) in positions.iter().enumerate() {
            let log_probs = log_softmax(&row(&logits_nv, index as i64));
            let reaching = log_probs.iter().filter(|&&lp| lp.exp() >= threshold).count();
            assert_eq!(position.head.len(), reaching.max(1), "threshold {threshold}, row {index}");
            let rest = 1.0 - position.head.iter().map(|&(_, lp)| f64::from(lp).exp()).sum::<f64>();
            let drawn = position.tail.len() as f64;
            if rest >= threshold {
                assert_eq!(drawn, (rest / threshold).floor());
            } else {
                assert!(drawn <= 1.0);
            }
            assert!(position.tail.iter().all(|&(id, count, lp)| {
                count == 1
                    && (f64::from(lp) - log_probs[id as usize]).abs() < 1e-5
                    && position.head.iter().all(|&(other, _)| other != id)
            }));
        }
    }
}

/// Over many captures of one distribution every codec that samples gives the truth, and a threshold with
/// the fewest entries the least variance.
#[test]
fn sampled_codecs_are_unbiased_and_a_threshold_varies_least() {
    let logits_v = row(&random_logits(1, 600, 33), 0);
    let n = 3000;
    let logits_nv = Tensor::from_slice(&logits_v).view([1, 600]).expand([n, 600], false);
    let log_probs = log_softmax(&logits_v);
    let measure = |codec: Codec| -> (f64, f64) {
        let positions = of(codec).positions(&logits_nv, &targets(n, 0)).unwrap();
        let (mut mean, mut squares, mut entries) = (vec![0.0; 600], 0.0, 0.0);
        for position in &positions {
            let drawn: f64 = position.tail.iter().map(|&(_, count, _)| f64::from(count)).sum();
            let rest = 1.0 - position.head.iter().map(|&(_, lp)| f64::from(lp).exp()).sum::<f64>();
            let mut masses = vec![0.0; 600];
            position.head.iter().for_each(|&(id, lp)| masses[id as usize] = f64::from(lp).exp());
            let whole = match codec {
                Codec::Threshold { threshold } => rest.max(threshold),
                _ => rest,
            };
            position.tail.iter().for_each(|&(id, c, _)| masses[id as usize] = whole * f64::from(c) / drawn);
            for (id, mass) in masses.iter().enumerate() {
                mean[id] += mass / n as f64;
                squares += (mass - log_probs[id].exp()).powi(2) / n as f64;
            }
            entries += (position.head.len() + position.tail.len()) as f64 / n as f64;
        }
        for (id, (mean, lp)) in mean.iter().zip(&log_probs).enumerate() {
            assert!((mean - lp.exp()).abs() < 0.006, "{codec:?}, token {id}: {mean}, not {}", lp.exp());
        }
        (squares, entries)
    };
    let (random, random_entries) = measure(Codec::Random { draws: 50 });
    let (threshold, threshold_entries) = measure(Codec::Threshold { threshold: 0.025 });
    let (head_draws, _) = measure(Codec::HeadDraws { head: 4, draws: 16 });
    assert!(threshold_entries < random_entries * 1.1, "{threshold_entries} {random_entries}");
    assert!(threshold < random / 2.0, "variance {threshold} of the threshold, {random} at random");
    assert!(head_draws > 0.0);
}

#[test]
fn a_full_capture_keeps_every_token_and_pure_sampling_no_head() {
    let logits_nv = random_logits(3, 200, 12);
    let capture = Capture { temperatures: vec![0.5, 2.0], ..of(Codec::Full) };
    for (index, position) in capture.positions(&logits_nv, &targets(3, 0)).unwrap().iter().enumerate() {
        let log_probs = log_softmax(&row(&logits_nv, index as i64));
        assert_eq!((position.head.len(), position.tail.len()), (200, 0));
        for (sum, temperature) in position.log_sum_exps.iter().zip([0.5, 2.0]) {
            let exact = log_probs.iter().map(|lp| (lp / temperature).exp()).sum::<f64>().ln();
            assert!((f64::from(*sum) - exact).abs() < 1e-5, "{sum} {exact}");
        }
    }
    for position in of(Codec::Random { draws: 30 }).positions(&logits_nv, &targets(3, 0)).unwrap() {
        assert!(position.head.is_empty());
        assert_eq!(position.tail.iter().map(|(_, count, _)| count).sum::<u8>(), 30);
    }
}

#[test]
fn a_position_does_not_depend_on_its_batch() {
    let logits_nv = random_logits(9, 1000, 4);
    let capture = capture(16, 16, 3);
    let targets = targets(9, 1);
    let together = capture.positions(&logits_nv, &targets).unwrap();
    for (index, target) in targets.iter().enumerate() {
        let alone = capture.positions(&logits_nv.narrow(0, index as i64, 1), &[*target]).unwrap();
        assert_eq!(alone[0], together[index]);
    }
}

#[test]
fn a_head_of_the_whole_vocabulary_leaves_no_tail() {
    let capture = capture(64, 16, 0);
    let positions = capture.positions(&random_logits(3, 50, 1), &targets(3, 0)).unwrap();
    for position in positions {
        assert_eq!(position.head.len(), 50);
        assert!(position.tail.is_empty());
        let mass: f64 = position.head.iter().map(|&(_, lp)| f64::from(lp).exp()).sum();
        assert!((mass - 1.0).abs() < 1e-6);
    }
}

#[test]
fn a_tail_without_mass_is_not_drawn_from() {
    let logits_nv = Tensor::zeros([2, 600], (Kind::Float, DEVICE));
    let _ = logits_nv.get(0).narrow(0, 7, 1).fill_(90.0);
    let capture = capture(2, 4, 0);
    let positions = capture.positions(&logits_nv, &targets(2, 7)).unwrap();
    assert!(positions[0].tail.is_empty());
    assert_eq!(positions[0].head[0], (7, 0.0));
    assert_eq!(positions[1].tail.iter().map(|(_, count, _)| count).sum::<u8>(), 4);
}

#[test]
fn impossible_tokens_are_left_out() {
    let logits_nv = Tensor::full([1, 600], f64::NEG_INFINITY, (Kind::Float, DEVICE));
    for (id, logit) in [(3, 1.0), (500, 0.0), (599, 2.0)] {
        let _ = logits_nv.get(0).narrow(0, id, 1).fill_(logit);
    }
    let wide = capture(8, 4, 0).positions(&logits_nv, &targets(1, 3)).unwrap();
    assert_eq!(wide[0].head.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [599, 3, 500]);
    assert!(wide[0].tail.is_empty());
    let narrow = capture(1, 200, 0).positions(&logits_nv, &targets(1, 3)).unwrap();
    assert_eq!(narrow[0].tail.iter().map(|(id, ..)| *id).collect::<Vec<_>>(), [3, 500]);
}

#[test]
fn logits_that_are_no_numbers_are_refused() {
    for bad in [f64::NAN, f64::INFINITY] {
        let logits_nv = random_logits(3, 600, 2);
        let _ = logits_nv.get(1).narrow(0, 44, 1).fill_(bad);
        let error = capture(4, 4, 0).positions(&logits_nv, &targets(3, 0)).unwrap_err();
        assert_eq!(error.code, Code::ShardUnfaithful);
        assert!(error.message.contains("row 5, position 1"), "{error}");
    }
    let nothing = Tensor::full([1, 8], f64::NEG_INFINITY, (Kind::Float, DEVICE));
    let error = capture(4, 4, 0).positions(&nothing, &targets(1, 0)).unwrap_err();
    assert_eq!(error.code, Code::ShardUnfaithful);
}

#[test]
fn half_precision_logits_are_taken_as_they_are() {
    let logits_nv = random_logits(4, 700, 9).to_kind(Kind::BFloat16);
    let capture = capture(8, 8, 2);
    let halves = capture.positions(&logits_nv, &targets(4, 0)).unwrap();
    let floats = capture.positions(&logits_nv.to_kind(Kind::Float), &targets(4, 0)).unwrap();
    assert_eq!(halves, floats);
}

#[test]
fn a_token_beyond_the_vocabulary_is_an_error() {
    let error = capture(4, 0, 0).positions(&random_logits(1, 8, 0), &targets(1, 8)).unwrap_err();
    assert_eq!(error.code, Code::VocabularyMismatch);
}
