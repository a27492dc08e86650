use proptest::prelude::*;

use super::*;
use crate::Architecture;

/// Every way to cut `layers` layers into `stages` runs.
fn every_split(layers: usize, stages: usize) -> Vec<Vec<Range<usize>>> {
    fn extend(start: usize, layers: usize, stages: usize, so_far: &[Range<usize>], all: &mut Vec<Vec<Range<usize>>>) {
        if stages == 1 {
            all.push([so_far, std::slice::from_ref(&(start..layers))].concat());
            return;
        }
        for end in start + 1..=layers - (stages - 1) {
            extend(end, layers, stages - 1, &[so_far, std::slice::from_ref(&(start..end))].concat(), all);
        }
    }
    let mut all = Vec::new();
    extend(0, layers, stages, &[], &mut all);
    all
}

fn stage_costs(split: &[Range<usize>], layers: &[f64], first: f64, last: f64) -> Vec<f64> {
    let mut costs: Vec<f64> = split.iter().map(|range| layers[range.clone()].iter().sum()).collect();
    costs[0] += first;
    costs[split.len() - 1] += last;
    costs
}

fn sizes(split: &[Range<usize>]) -> Vec<usize> {
    split.iter().map(ExactSizeIterator::len).collect()
}

proptest! {
    /// Whole costs, so that ties are common and sums exact.
    #[test]
    fn no_split_is_faster_nor_as_fast_and_evener_nor_equal_and_smaller_in_front(
        layers in prop::collection::vec(0_u8..6, 1..10),
        first in 0_u8..8,
        last in 0_u8..20,
        stages in 0_usize..10,
    ) {
        let stages = 1 + stages % layers.len();
        let layers: Vec<f64> = layers.into_iter().map(f64::from).collect();
        let (first, last) = (f64::from(first), f64::from(last));
        let key = |split: &Vec<Range<usize>>| {
            // Whole numbers, so exact.
            let costs = stage_costs(split, &layers, first, last);
            let squares: f64 = costs.iter().map(|cost| cost * cost).sum();
            (costs.into_iter().fold(0.0, f64::max) as u64, squares as u64, sizes(split))
        };
        let best = every_split(layers.len(), stages).into_iter().min_by_key(key);
        prop_assert_eq!(Some(balance_layers(&layers, first, last, stages).unwrap()), best);
    }

    #[test]
    fn the_slowest_stage_is_as_fast_as_can_be_for_any_costs(
        layers in prop::collection::vec(0.0_f64..1e12, 1..10),
        first in 0.0_f64..1e12,
        last in 0.0_f64..1e13,
        stages in 0_usize..10,
    ) {
        let stages = 1 + stages % layers.len();
        let slowest = |split: &Vec<Range<usize>>| stage_costs(split, &layers, first, last).into_iter().fold(0.0, f64::max);
        let best = every_split(layers.len(), stages).iter().map(slowest).fold(f64::INFINITY, f64::min);
        let split = balance_layers(&layers, first, last, stages).unwrap();
        prop_assert!(slowest(&split) <= best * (1.0 + 1e-9), "{} > {best}", slowest(&split));
    }

    #[test]
    fn every_layer_is_held_once_and_in_order(
        layers in prop::collection::vec(0.0_f64..10.0, 1..200),
        last in 0.0_f64..50.0,
        stages in 0_usize..64,
    ) {
        let stages = 1 + stages % layers.len();
        let split = balance_layers(&layers, 0.0, last, stages).unwrap();
        prop_assert_eq!(split.len(), stages);
        prop_assert!(split.iter().all(|range| !range.is_empty()));
        prop_assert_eq!(split.into_iter().flatten().collect::<Vec<_>>(), (0..layers.len()).collect::<Vec<_>>());
    }
}

#[test]
fn equal_layers_split_evenly_with_the_smaller_stages_in_front() {
    // A tenth has no exact double: sums of equal costs still tie.
    let split = balance_layers(&[0.1; 126], 0.0, 0.0, 16).unwrap();
    assert_eq!(sizes(&split), [7, 7, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8]);
    assert_eq!(sizes(&balance_layers(&[0.0; 5], 0.0, 0.0, 2).unwrap()), [1, 4]);
    assert_eq!(sizes(&balance_layers(&[1.0; 4], 0.0, 0.0, 4).unwrap()), [1, 1, 1, 1]);
}

#[test]
fn a_costly_head_leaves_its_stage_fewer_layers() {
    assert_eq!(sizes(&balance_layers(&[1.0; 30], 0.0, 8.0, 2).unwrap()), [19, 11]);
    assert_eq!(sizes(&balance_layers(&[1.0; 30], 2.0, 0.0, 2).unwrap()), [14, 16]);
    assert_eq!(sizes(&balance_layers(&[1.0; 4], 0.0, 100.0, 3).unwrap()), [1, 2, 1]);
}

#[test]
fn what_cannot_be_split_is_refused_by_name() {
    let refused = |layers: &[f64], first, last, stages| {
        let error = balance_layers(layers, first, last, stages).unwrap_err();
        assert_eq!(error.code, Code::SpecInvalid);
        error.message
    };
    assert_eq!(refused(&[1.0; 2], 0.0, 0.0, 0), "0 stages cannot hold a model; name at least 1");
    assert_eq!(
        refused(&[1.0; 2], 0.0, 0.0, 3),
        "3 stages for 2 layers: each holds at least one, so take at most 2 stages"
    );
    assert_eq!(
        refused(&[1.0, f64::NAN], 0.0, 0.0, 1),
        "the cost of layer 1 is NaN; it must be a finite number of at least 0"
    );
    assert!(refused(&[1.0], -1.0, 0.0, 1).starts_with("the cost of the first stage is -1;"));
    assert!(refused(&[1.0], 0.0, f64::INFINITY, 1).starts_with("the cost of the last stage is inf;"));
    assert!(refused(&[f64::MAX], f64::MAX, 0.0, 1).contains("use a larger unit"));
}

#[test]
fn flops_are_twice_the_products_weights() {
    let config = Config::from_json(
        &"test",
        &serde_json::json!({
            "architectures": [Architecture::Llama.class_name()], "model_type": "llama", "hidden_act": "silu",
            "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 8,
            "num_key_value_heads": 2, "vocab_size": 100, "rms_norm_eps": 1e-5, "max_position_embeddings": 128,
            "tie_word_embeddings": false,
        }),
    )
    .unwrap();
    let flops = token_flops(&config, 10.0);
    let weights = |part: &str| {
        let named = config.tensors().into_iter().filter(|(name, shape)| name.contains(part) && shape.len() == 2);
        named.map(|(_, shape)| shape.iter().product::<i64>()).sum::<i64>() as f64
    };
    assert_eq!(flops.layer_products, 2.0 * weights("layers.0."));
    assert_eq!(flops.head, 2.0 * weights("lm_head"));
    // 10 positions, 8 heads of 8: a score and a weighted value each.
    assert_eq!(flops.layer_attention, 10.0 * 8.0 * (2.0 * 8.0 + 2.0 * 8.0));
    let windowed = Config { sliding_window: Some(4), ..config };
    assert_eq!(token_flops(&windowed, 10.0).layer_attention, 0.4 * flops.layer_attention);
}
