use super::*;

pub(super) fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 4.0
    };
    (0..count).map(|_| next()).collect()
}

/// Scores, softmax and mixture in f64, a query at a time.
fn obvious(asked: &Asked, kept: &Kept, position: usize, head: usize) -> Vec<f64> {
    let d = asked.head_dim;
    let from = position * asked.stride + asked.offset + head * d;
    let query = &asked.queries[from..from + d];
    let at = asked.first + position;
    let earliest = asked.window.map_or(0, |window| (at + 1).saturating_sub(window));
    let row = |of: &'_ [f32], s: usize| of[s * kept.stride + kept.offset..][..d].to_vec();
    let score = |s: usize| {
        row(kept.keys, s).iter().zip(query).map(|(k, q)| f64::from(*k) * f64::from(*q)).sum::<f64>() / (d as f64).sqrt()
    };
    let scores: Vec<f64> = (earliest..=at).map(score).collect();
    let max = scores.iter().copied().fold(f64::MIN, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    (0..d)
        .map(|i| {
            let values = (earliest..=at).map(|s| f64::from(row(kept.values, s)[i]));
            values.zip(&weights).map(|(v, w)| v * w).sum::<f64>() / sum
        })
        .collect()
}

fn run(asked: &Asked, kept: &Kept) -> Vec<Vec<f32>> {
    let mut out = vec![Vec::new(); asked.positions * asked.heads];
    Scratch::default().attend(asked, kept, |position, head, mixed| out[position * asked.heads + head] = mixed.to_vec());
    out
}

#[test]
fn blocks_and_running_sums_are_attention() {
    for (d, heads, first, positions, window) in [
        (64, 3, 0, 32, None),
        (64, 1, 250, 7, None),
        (128, 8, 300, 1, None),
        (20, 2, 130, 5, None),
        (8, 4, 400, 32, Some(100)),
        (64, 2, 10, 9, Some(4)),
    ] {
        let (stride, offset) = (2 * d + 3, 3);
        let last = first + positions;
        let (keys, values) = (numbers(last * stride + d, 1), numbers(last * stride + d, 2));
        let queries = numbers(positions * (heads * d + 5) + d, 3);
        let kept = Kept { keys: &keys, values: &values, stride, offset };
        let asked =
            Asked { queries: &queries, stride: heads * d + 5, offset: 2, positions, first, heads, head_dim: d, window };
        for (row, mixed) in run(&asked, &kept).iter().enumerate() {
            for (a, b) in mixed.iter().zip(obvious(&asked, &kept, row / heads, row % heads)) {
                assert!((f64::from(*a) - b).abs() < 2e-5, "d {d}, first {first}, row {row}: {a} {b}");
            }
        }
    }
}

#[test]
fn a_position_is_the_same_bits_in_any_company() {
    let (d, heads, last) = (64, 3, 300);
    let (keys, values) = (numbers(last * d, 4), numbers(last * d, 5));
    let queries = numbers(last * heads * d, 6);
    let kept = Kept { keys: &keys, values: &values, stride: d, offset: 0 };
    let rows = |first: usize, positions: usize, window| {
        let queries = &queries[first * heads * d..];
        run(&Asked { queries, stride: heads * d, offset: 0, positions, first, heads, head_dim: d, window }, &kept)
    };
    for window in [None, Some(140)] {
        let together = rows(270, 30, window);
        for position in 0..30 {
            let alone = rows(270 + position, 1, window);
            assert_eq!(alone, together[position * heads..(position + 1) * heads], "position {position}");
        }
    }
}
