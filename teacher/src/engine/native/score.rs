//! Soft targets of given completions: one forward pass, no cache, the head at targets alone.
//!
//! Shapes: b rows, t positions, h hidden, v vocabulary, n targets, c targets of a chunk.

use retort_artifact::soft_targets::{Position, Sequence};
use retort_core::Result;
use retort_llama::Model;
use tch::Tensor;

use super::limits;
use crate::{
    capture::{Capture, Target},
    engine::{Text, Watch},
    torch::{model as llama, torch},
};

pub(super) fn run(model: &Model, texts: &[Text], capture: &Capture, watch: Watch) -> Result<Vec<Sequence>> {
    let mut by_length: Vec<usize> = (0..texts.len()).collect();
    by_length.sort_by_key(|&at| (std::cmp::Reverse(texts[at].token_ids.len()), at));

    let mut done: Vec<Option<Sequence>> = texts.iter().map(|_| None).collect();
    let mut captured = 0;
    let mut rest = by_length.as_slice();
    while let Some(&first) = rest.first() {
        // The first is the longest, so it sets the batch's width.
        let width = texts[first].token_ids.len().max(1);
        let (batch, later) = rest.split_at((limits::FORWARD_TOKENS / width).clamp(1, rest.len()));
        rest = later;
        watch(captured)?;
        let batch_texts: Vec<&Text> = batch.iter().map(|&at| &texts[at]).collect();
        let mut positions = forward(model, &batch_texts, capture, &mut captured, watch)?.into_iter();
        for &at in batch {
            let targets = texts[at].token_ids.len() - texts[at].prompt_tokens;
            done[at] = Some(finish(&texts[at], positions.by_ref().take(targets).collect()));
        }
    }
    Ok(done.into_iter().flatten().collect())
}

/// Soft targets of all texts' targets, text after text.
fn forward(
    model: &Model,
    texts: &[&Text],
    capture: &Capture,
    captured: &mut u64,
    watch: Watch,
) -> Result<Vec<Position>> {
    let width = texts.iter().map(|text| text.token_ids.len()).max().unwrap_or(0);
    let mut ids = Vec::with_capacity(texts.len() * width);
    // Where in the flattened batch each target is predicted: at the token before it.
    let mut at_n = Vec::new();
    let mut targets = Vec::new();
    for text in texts {
        let start = ids.len();
        for position in text.prompt_tokens.max(1)..text.token_ids.len() {
            at_n.push((start + position - 1) as i64);
            targets.push(Target { row: text.row, position: position as u64, token: text.token_ids[position] });
        }
        ids.extend(text.token_ids.iter().map(|&id| i64::from(id)));
        ids.resize(start + width, 0);
    }
    let ids_bt = Tensor::from_slice(&ids)
        .f_view([texts.len() as i64, width as i64])
        .and_then(|ids| ids.f_to_device(model.device()))
        .map_err(torch)?;
    let hidden_bth = model.hidden(&ids_bt).map_err(llama)?;
    let at_n = Tensor::from_slice(&at_n).f_to_device(model.device()).map_err(torch)?;
    let hidden_nh = hidden_bth.f_flatten(0, 1).and_then(|flat| flat.f_index_select(0, &at_n)).map_err(torch)?;
    drop(hidden_bth);

    let mut positions = Vec::with_capacity(targets.len());
    let chunk = limits::chunk_positions(model.config().vocab_size);
    for (index, targets_c) in targets.chunks(chunk).enumerate() {
        let hidden_ch = hidden_nh.f_narrow(0, (index * chunk) as i64, targets_c.len() as i64).map_err(torch)?;
        let logits_cv = model.head(&hidden_ch).map_err(llama)?;
        positions.extend(capture.positions(&logits_cv, targets_c)?);
        *captured += targets_c.len() as u64;
        watch(*captured)?;
    }
    Ok(positions)
}

fn finish(text: &Text, positions: Vec<Position>) -> Sequence {
    let mut target_mask = vec![false; text.prompt_tokens];
    target_mask.resize(text.token_ids.len(), true);
    Sequence {
        row_id: text.row_id.clone(),
        row: text.row,
        tags: text.tags.clone(),
        token_ids: text.token_ids.clone(),
        target_mask,
        finish_reason: "given".to_owned(),
        positions,
    }
}
