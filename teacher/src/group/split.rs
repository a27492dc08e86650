//! Which stage has which layers.

use std::ops::Range;

use retort_core::{Code, Error, Result};
use retort_model::balance_layers;
use retort_proto as proto;

/// Contiguous layers for each stage, so that the slowest is as fast as it can be. Costs are in layers, and
/// the least that any stage says: their machines are alike, all measure at the same time, and what disturbs
/// a measurement makes it longer.
pub(super) fn balanced(opened: &[&proto::ModelOpened], layers: u32) -> Result<Vec<Range<u32>>> {
    let least =
        |of: fn(&proto::ModelOpened) -> f64| opened.iter().map(|opened| of(opened)).fold(f64::INFINITY, f64::min);
    let layer = least(|opened| opened.layer_cost);
    let first = least(|opened| opened.embedding_cost) / layer;
    let last = least(|opened| opened.head_cost) / layer;
    let ranges = balance_layers(&vec![1.0; layers as usize], first, last, opened.len()).map_err(|error| {
        Error::new(Code::StageMismatch, format!("the group's layers cannot be split: {}", error.message))
    })?;
    Ok(ranges.into_iter().map(|range| range.start as u32..range.end as u32).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_that_were_busy_while_they_measured_change_no_split() {
        let quiet = proto::ModelOpened { layer_cost: 1.0, embedding_cost: 0.1, head_cost: 2.0, ..Default::default() };
        let busy = proto::ModelOpened { layer_cost: 2.5, embedding_cost: 0.25, head_cost: 9.0, ..Default::default() };
        let of = |busy_ones: usize| {
            let opened: Vec<_> = (0..8).map(|stage| if stage < busy_ones { &busy } else { &quiet }).collect();
            balanced(&opened, 62).unwrap()
        };
        assert_eq!(of(0), [0..8, 8..16, 16..24, 24..32, 32..40, 40..48, 48..56, 56..62]);
        assert_eq!(of(7), of(0));
    }
}
