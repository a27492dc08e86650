//! Which stage has which layers.

use std::ops::Range;

use retort_core::{Code, Error, Result};
use retort_model::balance_layers;
use retort_proto as proto;

/// Contiguous layers for each stage, so that the slowest is as fast as it can be. Costs are in layers, and
/// the medians of what the stages say: their machines are alike, and one that was busy while it measured
/// should not change the split.
pub(super) fn balanced(opened: &[&proto::ModelOpened], layers: u32) -> Result<Vec<Range<u32>>> {
    let cost = |of: fn(&proto::ModelOpened) -> f64| median(opened.iter().map(|opened| of(opened)).collect());
    // A ratio of each stage's own figures would not do: where a layer is measured at next to nothing, the
    // embedding seems to weigh as much as a whole stage.
    let layer = cost(|opened| opened.layer_cost);
    let first = cost(|opened| opened.embedding_cost) / layer;
    let last = cost(|opened| opened.head_cost) / layer;
    let ranges = balance_layers(&vec![1.0; layers as usize], first, last, opened.len()).map_err(|error| {
        Error::new(Code::StageMismatch, format!("the group's layers cannot be split: {}", error.message))
    })?;
    Ok(ranges.into_iter().map(|range| range.start as u32..range.end as u32).collect())
}

fn median(mut costs: Vec<f64>) -> f64 {
    costs.sort_by(f64::total_cmp);
    costs.get(costs.len() / 2).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_that_were_busy_while_they_measured_change_no_split() {
        let quiet = proto::ModelOpened { layer_cost: 1.0, embedding_cost: 0.1, head_cost: 2.0, ..Default::default() };
        // One step of two layers took no longer than one of one layer: the rest goes to the embedding.
        let busy = proto::ModelOpened { layer_cost: 0.1, embedding_cost: 1.9, head_cost: 0.5, ..Default::default() };
        let of = |busy_ones: usize| {
            let opened: Vec<_> = (0..8).map(|stage| if stage < busy_ones { &busy } else { &quiet }).collect();
            balanced(&opened, 62).unwrap()
        };
        assert_eq!(of(0), [0..8, 8..16, 16..24, 24..32, 32..40, 40..48, 48..56, 56..62]);
        assert_eq!(of(3), of(0));
    }
}
