use super::*;
use crate::attention::tests::numbers;

/// The definition and its derivative in f64, one query at a time: mixed, and gradients in queries, keys and values.
fn obvious(documents: &Documents, projected: &Projected<&[f32]>, grad_mixed: &[f32]) -> [Vec<f64>; 4] {
    let (d, group) = (documents.head_dim, documents.query_heads / documents.key_heads);
    let (queries, keys, values) = (projected.queries, projected.keys, projected.values);
    let zeros = |of: &[f32]| vec![0.0; of.len()];
    let [mut mixed, mut grad_queries, mut grad_keys, mut grad_values] =
        [zeros(queries), zeros(queries), zeros(keys), zeros(values)];
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let mut first = 0;
    for &length in documents.lengths {
        for (at, head) in (0..length).flat_map(|at| (0..documents.query_heads).map(move |head| (at, head))) {
            let query = ((first + at) * documents.query_heads + head) * d;
            let key = |s: usize| ((first + s) * documents.key_heads + head / group) * d;
            let seen = documents.window.map_or(0, |window| (at + 1).saturating_sub(window))..at + 1;
            let scale = 1.0 / (d as f64).sqrt();
            let scores: Vec<f64> =
                seen.clone().map(|s| dot(&queries[query..query + d], &keys[key(s)..key(s) + d]) * scale).collect();
            let most = scores.iter().copied().fold(f64::MIN, f64::max);
            let sum: f64 = scores.iter().map(|score| (score - most).exp()).sum();
            let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp() / sum).collect();
            let grads: Vec<f64> =
                seen.clone().map(|s| dot(&grad_mixed[query..query + d], &values[key(s)..key(s) + d])).collect();
            let mean: f64 = grads.iter().zip(&weights).map(|(grad, weight)| grad * weight).sum();
            for ((s, weight), grad) in seen.zip(weights).zip(grads) {
                let grad_score = weight * (grad - mean) * scale;
                for i in 0..d {
                    mixed[query + i] += weight * f64::from(values[key(s) + i]);
                    grad_queries[query + i] += grad_score * f64::from(keys[key(s) + i]);
                    grad_keys[key(s) + i] += grad_score * f64::from(queries[query + i]);
                    grad_values[key(s) + i] += weight * f64::from(grad_mixed[query + i]);
                }
            }
        }
        first += length;
    }
    [mixed, grad_queries, grad_keys, grad_values]
}

fn run<T: Stored + Default>(documents: &Documents, stored: [&[T]; 4], threads: usize) -> [Vec<f32>; 4] {
    let [queries, keys, values, grad_mixed] = stored;
    // What was there before must not count.
    let room = |of: &[T]| of.to_vec();
    let [mut mixed, mut grad_queries, mut grad_keys, mut grad_values] =
        [room(queries), room(queries), room(keys), room(values)];
    documents.attend(&Projected { queries, keys, values }, &mut mixed, threads);
    let into = Projected { queries: &mut grad_queries[..], keys: &mut grad_keys[..], values: &mut grad_values[..] };
    documents.gradients(&Projected { queries, keys, values }, grad_mixed, into, threads);
    [mixed, grad_queries, grad_keys, grad_values].map(|stored| {
        let mut wide = vec![0.0; stored.len()];
        T::widen(&stored, &mut wide);
        wide
    })
}

fn documents(lengths: &[usize], query_heads: usize, key_heads: usize, head_dim: usize) -> Documents<'_> {
    Documents { lengths, query_heads, key_heads, head_dim, window: None }
}

fn inputs(documents: &Documents) -> [Vec<f32>; 4] {
    let positions: usize = documents.lengths.iter().sum();
    let [queries, keys] =
        [documents.query_heads, documents.key_heads].map(|heads| positions * heads * documents.head_dim);
    [numbers(queries, 1), numbers(keys, 2), numbers(keys, 3), numbers(queries, 4)]
}

fn close(found: &[Vec<f32>; 4], exact: &[Vec<f64>; 4], within: f64, what: &Documents) {
    for (name, (found, exact)) in ["mixed", "queries", "keys", "values"].iter().zip(found.iter().zip(exact)) {
        let most = exact.iter().fold(1.0f64, |most, x| most.max(x.abs()));
        for (at, (found, exact)) in found.iter().zip(exact).enumerate() {
            assert!((f64::from(*found) - exact).abs() < within * most, "{name} {at}: {found} {exact} {what:?}");
        }
    }
}

/// Blocks, documents, shared key heads and windows of all sizes, on one thread and on several.
#[test]
fn values_and_gradients_are_those_of_the_definition() {
    let windowed = |window, documents| Documents { window: Some(window), ..documents };
    for case in [
        documents(&[1], 1, 1, 1),
        documents(&[7, 1, 12], 6, 2, 8),
        documents(&[130], 9, 3, 20),
        documents(&[300, 41], 5, 1, 64),
        documents(&[33, 33, 2], 2, 2, 5),
        windowed(1, documents(&[9, 4], 2, 1, 8)),
        windowed(5, documents(&[200, 3], 4, 2, 16)),
        windowed(64, documents(&[150], 8, 1, 8)),
        windowed(1000, documents(&[20, 70], 3, 1, 8)),
        windowed(300, documents(&[700, 20], 2, 1, 8)),
    ] {
        let [queries, keys, values, grad_mixed] = &inputs(&case);
        let exact = obvious(&case, &Projected { queries, keys, values }, grad_mixed);
        for threads in [1, 2, 64] {
            close(&run(&case, [queries, keys, values, grad_mixed], threads), &exact, 2e-6, &case);
        }
    }
}

/// Whatever the window and the group, a block's scores take little memory.
#[test]
fn blocks_stay_small() {
    for (window, group, length) in [(1, 1, 32_768), (16, 4, 5000), (64, 3, 4096), (300, 2, 700), (4096, 4, 9000)] {
        let case = Documents { window: Some(window), ..documents(&[], group, 1, 8) };
        let blocks: Vec<Block> = One { first: 0, length, key_head: 0 }.blocks(&case).collect();
        assert!(blocks.iter().any(|block| block.start > 0), "{case:?}");
        assert_eq!(blocks.iter().map(|block| block.positions).sum::<usize>(), length);
        for block in blocks {
            let few = (ROWS + 8 * group) * (2 * window + ROWS);
            assert!(block.rows * block.span <= few.max(2 * SCORES), "{} x {}, {case:?}", block.rows, block.span);
        }
    }
}

#[test]
fn several_blocks_of_a_long_document_are_one() {
    let case = documents(&[1100], 16, 1, 4);
    assert!(One { first: 0, length: 1100, key_head: 0 }.blocks(&case).count() > 100);
    let [queries, keys, values, grad_mixed] = &inputs(&case);
    let exact = obvious(&case, &Projected { queries, keys, values }, grad_mixed);
    close(&run(&case, [queries, keys, values, grad_mixed], 2), &exact, 1e-5, &case);
}

#[test]
fn numbers_in_bf16_are_computed_with_in_f32() {
    let case = documents(&[40, 25], 6, 2, 16);
    let narrow = inputs(&case).map(|wide| {
        let mut narrow = vec![bf16::ZERO; wide.len()];
        narrow_bf16(&wide, &mut narrow);
        narrow
    });
    let rounded = narrow.each_ref().map(|narrow| narrow.iter().map(|x| x.to_f32()).collect::<Vec<f32>>());
    let [queries, keys, values, grad_mixed] = &rounded;
    let exact = obvious(&case, &Projected { queries, keys, values }, grad_mixed);
    // One rounding to eight bits at the end.
    close(&run(&case, narrow.each_ref().map(Vec::as_slice), 2), &exact, 4e-3, &case);
}

#[test]
fn a_number_that_is_not_finite_is_not_hidden() {
    let case = documents(&[6, 6], 1, 1, 4);
    let [queries, mut keys, values, grad_mixed] = inputs(&case);
    keys[4 * 4] = f32::NAN;
    let [mixed, ..] = run(&case, [&queries, &keys, &values, &grad_mixed], 1);
    let finite: Vec<bool> = mixed.chunks(4).map(|row| row.iter().all(|x| x.is_finite())).collect();
    assert_eq!(finite, [[true; 4].as_slice(), &[false; 2], &[true; 6]].concat(), "from the fifth key on");
}

#[test]
#[should_panic(expected = "numbers for 3 times 8")]
fn slices_of_another_length_are_refused() {
    let case = documents(&[3], 2, 1, 4);
    let [queries, keys, values, _] = inputs(&case);
    case.attend(&Projected { queries: &queries, keys: &keys, values: &values }, &mut [0.0; 20], 1);
}
