use retort_core::random::{Counter, Purpose};
use tch::{Device, Kind, Tensor};

use super::*;
use crate::init::tests::tiny_config;

/// 16 hidden channels, 24 inside, 4 query heads on 2 key-value heads of 4.
fn teacher(layers: i64) -> Model {
    Model::init(tiny_config(layers, 30), Device::Cpu, Kind::Float, 11).unwrap()
}

fn texts() -> Vec<Vec<u32>> {
    let text = |row: u64| {
        let mut random = Counter::new(5, Purpose::Sample, row, 0);
        (0..3 + row % 7).map(|_| random.below(30) as u32).collect()
    };
    (0..6).map(text).collect()
}

fn pruned(teacher: &Model, to: &Prune) -> (Model, Pruning) {
    prune(teacher, to, &texts(), &|| Ok(())).unwrap()
}

fn logits(model: &Model) -> Tensor {
    let ids = Tensor::arange(20, (Kind::Int64, Device::Cpu)).view([2, 10]);
    tch::no_grad(|| model.head(&model.hidden(&ids).unwrap()).unwrap())
}

/// Multiplies the rows (axis 0) or columns (axis 1) of a weight by zero.
fn silence(model: &Model, name: &str, axis: i64, indices: &[i64]) {
    let (_, mut tensor) = model.parameters().into_iter().find(|(known, _)| known == name).unwrap();
    let _ = tch::no_grad(|| tensor.index_fill_(axis, &Tensor::from_slice(indices), 0.0));
}

#[test]
fn kept_layers_are_those_of_both_ends() {
    assert_eq!(kept_layers(30, 10), [0, 1, 2, 3, 4, 5, 6, 27, 28, 29]);
    assert_eq!(kept_layers(5, 5), [0, 1, 2, 3, 4]);
    assert_eq!(kept_layers(5, 2), [0, 4]);
    assert_eq!(kept_layers(5, 1), [0]);
    assert_eq!(evenly_spaced(30, 10), [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]);
    assert_eq!((evenly_spaced(5, 1), evenly_spaced(1, 1)), (vec![0], vec![0]));
    assert_eq!((evenly_spaced(40, 3), evenly_spaced(0, 0)), (vec![0, 20, 39], vec![]));
    for layers in 1..40 {
        for keep in 2..=layers {
            for kept in [kept_layers(layers, keep), evenly_spaced(layers, keep)] {
                assert_eq!((kept.len(), kept[0], kept[keep - 1]), (keep, 0, layers - 1));
                assert!(kept.windows(2).all(|pair| pair[0] < pair[1]), "{kept:?}");
            }
        }
    }
}

#[test]
fn the_most_important_stay_in_their_order() {
    assert_eq!(top(&[0.5, 2.0, 0.25, 2.0, 3.0], 3), [1, 3, 4]);
    assert_eq!(top(&[1.0, 1.0, 1.0], 2), [0, 1]);
    let teacher = Config { num_attention_heads: 6, num_key_value_heads: 3, ..tiny_config(1, 30) };
    let shape =
        |heads, key_value| Config { num_attention_heads: heads, num_key_value_heads: key_value, ..teacher.clone() };
    let heads = [1.0, 1.0, 0.0, 1.5, 0.6, 0.7];
    assert_eq!(top_heads(&heads, &teacher, &shape(4, 2)), (vec![0, 1], vec![0, 1, 2, 3]));
    // With one query head each, a key-value head counts by its best.
    assert_eq!(top_heads(&heads, &teacher, &shape(2, 2)), (vec![0, 1], vec![0, 3]));
    assert_eq!(top_heads(&heads, &teacher, &shape(1, 1)), (vec![1], vec![3]));
    assert_eq!(top_heads(&heads, &teacher, &shape(3, 3)), (vec![0, 1, 2], vec![0, 3, 5]));
    assert_eq!((share(&heads, &[0, 3]), share(&[0.0], &[0])), (0.520_833, 1.0));
}

/// The strong test: what does nothing is found, and without it every logit stays.
#[test]
fn heads_and_channels_that_do_nothing_are_found_and_not_missed() {
    let teacher = teacher(3);
    let (hidden, inner): (Vec<i64>, Vec<i64>) = (vec![1, 6, 7, 15], vec![0, 5, 11, 12, 20, 23]);
    silence(&teacher, "model.embed_tokens.weight", 1, &hidden);
    for layer in 0..3 {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        silence(&teacher, &name("self_attn.o_proj"), 0, &hidden);
        silence(&teacher, &name("mlp.down_proj"), 0, &hidden);
        let inner: Vec<i64> = inner.iter().map(|at| (at + layer) % 24).collect();
        silence(&teacher, &name("mlp.up_proj"), 0, &inner);
        let key_value = layer % 2;
        silence(&teacher, &name("self_attn.v_proj"), 0, &[0, 1, 2, 3].map(|at| 4 * key_value + at));
    }
    let to =
        Prune { hidden_size: Some(12), intermediate_size: Some(18), num_key_value_heads: Some(1), ..Prune::default() };
    let (student, report) = pruned(&teacher, &to);
    assert_eq!(student.config(), &teacher.config().pruned(&to).unwrap());
    let (before, after) = (logits(&teacher), logits(&student));
    let apart = (&before - &after).abs().max().double_value(&[]);
    let size = before.abs().max().double_value(&[]);
    assert!(apart < 1e-5 * size, "{apart} of {size}");

    for axis in [report.depth, report.hidden, report.intermediate, report.attention_heads, report.key_value_heads] {
        assert_eq!(axis.share, Some(1.0), "{axis:?}");
    }
    assert_eq!((report.hidden.kept, report.hidden.of), (12, 16));
    assert_eq!((report.attention_heads.kept, report.key_value_heads.of), (2, 2));
    assert_eq!((report.calibration_rows, report.calibration_tokens), (6, 33));
    // One channel less is missed.
    let (student, report) = pruned(&teacher, &Prune { hidden_size: Some(11), ..to });
    assert!((before - logits(&student)).abs().max().double_value(&[]) > 1e-3 * size);
    assert!(report.hidden.share.is_some_and(|share| share < 1.0));
}

#[test]
fn layers_that_turn_nothing_go_first_and_are_not_missed() {
    let teacher = teacher(5);
    for layer in [1, 3] {
        for part in ["self_attn.o_proj", "mlp.down_proj"] {
            silence(&teacher, &format!("model.layers.{layer}.{part}.weight"), 0, &(0..16).collect::<Vec<_>>());
        }
    }
    let by_influence = |keep| Prune { choose: Choose::BlockInfluence, ..Prune::to_layers(keep) };
    let (student, report) = pruned(&teacher, &by_influence(3));
    assert_eq!(report.layers.iter().map(|layer| layer.layer).collect::<Vec<_>>(), [0, 2, 4]);
    assert!(logits(&teacher).equal(&logits(&student)), "the same bits");
    assert!(report.depth.share.is_some_and(|share| share > 1.0 - 1e-5), "{:?}", report.depth);

    let (_, report) = pruned(&teacher, &by_influence(2));
    let influence: Vec<f64> = report.layers.iter().filter_map(|layer| layer.influence).collect();
    assert!(influence.iter().all(|&influence| influence > 1e-4), "{influence:?}");
}

#[test]
fn a_rule_or_a_list_reads_no_texts() {
    let teacher = teacher(5);
    let kept = |to: &Prune| {
        let (student, report) = prune(&teacher, to, &[], &|| panic!("no text is read")).unwrap();
        assert_eq!(student.config().num_hidden_layers, i64::from(report.depth.kept));
        assert_eq!((report.depth.share, report.layers[0].influence, report.calibration_rows), (None, None, 0));
        report.layers.iter().map(|layer| layer.layer).collect::<Vec<_>>()
    };
    assert_eq!(kept(&Prune::to_layers(3)), [0, 1, 4]);
    assert_eq!(kept(&Prune { choose: Choose::Even, ..Prune::to_layers(3) }), [0, 2, 4]);
    let these = Prune { layers: Some(Layers::These(vec![1, 2])), ..Prune::default() };
    assert_eq!(kept(&these), [1, 2]);
}

#[test]
fn the_order_of_the_texts_chooses_nothing() {
    let teacher = teacher(4);
    let to = Prune {
        choose: Choose::BlockInfluence,
        hidden_size: Some(10),
        intermediate_size: Some(13),
        num_attention_heads: Some(2),
        ..Prune::to_layers(2)
    };
    let (one, _) = pruned(&teacher, &to);
    let mut texts = texts();
    texts.reverse();
    let (other, _) = prune(&teacher, &to, &texts, &|| Ok(())).unwrap();
    for ((name, one), (_, other)) in one.parameters().into_iter().zip(other.parameters()) {
        assert!((one - other).abs().max().double_value(&[]) < 1e-6, "{name}");
    }
}

#[test]
fn what_cannot_be_measured_is_an_error() {
    let model = teacher(2);
    let to = Prune { intermediate_size: Some(13), ..Prune::default() };
    let refuse = |model: &Model, to: &Prune, texts: &[Vec<u32>], code: Code| {
        let error = prune(model, to, texts, &|| Ok(())).map(|_| ()).unwrap_err();
        assert_eq!(error.code, code, "{}", error.message);
    };
    refuse(&model, &to, &[vec![]], Code::PromptSetTooSmall);
    refuse(&model, &Prune { intermediate_size: Some(25), ..to.clone() }, &texts(), Code::SpecInvalid);
    let stopped = || Err(Error::new(Code::JobCancelled, "stopped"));
    assert_eq!(prune(&model, &to, &texts(), &stopped).map(|_| ()).unwrap_err().code, Code::JobCancelled);
    let mut embedding = model.parameters()[0].1.shallow_clone();
    let _ = tch::no_grad(|| embedding.fill_(f64::NAN));
    refuse(&model, &to, &texts(), Code::ModelMalformed);
}

/// A text longer than the context is cut, not refused.
#[test]
fn long_texts_are_read_as_far_as_the_context_goes() {
    let model = teacher(2);
    let to = Prune { intermediate_size: Some(13), ..Prune::default() };
    let (_, report) = prune(&model, &to, &[vec![3; 500]], &|| Ok(())).unwrap();
    assert_eq!(report.calibration_tokens, 128);
}
