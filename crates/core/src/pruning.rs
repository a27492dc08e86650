//! What pruning kept of a teacher, and how much that weighs: `pruning.json` beside a student's initial weights,
//! and a part of the job's report.

use serde::{Deserialize, Serialize};

/// Most layers that a pruning names.
pub const MAX_LAYERS: usize = 1024;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pruning {
    /// Kept, in ascending order.
    pub layers: Vec<Layer>,
    pub depth: Axis,
    pub hidden: Axis,
    pub intermediate: Axis,
    pub attention_heads: Axis,
    pub key_value_heads: Axis,
    /// On which importance was measured; 0 where nothing went by it.
    pub calibration_rows: u32,
    pub calibration_tokens: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Layer {
    /// In the teacher, from 0.
    pub layer: u32,
    /// 1 - cosine of its input and output, mean over the calibration tokens (Men et al., "ShortGPT", 2024).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub influence: Option<f64>,
    /// Share of the layer's importance that its kept heads have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention_heads_share: Option<f64>,
    /// The same of its kept channels inside the feed-forward block.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub intermediate_share: Option<f64>,
}

/// One direction in which a model can be cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Axis {
    pub kept: u32,
    /// The teacher's.
    pub of: u32,
    /// Of the importance that was kept, mean over the kept layers; `None` where it was not measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub share: Option<f64>,
}
