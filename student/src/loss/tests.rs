mod objectives;

use retort_core::{
    random::{Counter, Purpose},
    spec::{Loss, Weight},
};
use retort_llama::normal;

use super::*;
use crate::{batch, example::tests::example};

const V: i64 = 37;
const H: i64 = 8;

fn targets(positions: usize) -> Targets {
    let mut targets = Targets { offsets: vec![0], ..Targets::default() };
    for row in 0..positions.div_ceil(5) {
        targets.push(&example(row as u64, 3, 5.min(positions - 5 * row), 6, V as u32));
    }
    targets
}

fn random(shape: [i64; 2], seed: u64) -> Tensor {
    normal(&shape, 1.0, (seed, 0)).unwrap()
}

/// Forward KL and the label's cross-entropy.
fn mix(ce_weight: f64) -> Objective {
    let loss = Loss {
        forward_kl: Weight::constant(1.0 - ce_weight),
        label_ce: Weight::constant(ce_weight),
        ..Loss::default()
    };
    Objective::of(&loss, 0, 1)
}

fn chunked(chunk: usize) -> ChunkedLoss {
    ChunkedLoss::with_chunk(V, Kind::Float, Device::Cpu, chunk).unwrap()
}

/// The obvious twin of [`mix`]: every logit, dense targets, autograd.
fn dense(hidden_nh: &Tensor, weight_vh: &Tensor, targets: &Targets, ce_weight: f64) -> (Tensor, f64, f64) {
    let n = targets.len();
    let logq_nv = hidden_nh.matmul(&weight_vh.tr()).log_softmax(-1, Kind::Float);
    let mut mass = vec![0f32; n * V as usize];
    let mut entropy = 0.0;
    for p in 0..n {
        for e in targets.offsets[p]..targets.offsets[p + 1] {
            mass[p * V as usize + targets.ids[e] as usize] += targets.masses[e];
            entropy += f64::from(targets.masses[e]) * f64::from(targets.logprobs[e]);
        }
    }
    let mass_nv = Tensor::from_slice(&mass).view([n as i64, V]);
    let mut kl = -(&mass_nv * &logq_nv).sum(Kind::Float) + entropy;
    // What is in no support is one more outcome.
    let outside_nv = mass_nv.eq(0.0).to_kind(Kind::Float);
    let bucket_n = (logq_nv.exp() * outside_nv).sum_dim_intlist([-1i64].as_slice(), false, Kind::Float);
    for (p, &residual) in targets.residuals.iter().enumerate().filter(|(_, residual)| **residual > 0.0) {
        kl += (f64::from(residual).ln() - bucket_n.get(p as i64).log()) * f64::from(residual);
    }
    let labels_n1 = Tensor::from_slice(&targets.labels).unsqueeze(1);
    let ce = -logq_nv.gather(1, &labels_n1, false).sum(Kind::Float);
    let loss = &kl * (1.0 - ce_weight) + &ce * ce_weight;
    (loss, kl.double_value(&[]), ce.double_value(&[]))
}

fn max_difference(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).abs().max().double_value(&[])
}

#[test]
fn value_and_gradients_are_those_of_the_dense_loss() {
    for positions in [1, 7, 20] {
        for ce_weight in [0.0, 0.3, 1.0] {
            for chunk in [1, 3, 20, 64] {
                let targets = targets(positions);
                let hidden_nh = random([positions as i64, H], 1).set_requires_grad(true);
                let weight_vh = random([V, H], 2).set_requires_grad(true);
                let (slow, kl, ce) = dense(&hidden_nh, &weight_vh, &targets, ce_weight);
                (&slow * 0.25).backward();

                let mut head_grad_vh = Tensor::ones([V, H], (Kind::Float, Device::Cpu));
                let (sums, grad_nh) = chunked(chunk)
                    .backward(&mix(ce_weight), &hidden_nh, &weight_vh, Some(&mut head_grad_vh), &targets, 0.25)
                    .unwrap();

                assert_eq!(sums.positions, positions);
                assert!((sums.loss - slow.double_value(&[])).abs() < 1e-4, "{} {slow:?}", sums.loss);
                assert!((sums.kl - kl).abs() < 1e-4, "{} {kl}", sums.kl);
                assert!((sums.ce - if ce_weight > 0.0 { ce } else { 0.0 }).abs() < 1e-4, "{} {ce}", sums.ce);
                assert!(max_difference(&grad_nh, &hidden_nh.grad()) < 1e-5);
                // It is added to what was there.
                assert!(max_difference(&(head_grad_vh - 1.0), &weight_vh.grad()) < 1e-5);
            }
        }
    }
}

#[test]
fn a_bucket_is_one_more_outcome() {
    for ce_weight in [0.0, 0.3] {
        let mut targets = targets(7);
        // One position has none.
        for (p, residual) in [(0, 0.4), (1, 0.01), (2, 0.9), (4, 0.2), (5, 0.3), (6, 0.7)] {
            let range = targets.offsets[p]..targets.offsets[p + 1];
            targets.masses[range].iter_mut().for_each(|mass| *mass *= 1.0 - residual);
            targets.residuals[p] = residual;
        }
        let hidden_nh = random([7, H], 1).set_requires_grad(true);
        let weight_vh = random([V, H], 2).set_requires_grad(true);
        let (slow, kl, _) = dense(&hidden_nh, &weight_vh, &targets, ce_weight);
        slow.backward();
        for chunk in [2, 16] {
            let mut head_grad_vh = Tensor::zeros([V, H], (Kind::Float, Device::Cpu));
            let (sums, grad_nh) = chunked(chunk)
                .backward(&mix(ce_weight), &hidden_nh, &weight_vh, Some(&mut head_grad_vh), &targets, 1.0)
                .unwrap();
            assert!((sums.kl - kl).abs() < 1e-4, "{} {kl}", sums.kl);
            assert!(max_difference(&grad_nh, &hidden_nh.grad()) < 1e-5);
            assert!(max_difference(&head_grad_vh, &weight_vh.grad()) < 1e-5);
        }
    }
}

#[test]
fn through_a_body_the_gradients_are_those_of_autograd_tied_and_untied() {
    for tied in [true, false] {
        let targets = targets(9);
        let ids = Tensor::from_slice(&(0..9).map(|i| i * 5 % V).collect::<Vec<i64>>());
        let leaf = |shape, seed| random(shape, seed).set_requires_grad(true);
        let run = |fast: bool| {
            let (embed_vh, body_hh, own_vh) = (leaf([V, H], 3), leaf([H, H], 4), leaf([V, H], 5));
            let hidden_nh = embed_vh.index_select(0, &ids).matmul(&body_hh).tanh();
            let head_vh = if tied { &embed_vh } else { &own_vh };
            if fast {
                let mut head_grad_vh = head_vh.zeros_like().detach();
                let (_, grad_nh) = chunked(4)
                    .backward(&mix(0.2), &hidden_nh, head_vh, Some(&mut head_grad_vh), &targets, 1.0)
                    .unwrap();
                (hidden_nh * grad_nh).sum(Kind::Float).backward();
                let mut head_grad = head_vh.grad();
                let head_grad_vh = if head_grad.defined() { head_grad.g_add_(&head_grad_vh) } else { head_grad_vh };
                let embed_grad_vh = if tied { head_grad_vh.shallow_clone() } else { embed_vh.grad() };
                [embed_grad_vh, body_hh.grad(), head_grad_vh]
            } else {
                dense(&hidden_nh, head_vh, &targets, 0.2).0.backward();
                [embed_vh.grad(), body_hh.grad(), head_vh.grad()]
            }
        };
        for (fast, slow) in run(true).iter().zip(run(false)) {
            assert!(max_difference(fast, &slow) < 1e-5, "tied: {tied}");
        }
    }
}

#[test]
fn positions_without_support_or_without_any_position_add_nothing() {
    let mut targets = targets(3);
    targets.masses[targets.offsets[1]..targets.offsets[2]].fill(0.0);
    let hidden_nh = random([3, H], 1);
    let weight_vh = random([V, H], 2);
    let mut head_grad_vh = weight_vh.zeros_like();
    let mut loss = chunked(16);
    let (sums, grad_nh) =
        loss.backward(&mix(0.0), &hidden_nh, &weight_vh, Some(&mut head_grad_vh), &targets, 1.0).unwrap();
    assert!(sums.kl.is_finite());
    assert_eq!(grad_nh.get(1).abs().max().double_value(&[]), 0.0);
    assert!(grad_nh.get(0).abs().max().double_value(&[]) > 0.0);

    let before = head_grad_vh.copy();
    let none = Targets::default();
    let (sums, grad_nh) =
        loss.backward(&mix(0.0), &random([0, H], 1), &weight_vh, Some(&mut head_grad_vh), &none, 1.0).unwrap();
    assert_eq!((sums, grad_nh.size()), (Sums::default(), vec![0, H]));
    assert_eq!(max_difference(&before, &head_grad_vh), 0.0);
    assert_eq!(loss.measure(&random([0, H], 1), &weight_vh, &none).unwrap(), Measured::default());
}

#[test]
fn measuring_agrees_with_the_dense_loss() {
    let targets = targets(11);
    let (hidden_nh, weight_vh) = (random([11, H], 1), random([V, H], 2));
    let measured = chunked(4).measure(&hidden_nh, &weight_vh, &targets).unwrap();
    let (_, kl, ce) = dense(&hidden_nh, &weight_vh, &targets, 0.0);
    assert!((measured.kl.iter().sum::<f64>() - kl).abs() < 1e-4);
    assert!((measured.label_logprobs.iter().map(|&x| f64::from(x)).sum::<f64>() + ce).abs() < 1e-4);
    let top: Vec<i64> = hidden_nh.matmul(&weight_vh.tr()).argmax(-1, false).try_into().unwrap();
    assert_eq!(measured.top_ids, top);
    let dense_top = hidden_nh.matmul(&weight_vh.tr()).log_softmax(-1, Kind::Float).amax(-1, false);
    let dense_top: Vec<f32> = dense_top.try_into().unwrap();
    assert!(measured.top_logprobs.iter().zip(&dense_top).all(|(a, b)| (a - b).abs() < 1e-5), "{dense_top:?}");
}

#[test]
fn the_cut_into_micro_batches_and_chunks_changes_nothing() {
    let examples: Vec<_> =
        (0..7).map(|i| example(i, 2 + i as usize % 3, 3 + 5 * i as usize % 11, 6, V as u32)).collect();
    let weight_vh = random([V, H], 2);
    // The hidden state of a position is a function of its own token alone, so a cut may not matter.
    let run = |max_tokens: usize, chunk: usize| {
        let mut head_grad_vh = weight_vh.zeros_like();
        let mut loss = chunked(chunk);
        let mut sums = Sums::default();
        for micro in batch::cut(&examples, batch::Limits { max_tokens }) {
            let hidden_nh = weight_vh
                .index_select(0, &Tensor::from_slice(&micro.ids_n))
                .index_select(0, &Tensor::from_slice(&micro.positions_m));
            let grad = Some(&mut head_grad_vh);
            sums.add(loss.backward(&mix(0.1), &hidden_nh, &weight_vh, grad, &micro.targets, 0.01).unwrap().0);
        }
        (sums, head_grad_vh)
    };
    let (whole, whole_grad) = run(10_000, 1000);
    for (max_tokens, chunk) in [(1, 1), (20, 7), (40, 64)] {
        let (sums, grad) = run(max_tokens, chunk);
        assert_eq!(sums.positions, whole.positions);
        assert!((sums.kl - whole.kl).abs() < 1e-6 * whole.kl.abs());
        assert!(max_difference(&grad, &whole_grad) < 1e-6);
    }
}

/// A head and a sampled, importance-weighted tail estimate the full KL without bias, where a bare head
/// does not ("Sparse Logit Sampling", Anshumann et al., ACL 2025).
#[test]
fn a_sampled_tail_is_unbiased() {
    let (head, draws, trials) = (4, 3, 4000u64);
    let (hidden_nh, weight_vh) = (random([1, H], 1), random([V, H], 2));
    let logp: Vec<f32> = random([1, V], 7).log_softmax(-1, Kind::Float).view([-1]).try_into().unwrap();
    let mut order: Vec<usize> = (0..V as usize).collect();
    order.sort_by(|&a, &b| logp[b].total_cmp(&logp[a]));
    let mass_of = |id: usize| f64::from(logp[id]).exp();
    let tail_mass = 1.0 - order[..head].iter().map(|&id| mass_of(id)).sum::<f64>();

    let mut loss = chunked(16);
    let mut estimate = |support: &[(usize, f64)]| {
        let targets = Targets {
            offsets: vec![0, support.len()],
            ids: support.iter().map(|(id, _)| *id as i64).collect(),
            masses: support.iter().map(|(_, mass)| *mass as f32).collect(),
            residuals: vec![0.0],
            heads: vec![true; support.len()],
            logprobs: support.iter().map(|(id, _)| logp[*id]).collect(),
            labels: vec![0],
            top_ids: vec![0],
            label_logprobs: vec![0.0],
            weights: vec![1.0],
        };
        loss.measure(&hidden_nh, &weight_vh, &targets).unwrap().kl[0]
    };
    let exact: Vec<(usize, f64)> = order.iter().map(|&id| (id, mass_of(id))).collect();
    let truth = estimate(&exact);
    let mut sum = 0.0;
    let mut squares = 0.0;
    for trial in 0..trials {
        let mut random = Counter::new(1, Purpose::Tail, trial, 0);
        let mut support = exact[..head].to_vec();
        for _ in 0..draws {
            let mut left = random.next_f64() * tail_mass;
            let drawn = exact[head..].iter().find(|(_, mass)| {
                left -= mass;
                left < 0.0
            });
            support.push((drawn.unwrap_or(&exact[exact.len() - 1]).0, tail_mass / f64::from(draws)));
        }
        let one = estimate(&support);
        sum += one;
        squares += one * one;
    }
    let mean = sum / trials as f64;
    let error = ((squares / trials as f64 - mean * mean) / trials as f64).sqrt();
    assert!((mean - truth).abs() < 4.0 * error, "{mean} +- {error} against {truth}");
    let bare = estimate(&exact[..head]);
    assert!((bare - truth).abs() > 20.0 * error, "the bare head is biased: {bare} against {truth}");
}
