//! Every term of the loss against its paper, on whole distributions and by autograd.

use tch::IndexOp as _;

use super::*;

/// Every term alone, and all together.
fn objectives(temperature: f64) -> Vec<(&'static str, Loss)> {
    let none = Loss { forward_kl: Weight::default(), temperature, ..Loss::default() };
    let one = Weight::constant(1.0);
    let part = Weight::constant(0.3);
    vec![
        ("forward_kl", Loss { forward_kl: one, ..none.clone() }),
        ("reverse_kl", Loss { reverse_kl: one, ..none.clone() }),
        ("jensen_shannon", Loss { jensen_shannon: one, jensen_shannon_beta: 0.7, ..none.clone() }),
        ("skew_forward_kl", Loss { skew_forward_kl: one, skew_alpha: 0.2, ..none.clone() }),
        ("skew_reverse_kl", Loss { skew_reverse_kl: one, skew_alpha: 0.2, ..none.clone() }),
        ("total_variation", Loss { total_variation: one, ..none.clone() }),
        ("logit_mse", Loss { logit_mse: one, ..none.clone() }),
        ("label_ce", Loss { label_ce: one, ..none }),
        (
            "all",
            Loss {
                forward_kl: one,
                reverse_kl: part,
                jensen_shannon: part,
                skew_forward_kl: part,
                skew_reverse_kl: part,
                total_variation: part,
                logit_mse: part,
                label_ce: part,
                temperature,
                ..Loss::default()
            },
        ),
    ]
}

/// `sum f(t, q)` of every term as its paper writes it, on whole distributions `[n, outcomes]`.
fn textbook(loss: &Loss, t: &Tensor, q: &Tensor) -> Tensor {
    let kl = |a: &Tensor, b: &Tensor| (a * (a.log() - b.log())).sum(Kind::Float);
    let (a, b) = (loss.skew_alpha, loss.jensen_shannon_beta);
    let m = t * b + q * (1.0 - b);
    let squared = loss.temperature * loss.temperature;
    let distances = kl(t, q) * loss.forward_kl.to
        + kl(q, t) * loss.reverse_kl.to
        + (kl(t, &m) * b + kl(q, &m) * (1.0 - b)) * loss.jensen_shannon.to
        + kl(t, &(t * a + q * (1.0 - a))) * loss.skew_forward_kl.to
        + kl(q, &(q * a + t * (1.0 - a))) * loss.skew_reverse_kl.to
        + (q - t).abs().sum(Kind::Float) * 0.5 * loss.total_variation.to;
    distances * squared
}

fn centred(x: &Tensor) -> Tensor {
    x - x.mean_dim([-1i64].as_slice(), true, Kind::Float)
}

/// Soft targets of the teacher's logits, at a temperature: the tokens `ids` of each position are exact, and the
/// rest is a bucket of the codec's where it keeps one.
fn targets_of(teacher_nv: &Tensor, temperature: f64, ids: &[i64], bucket: bool) -> Targets {
    let logp_nv = (teacher_nv / temperature).log_softmax(-1, Kind::Float);
    let n = teacher_nv.size()[0];
    let mut targets = Targets { offsets: vec![0], ..Targets::default() };
    for p in 0..n {
        let row: Vec<f32> = logp_nv.get(p).try_into().unwrap();
        let logprobs: Vec<f32> = ids.iter().map(|&id| row[id as usize]).collect();
        let masses: Vec<f32> = logprobs.iter().map(|logprob| logprob.exp()).collect();
        targets.residuals.push(if bucket { 1.0 - masses.iter().sum::<f32>() } else { 0.0 });
        targets.ids.extend(ids);
        targets.heads.extend(ids.iter().map(|_| true));
        targets.masses.extend(masses);
        targets.logprobs.extend(logprobs);
        targets.offsets.push(targets.ids.len());
        targets.labels.push(p * 11 % V);
        targets.top_ids.push(0);
        targets.label_logprobs.push(-1.0);
        targets.weights.push(1.0);
    }
    targets
}

/// A weight of three is three positions alike.
#[test]
fn a_weight_is_so_many_positions() {
    let (hidden_nh, weight_vh) = (random([9, H], 3), random([V, H], 4));
    let row = |weight: f64| example(5, 2, 3, 6, V as u32).weighing(&[weight; 3]);
    let (mut heavy, mut often) = (Targets::default(), Targets::default());
    heavy.push(&row(3.0));
    (0..3).for_each(|_| often.push(&row(1.0)));
    let three_times =
        Tensor::cat(&[hidden_nh.narrow(0, 0, 3), hidden_nh.narrow(0, 0, 3), hidden_nh.narrow(0, 0, 3)], 0);
    for temperature in [1.0, 2.5] {
        for (name, loss) in objectives(temperature) {
            let objective = Objective::of(&loss, 0, 1);
            for fused in [true, false] {
                let run = |hidden_nh: &Tensor, targets: &Targets| {
                    let mut grad_vh = Tensor::zeros([V, H], (Kind::Float, Device::Cpu));
                    let mut chunked = chunked(2);
                    chunked.fused = fused;
                    let (sums, grad_nh) =
                        chunked.backward(&objective, hidden_nh, &weight_vh, Some(&mut grad_vh), targets, 0.1).unwrap();
                    (sums, grad_nh, grad_vh)
                };
                let (one, one_nh, one_vh) = run(&hidden_nh.narrow(0, 0, 3), &heavy);
                let (three, three_nh, three_vh) = run(&three_times, &often);
                let near = |a: f64, b: f64| (a - b).abs() <= 1e-5 * (1.0 + b.abs());
                let what = format!("{name} at {temperature}, fused {fused}");
                assert!(near(one.loss, three.loss) && near(one.ce, three.ce) && near(one.kl, three.kl), "{what}");
                let furthest = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]);
                assert!(furthest(&one_vh, &three_vh) < 1e-5, "{what}");
                assert!(furthest(&one_nh, &(three_nh.narrow(0, 0, 3) * 3.0)) < 1e-5, "{what}");
                assert!(one_nh.abs().max().double_value(&[]) > 1e-4, "{what}");
            }
        }
    }
}

#[test]
fn every_loss_is_the_textbooks_and_so_is_its_gradient() {
    let n = 7;
    for temperature in [1.0, 2.5] {
        for (name, loss) in objectives(temperature) {
            // The whole vocabulary, and seven tokens with a bucket for the others.
            for ids in [(0..V).collect::<Vec<i64>>(), vec![1, 4, 9, 16, 25, 30, 36]] {
                let whole = ids.len() as i64 == V;
                let teacher_nv = random([n, V], 11) * 2.0;
                let hidden_nh = random([n, H], 1).set_requires_grad(true);
                let weight_vh = random([V, H], 2).set_requires_grad(true);
                let targets = targets_of(&teacher_nv, temperature, &ids, !whole);

                let logits_nv = hidden_nh.matmul(&weight_vh.tr());
                let index = Tensor::from_slice(&ids);
                let outcomes = |logits_nv: &Tensor| {
                    let p_nv = (logits_nv / temperature).softmax(-1, Kind::Float);
                    let kept = p_nv.index_select(1, &index);
                    if whole {
                        return kept;
                    }
                    let rest: Tensor = 1.0 - kept.sum_dim_intlist([-1i64].as_slice(), true, Kind::Float);
                    Tensor::cat(&[kept, rest], 1)
                };
                let (t, q) = (outcomes(&teacher_nv), outcomes(&logits_nv));
                let apart = centred(&logits_nv.index_select(1, &index)) - centred(&teacher_nv.index_select(1, &index));
                let mse = (&apart * &apart).mean_dim([-1i64].as_slice(), false, Kind::Float).sum(Kind::Float);
                let labels_n1 = Tensor::from_slice(&targets.labels).unsqueeze(1);
                let ce = -logits_nv.log_softmax(-1, Kind::Float).gather(1, &labels_n1, false).sum(Kind::Float);
                let slow = textbook(&loss, &t, &q) + mse * loss.logit_mse.to + ce * loss.label_ce.to;
                (&slow * 0.5).backward();

                for (chunk, fused) in [(3, true), (16, true), (3, false), (16, false)] {
                    let objective = Objective::of(&loss, 0, 1);
                    let mut head_grad_vh = Tensor::zeros([V, H], (Kind::Float, Device::Cpu));
                    let (sums, grad_nh) = ChunkedLoss { fused, ..chunked(chunk) }
                        .backward(&objective, &hidden_nh, &weight_vh, Some(&mut head_grad_vh), &targets, 0.5)
                        .unwrap();
                    let expected = slow.double_value(&[]);
                    let what = format!("{name} at {temperature}, {} entries", ids.len());
                    assert!(
                        (sums.loss - expected).abs() < 1e-4 * expected.abs().max(1.0),
                        "{what}: {} {expected}",
                        sums.loss
                    );
                    assert!(max_difference(&grad_nh, &hidden_nh.grad()) < 1e-4, "{what}");
                    assert!(max_difference(&head_grad_vh, &weight_vh.grad()) < 1e-4, "{what}");
                }
            }
        }
    }
}

/// In bf16 the same passes run on widened logits: within its rounding of f32.
#[test]
fn in_bf16_every_loss_is_that_of_f32_to_rounding() {
    let (hidden_nh, weight_vh) = (random([7, H], 1).to_kind(Kind::BFloat16), random([V, H], 2).to_kind(Kind::BFloat16));
    let targets = targets_of(&random([7, V], 11), 1.0, &[1, 4, 9, 16, 25, 30, 36], true);
    for (name, loss) in objectives(1.0) {
        let objective = Objective::of(&loss, 0, 1);
        let run = |kind: Kind, fused: bool| {
            let mut head_grad_vh = Tensor::zeros([V, H], (Kind::Float, Device::Cpu));
            let (hidden_nh, weight_vh) = (hidden_nh.to_kind(kind), weight_vh.to_kind(kind));
            let mut chunked = ChunkedLoss { fused, ..ChunkedLoss::with_chunk(V, kind, Device::Cpu, 4).unwrap() };
            let (sums, grad_nh) =
                chunked.backward(&objective, &hidden_nh, &weight_vh, Some(&mut head_grad_vh), &targets, 1.0).unwrap();
            (sums.loss, grad_nh.to_kind(Kind::Float), head_grad_vh)
        };
        let wide = run(Kind::Float, true);
        for fused in [true, false] {
            let narrow = run(Kind::BFloat16, fused);
            assert!((narrow.0 - wide.0).abs() < 0.03 * wide.0.abs().max(1.0), "{name}: {} {}", narrow.0, wide.0);
            for (narrow, wide) in [(&narrow.1, &wide.1), (&narrow.2, &wide.2)] {
                let largest = wide.abs().max().double_value(&[]);
                assert!(max_difference(narrow, wide) < 0.05 * largest, "{name}, fused {fused}: of {largest}");
            }
        }
    }
}

/// Samples stand for others in forward KL alone; everywhere else they are part of the bucket.
#[test]
fn a_sampled_entry_is_no_exact_one() {
    let teacher_nv = random([3, V], 11);
    let (hidden_nh, weight_vh) = (random([3, H], 1), random([V, H], 2));
    let bare = targets_of(&teacher_nv, 1.0, &[1, 4, 9], false);
    let mut sampled = targets_of(&teacher_nv, 1.0, &[1, 4, 9, 16, 25], false);
    for e in (0..15).filter(|e| e % 5 > 2) {
        sampled.heads[e] = false;
        sampled.masses[e] = 0.2;
    }
    for (name, loss) in objectives(1.0).into_iter().filter(|(name, _)| *name != "all") {
        let run = |targets: &Targets| {
            let objective = Objective::of(&loss, 0, 1);
            let (sums, grad_nh) = chunked(16).backward(&objective, &hidden_nh, &weight_vh, None, targets, 1.0).unwrap();
            (sums.loss, grad_nh)
        };
        let ((with, with_grad), (without, without_grad)) = (run(&sampled), run(&bare));
        let same = (with - without).abs() < 1e-6 && max_difference(&with_grad, &without_grad) < 1e-6;
        assert_eq!(same, name != "forward_kl", "{name}: {with} {without}");
    }
}

/// Neither a sure student nor a sure teacher makes a loss or a gradient that is not finite.
#[test]
fn extremes_stay_finite() {
    let sure_nv = Tensor::zeros([2, V], (Kind::Float, Device::Cpu));
    let _ = sure_nv.i((.., 4)).fill_(300.0);
    let other_nv = Tensor::zeros([2, V], (Kind::Float, Device::Cpu));
    let _ = other_nv.i((.., 9)).fill_(300.0);
    // A head that passes its input on.
    let weight_vh = Tensor::eye(V, (Kind::Float, Device::Cpu));
    for (name, loss) in objectives(1.0) {
        for (teacher_nv, student_nv) in [(&sure_nv, &other_nv), (&other_nv, &sure_nv), (&sure_nv, &sure_nv)] {
            for ids in [(0..V).collect::<Vec<i64>>(), vec![4, 9]] {
                let targets = targets_of(teacher_nv, 1.0, &ids, (ids.len() as i64) < V);
                let (sums, grad_nh) = ChunkedLoss::with_chunk(V, Kind::Float, Device::Cpu, 16)
                    .unwrap()
                    .backward(&Objective::of(&loss, 0, 1), student_nv, &weight_vh, None, &targets, 1.0)
                    .unwrap();
                assert!(sums.loss.is_finite(), "{name} {}", sums.loss);
                assert!(grad_nh.isfinite().all().int64_value(&[]) == 1, "{name}");
            }
        }
    }
}
