//! A student cut out of its teacher: what stays is chosen by a rule, or by its importance on calibration texts.

pub(crate) mod calibration;

use retort_core::{
    Code, Error, Result,
    pruning::{Axis, Layer, Pruning},
    spec::{Choose, Layers, Prune},
};
use retort_llama::{Config, Cut, Importance, LayerCut, LayerImportance, Model, Observer};

use crate::failure::llama;

/// Tokens read of a calibration text: what one forward pass holds does not grow with the texts.
const MAX_TOKENS: usize = 2048;

/// The student that `prune` leaves of `teacher`, with its own weights, and what was kept. `texts` are token ids,
/// used where [`Prune::needs_calibration`]; `check` is asked between them.
///
/// `SpecInvalid` where the teacher has less than is to be kept.
pub fn prune(
    teacher: &Model,
    prune: &Prune,
    texts: &[Vec<u32>],
    check: &dyn Fn() -> Result<()>,
) -> Result<(Model, Pruning)> {
    let shape = teacher.config().pruned(prune)?;
    let (cut, pruning) = if prune.needs_calibration() {
        by_importance(teacher.config(), &shape, prune, &measure(teacher, texts, check)?)
    } else {
        let layers = ruled_layers(prune, teacher.config());
        (Cut::to_layers(teacher.config(), &layers), unmeasured(teacher.config(), &shape, &layers))
    };
    Ok((teacher.prune(&cut).map_err(llama)?, pruning))
}

/// `keep` of `layers` layers: the first seven tenths of them from the front, the others from the end;
/// one contiguous block goes.
///
/// That the deep layers but for the last are the ones to spare is found by Gromov et al., "The
/// Unreasonable Ineffectiveness of the Deeper Layers" (2024); where to cut was tried on SmolLM2, see
/// `docs/decisions/007-layers-kept.md`.
pub fn kept_layers(layers: usize, keep: usize) -> Vec<usize> {
    let front = (7 * keep + 5) / 10;
    (0..front).chain(layers - (keep - front)..layers).collect()
}

/// `keep` of the indices up to `of`, as evenly spaced as whole numbers are; the first and the last among them, of one
/// the first.
pub(crate) fn evenly_spaced(of: usize, keep: usize) -> Vec<usize> {
    let gaps = keep.saturating_sub(1).max(1);
    (0..keep).map(|at| (at * (of - 1) + gaps / 2) / gaps).collect()
}

/// The layers that need no texts to be chosen. `prune` fits the teacher.
fn ruled_layers(prune: &Prune, teacher: &Config) -> Vec<usize> {
    let layers = teacher.num_hidden_layers.unsigned_abs() as usize;
    match &prune.layers {
        Some(Layers::These(these)) => these.iter().map(|&layer| layer as usize).collect(),
        Some(Layers::Count(keep)) if prune.choose == Choose::Even => evenly_spaced(layers, *keep as usize),
        Some(Layers::Count(keep)) => kept_layers(layers, *keep as usize),
        None => (0..layers).collect(),
    }
}

fn measure(teacher: &Model, texts: &[Vec<u32>], check: &dyn Fn() -> Result<()>) -> Result<Importance> {
    let context = teacher.config().max_position_embeddings.unsigned_abs() as usize;
    let mut observer = Observer::new(teacher);
    for text in texts.iter().filter(|text| !text.is_empty()) {
        check()?;
        let ids: Vec<i64> = text.iter().take(MAX_TOKENS.min(context)).map(|&id| id.into()).collect();
        observer.add(&ids).map_err(llama)?;
    }
    let importance = observer.finish();
    if importance.tokens == 0 {
        return Err(Error::new(
            Code::PromptSetTooSmall,
            "student.init.prune measures importance on training rows, and the first ones have no tokens",
        ));
    }
    let finite = |numbers: &[f64]| numbers.iter().all(|number| number.is_finite());
    let sound = |layer: &LayerImportance| {
        layer.influence.is_finite()
            && [&layer.heads, &layer.channels, &layer.input_norm, &layer.post_norm]
                .iter()
                .all(|numbers| finite(numbers))
    };
    if !importance.layers.iter().all(sound) || !finite(&importance.final_norm) {
        return Err(Error::new(
            Code::ModelMalformed,
            "the teacher's activations on the calibration rows are not finite; check its weights, or start the student \
             with --dtype f32",
        ));
    }
    Ok(importance)
}

/// What stays of each axis, and the report of it. `shape` is the student's.
fn by_importance(teacher: &Config, shape: &Config, prune: &Prune, importance: &Importance) -> (Cut, Pruning) {
    let influence: Vec<f64> = importance.layers.iter().map(|layer| layer.influence).collect();
    let layers = match (&prune.layers, prune.choose) {
        (Some(Layers::Count(keep)), Choose::BlockInfluence) => top(&influence, *keep as usize),
        _ => ruled_layers(prune, teacher),
    };
    let hidden_importance = hidden_importance(importance, &layers);
    let hidden = top(&hidden_importance, size(shape.hidden_size));
    let mut cuts = Vec::with_capacity(layers.len());
    let mut kept = Vec::with_capacity(layers.len());
    let mut key_value_shares = Vec::with_capacity(layers.len());
    for &layer in &layers {
        let of = &importance.layers[layer];
        let (key_value_heads, query_heads) = top_heads(&of.heads, teacher, shape);
        let channels = top(&of.channels, size(shape.intermediate_size));
        let group = of.heads.len() / size(teacher.num_key_value_heads);
        let groups: Vec<f64> = of.heads.chunks(group).map(|heads| heads.iter().sum()).collect();
        key_value_shares.push(share(&groups, &key_value_heads));
        kept.push(Layer {
            layer: layer as u32,
            influence: Some(rounded(of.influence)),
            attention_heads_share: Some(share(&of.heads, &query_heads)),
            intermediate_share: Some(share(&of.channels, &channels)),
        });
        cuts.push(LayerCut { layer, key_value_heads, query_heads, channels });
    }
    let mean = |shares: &dyn Fn(&Layer) -> Option<f64>| {
        Some(rounded(kept.iter().filter_map(shares).sum::<f64>() / kept.len().max(1) as f64))
    };
    let plain = unmeasured(teacher, shape, &layers);
    let pruning = Pruning {
        depth: Axis { share: Some(share(&influence, &layers)), ..plain.depth },
        hidden: Axis { share: Some(share(&hidden_importance, &hidden)), ..plain.hidden },
        intermediate: Axis { share: mean(&|layer| layer.intermediate_share), ..plain.intermediate },
        attention_heads: Axis { share: mean(&|layer| layer.attention_heads_share), ..plain.attention_heads },
        key_value_heads: Axis {
            share: Some(rounded(key_value_shares.iter().sum::<f64>() / key_value_shares.len().max(1) as f64)),
            ..plain.key_value_heads
        },
        calibration_rows: importance.texts,
        calibration_tokens: importance.tokens,
        layers: kept,
    };
    (Cut { layers: cuts, hidden }, pruning)
}

/// What was kept, without a word on what it weighs.
fn unmeasured(teacher: &Config, shape: &Config, layers: &[usize]) -> Pruning {
    let axis =
        |of: fn(&Config) -> i64| Axis { kept: size(of(shape)) as u32, of: size(of(teacher)) as u32, share: None };
    let layer = |&layer: &usize| Layer {
        layer: layer as u32,
        influence: None,
        attention_heads_share: None,
        intermediate_share: None,
    };
    Pruning {
        layers: layers.iter().map(layer).collect(),
        depth: axis(|config| config.num_hidden_layers),
        hidden: axis(|config| config.hidden_size),
        intermediate: axis(|config| config.intermediate_size),
        attention_heads: axis(|config| config.num_attention_heads),
        key_value_heads: axis(|config| config.num_key_value_heads),
        calibration_rows: 0,
        calibration_tokens: 0,
    }
}

/// Of each hidden channel: its part in the outputs of all norms that the student keeps.
fn hidden_importance(importance: &Importance, layers: &[usize]) -> Vec<f64> {
    let mut sums = importance.final_norm.clone();
    let of_layers = layers.iter().map(|&layer| &importance.layers[layer]);
    for norm in of_layers.flat_map(|layer| [&layer.input_norm, &layer.post_norm]) {
        for (sum, output) in sums.iter_mut().zip(norm) {
            *sum += output;
        }
    }
    sums
}

/// Key-value heads and query heads that stay. Within a key-value head the most important of its query heads; a
/// key-value head counts by those.
fn top_heads(heads: &[f64], teacher: &Config, shape: &Config) -> (Vec<usize>, Vec<usize>) {
    let group = heads.len() / size(teacher.num_key_value_heads);
    let each = size(shape.num_attention_heads) / size(shape.num_key_value_heads);
    let best: Vec<Vec<usize>> = heads.chunks(group).map(|heads| top(heads, each)).collect();
    let worth: Vec<f64> =
        best.iter().zip(heads.chunks(group)).map(|(best, heads)| best.iter().map(|&at| heads[at]).sum()).collect();
    let key_value_heads = top(&worth, size(shape.num_key_value_heads));
    let of_group = |&key_value: &usize| best[key_value].iter().map(move |at| key_value * group + at);
    let query_heads = key_value_heads.iter().flat_map(of_group).collect();
    (key_value_heads, query_heads)
}

/// Indices of the `keep` largest, ascending; of equals the first.
fn top(importance: &[f64], keep: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..importance.len()).collect();
    order.sort_by(|&a, &b| importance[b].total_cmp(&importance[a]));
    order.truncate(keep);
    order.sort_unstable();
    order
}

/// To six decimals: figures for a reader, the same once written and read back.
fn rounded(figure: f64) -> f64 {
    (figure * 1e6).round() / 1e6
}

/// Of the sum of all; 1 of nothing.
fn share(importance: &[f64], kept: &[usize]) -> f64 {
    let whole: f64 = importance.iter().sum();
    let kept: f64 = kept.iter().map(|&index| importance[index]).sum();
    if whole > 0.0 { rounded(kept / whole) } else { 1.0 }
}

fn size(size: i64) -> usize {
    size.max(1).unsigned_abs() as usize
}

#[cfg(test)]
mod tests;
