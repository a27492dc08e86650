use tch::{Device, Kind, Tensor};

use super::*;

fn places(n: u64) -> Vec<Place> {
    (0..n).map(|position| Place { row: 2, position }).collect()
}

fn random_logits(rows: i64, vocab: i64, scale: f64) -> Tensor {
    retort_llama::normal(&[rows, vocab], scale, (6, 0)).unwrap()
}

/// The obvious sampler: softmax, sort, cut, walk; all in f64.
fn reference(logits: &[f32], temperature: f64, top_p: f64, uniform: f64) -> u32 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f64> = logits.iter().map(|&l| (f64::from(l - largest) / temperature).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let mut sorted: Vec<(u32, f64)> = weights.iter().enumerate().map(|(id, w)| (id as u32, w / sum)).collect();
    if top_p < 1.0 {
        sorted.sort_by(|a, b| b.1.total_cmp(&a.1));
    }
    let mut nucleus = 0.0;
    let mut size = 0;
    while size < sorted.len() && (nucleus < top_p || top_p >= 1.0) {
        nucleus += sorted[size].1;
        size += 1;
    }
    let mut running = 0.0;
    for (id, p) in &sorted[..size] {
        running += p;
        if running > uniform * nucleus {
            return *id;
        }
    }
    sorted[size - 1].0
}

#[test]
fn tokens_are_the_obvious_ones() {
    // Flat logits make nuclei far wider than the first candidates looked at.
    for (scale, vocab) in [(4.0, 3000), (0.1, 3000), (1.0, 40)] {
        for (temperature, top_p) in [(0.7, 0.95), (1.0, 1.0), (1.3, 0.5), (2.0, 1.0), (0.7, 1e-6)] {
            let n = 200;
            let logits_bv = random_logits(n, vocab, scale);
            let sampler = Sampler::new(temperature, top_p, 12);
            let tokens = sampler.next(&logits_bv, &places(n as u64), &[]).unwrap();
            let agree = (0..n as usize)
                .filter(|&index| {
                    let logits = Vec::<f32>::try_from(&logits_bv.get(index as i64)).unwrap();
                    let uniform = Counter::new(12, Purpose::Sample, 2, index as u64).next_f64();
                    tokens[index] == reference(&logits, temperature, top_p, uniform)
                })
                .count();
            // A uniform within rounding of a boundary may fall on the neighbour.
            assert!(agree + 1 >= n as usize, "{agree} of {n} at temperature {temperature}, top_p {top_p}");
        }
    }
}

#[test]
fn temperature_zero_is_the_most_likely_token() {
    let logits_bv = random_logits(5, 300, 1.0);
    let expected: Vec<i64> = Vec::try_from(&logits_bv.argmax(1, false)).unwrap();
    for temperature in [0.0, 1e-5] {
        let tokens = Sampler::new(temperature, 0.9, 0).next(&logits_bv, &places(5), &[]).unwrap();
        assert_eq!(tokens.iter().map(|&id| i64::from(id)).collect::<Vec<_>>(), expected);
    }
}

#[test]
fn a_draw_depends_on_its_place_alone() {
    let logits_bv = random_logits(6, 500, 1.0);
    let sampler = Sampler::new(1.0, 0.9, 4);
    let places = places(6);
    let together = sampler.next(&logits_bv, &places, &[]).unwrap();
    for index in 0..6usize {
        let alone = sampler.next(&logits_bv.narrow(0, index as i64, 1), &places[index..=index], &[]).unwrap();
        assert_eq!(alone[0], together[index]);
    }
    let other_seed = Sampler { seed: 5, ..sampler }.next(&logits_bv, &places, &[]).unwrap();
    assert_ne!(other_seed, together);
}

#[test]
fn logits_that_are_no_numbers_end_in_some_token() {
    let logits_bv = Tensor::full([2, 300], f64::NAN, (Kind::Float, Device::Cpu));
    for top_p in [0.9, 1.0] {
        let tokens = Sampler::new(1.0, top_p, 0).next(&logits_bv, &places(2), &[]).unwrap();
        assert_eq!(tokens.len(), 2);
        assert!(tokens.iter().all(|&id| id < 300));
    }
}

#[test]
fn a_row_in_memory_draws_as_a_row_of_a_tensor_does() {
    let logits_bv = random_logits(24, 3000, 2.0);
    let places = places(24);
    let seen: Vec<u32> = (0..3000).step_by(2).collect();
    let before: Vec<&[u32]> = vec![&seen; 24];
    let rows: Vec<Vec<f32>> = (0..24).map(|row| Vec::try_from(logits_bv.get(row)).unwrap()).collect();
    let plain = Sampler::new(1.0, 1.0, 3);
    for sampler in [
        Sampler { temperature: 0.0, ..plain },
        plain,
        Sampler { temperature: 0.7, top_p: 0.9, ..plain },
        Sampler { top_k: 5, ..plain },
        Sampler { top_k: 200, top_p: 0.5, ..plain },
        Sampler { min_p: 0.2, ..plain },
        Sampler { min_p: 0.001, top_k: 900, ..plain },
        Sampler { repetition_penalty: 1.7, top_p: 0.8, ..plain },
        Sampler { repetition_penalty: 3.0, temperature: 0.0, ..plain },
    ] {
        let together = sampler.next(&logits_bv, &places, &before).unwrap();
        let row = |(row, place): (&Vec<f32>, &Place)| sampler.next_row(&Logits::new(row), *place, &seen);
        let alone: Vec<u32> = rows.iter().zip(&places).map(row).collect();
        // Where a uniform falls on the edge between two tokens the last bit of a sum may decide.
        let same = together.iter().zip(&alone).filter(|(a, b)| a == b).count();
        assert!(same >= 23, "{sampler:?}: {together:?} {alone:?}");
    }
}

#[test]
fn bounds_leave_only_what_they_say() {
    let logits: Vec<f32> = (0..1000).map(|id| -(id as f32) * 0.01).collect();
    let logits = Logits::new(&logits);
    let draws = |sampler: Sampler, before: &[u32]| -> Vec<u32> {
        (0..400).map(|position| sampler.next_row(&logits, Place { row: 1, position }, before)).collect()
    };
    let plain = Sampler::new(1.0, 1.0, 3);
    let most = |sampler| draws(sampler, &[]).into_iter().max().unwrap();
    assert!(most(plain) > 300);
    assert!((15..20).contains(&most(Sampler { top_k: 20, ..plain })));
    // exp(-0.01 id) >= 0.5 up to id 69.
    assert!((55..70).contains(&most(Sampler { min_p: 0.5, ..plain })));
    // Half of what top-k leaves.
    assert!((6..11).contains(&most(Sampler { top_k: 20, top_p: 0.5, ..plain })));
    // Logits below zero are multiplied: what was told before falls behind.
    let told: Vec<u32> = (1..1000).collect();
    let punished = draws(Sampler { repetition_penalty: 50.0, ..plain }, &told);
    let first = punished.iter().filter(|&&id| id == 0).count();
    assert!(first > 100 && draws(plain, &[]).iter().filter(|&&id| id == 0).count() < 30, "{first}");
}
