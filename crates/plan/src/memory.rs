//! What a GPU must hold: weights exactly, the KV cache exactly, activations from above.

use std::ops::Range;

use retort_model::Config;

use crate::{Assumptions, Cluster, Engine, Layout, Weights, outcome::Stage};

/// Positions whose logits lie in memory at once.
const HEAD_CHUNK: u64 = 512;
/// A position's logit: bf16 as the head gives it, fp32 twice over for its log-probability.
const LOGIT_BYTES: u64 = 2 + 4 + 4;

/// What is held beside the weights.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    /// Tokens in flight in a stage at once.
    pub tokens: u64,
    /// Of these, positions whose logits are wanted.
    pub targets: u64,
    /// Positions in the cache of each stage, over all its sequences.
    pub cached: u64,
}

/// Bytes of each of a stage's GPUs; its `seconds` are the caller's to set.
pub(crate) fn stage(
    config: &Config,
    weights: &Weights,
    layout: &Layout,
    range: Range<usize>,
    load: Load,
    node: u32,
) -> Stage {
    let tensor = u64::from(layout.tensor);
    let [hidden, inner, queries, keys] = [
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    ]
    .map(i64::unsigned_abs);
    // The residual, its norm, a block's output, and two micro-batches that wait; then what the layer
    // at work holds: queries, keys, values and attention's output, or gate, up and their product.
    let work = (2 * queries + 2 * keys).max(3 * inner).div_ceil(tensor);
    let mut activations = 2 * load.tokens.saturating_mul(5 * hidden + work);
    if range.end == weights.layers.len() {
        activations += head_bytes(config, layout, load);
    }
    // A one-byte matrix is widened before its product, one at a time.
    if layout.engine == Engine::Native && weights.layers[range.clone()].iter().any(|layer| layer.narrow > 0) {
        activations += 2 * hidden * inner.max(queries);
    }
    Stage {
        node,
        parameters: weights.stage_parameters(&range),
        weight_bytes: weights.stage_bytes(&range, tensor),
        cache_bytes: load.cached.saturating_mul(cache_bytes(config, layout.tensor)).saturating_mul(range.len() as u64),
        activation_bytes: activations,
        layers: range,
        seconds: 0.0,
    }
}

/// The logits that lie in memory at once.
pub(crate) fn head_bytes(config: &Config, layout: &Layout, load: Load) -> u64 {
    load.targets.min(HEAD_CHUNK) * config.vocab_size.unsigned_abs() * LOGIT_BYTES / u64::from(layout.tensor)
}

/// Keys and values of one position in one layer on one of `tensor` GPUs. More GPUs than key heads
/// hold copies.
pub(crate) fn cache_bytes(config: &Config, tensor: u32) -> u64 {
    let heads = config.num_key_value_heads.unsigned_abs().div_ceil(u64::from(tensor)).max(1);
    2 * 2 * heads * config.head_dim.unsigned_abs()
}

/// What weights, cache and activations may fill of a GPU.
pub(crate) fn usable(cluster: &Cluster, assumptions: &Assumptions) -> u64 {
    (cluster.gpu.memory_bytes as f64 * assumptions.memory_utilization) as u64
}

/// Why these stages do not fit, told of the one that lacks most.
pub(crate) fn too_small(stages: &[Stage], cluster: &Cluster, assumptions: &Assumptions) -> Option<String> {
    let usable = usable(cluster, assumptions);
    let (index, stage) = stages.iter().enumerate().max_by_key(|(_, stage)| stage.bytes())?;
    if stage.bytes() <= usable {
        return None;
    }
    let gib = |bytes: u64| bytes as f64 / (1_u64 << 30) as f64;
    Some(format!(
        "stage {index} (layers {}-{}) needs {:.1} GiB a GPU (weights {:.1}, cache {:.1}, activations {:.1}); {:.1} of \
         {:.1} GiB are usable",
        stage.layers.start,
        stage.layers.end - 1,
        gib(stage.bytes()),
        gib(stage.weight_bytes),
        gib(stage.cache_bytes),
        gib(stage.activation_bytes),
        gib(usable),
        gib(cluster.gpu.memory_bytes),
    ))
}
