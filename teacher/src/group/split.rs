//! Which stage has which layers.

use std::ops::Range;

use retort_core::{Code, Error, Result};
use retort_model::balance_layers;
use retort_proto as proto;

/// Contiguous layers for each stage, so that the slowest is as fast as it can be. Costs are in layers, and
/// the means of what the stages say: their machines are alike, and one that is busy for a moment should not
/// change the split.
pub(super) fn balanced(opened: &[&proto::ModelOpened], layers: u32) -> Result<Vec<Range<u32>>> {
    let mean = |of: fn(&proto::ModelOpened) -> f64| {
        opened.iter().map(|opened| of(opened) / opened.layer_cost).sum::<f64>() / opened.len().max(1) as f64
    };
    let costs = vec![1.0; layers as usize];
    let (first, last) = (mean(|opened| opened.embedding_cost), mean(|opened| opened.head_cost));
    let ranges = balance_layers(&costs, first, last, opened.len()).map_err(|error| {
        Error::new(Code::StageMismatch, format!("the group's layers cannot be split: {}", error.message))
    })?;
    Ok(ranges.into_iter().map(|range| range.start as u32..range.end as u32).collect())
}
