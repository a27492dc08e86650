//! Batched generation with a KV cache, soft targets captured as the tokens are drawn.
//!
//! Shapes: b rows still writing, t positions, h hidden, v vocabulary.
//!
//! Batches are cut from the shard alone, by prompt length, so what a row computes never depends on
//! what else a worker was doing. Inside a batch a row's numbers do depend on its company in the last
//! bits: matrix kernels add in another order for another number of rows. The batches are the same
//! each time the shard is computed, so the shard is still a pure function of its inputs.

use retort_artifact::soft_targets::{Position, Sequence};
use retort_core::Result;
use retort_llama::{KvCache, Model};
use tch::{Device, Kind, Tensor};

use super::limits;
use crate::{
    capture::{Capture, Target},
    engine::{Generation, Text, Watch},
    sampling::Place,
    torch::{model as llama, torch},
};

pub(super) fn run(
    model: &Model,
    texts: &[Text],
    order: &Generation,
    capture: &Capture,
    watch: Watch,
) -> Result<Vec<Sequence>> {
    let mut by_length: Vec<usize> = (0..texts.len()).collect();
    by_length.sort_by_key(|&at| (std::cmp::Reverse(texts[at].token_ids.len()), at));
    let longest = by_length.first().map_or(0, |&at| texts[at].token_ids.len());
    let bytes = if model.kind() == Kind::BFloat16 { 2 } else { 4 };
    let rows = limits::cache_rows(model.config(), bytes, longest + order.max_new_tokens as usize);

    let mut done: Vec<Option<Sequence>> = texts.iter().map(|_| None).collect();
    let mut captured = 0;
    for batch in by_length.chunks(rows) {
        watch(captured)?;
        let texts: Vec<&Text> = batch.iter().map(|&at| &texts[at]).collect();
        let written =
            Batch::prefill(model, &texts, order.max_new_tokens)?.write(order, capture, &mut captured, watch)?;
        for (&at, sequence) in batch.iter().zip(written) {
            done[at] = Some(sequence);
        }
    }
    Ok(done.into_iter().flatten().collect())
}

struct Batch<'a> {
    model: &'a Model,
    device: Device,
    rows: Vec<Row<'a>>,
    /// Indices into `rows` of those still writing, in the order of the cache's rows.
    open: Vec<usize>,
    cache: KvCache,
    hidden_bh: Tensor,
}

struct Row<'a> {
    text: &'a Text,
    written: Vec<u32>,
    positions: Vec<Position>,
    finish_reason: &'static str,
}

impl<'a> Batch<'a> {
    fn prefill(model: &'a Model, texts: &[&'a Text], max_new_tokens: u32) -> Result<Self> {
        let device = model.device();
        let longest = texts.iter().map(|text| text.token_ids.len()).max().unwrap_or(0);
        let mut ids = Vec::with_capacity(texts.len() * longest);
        for text in texts {
            ids.extend(text.token_ids.iter().map(|&id| i64::from(id)));
            // Padding lies behind the prompt, where no real position looks.
            ids.resize(ids.len() + longest - text.token_ids.len(), 0);
        }
        let ids_bt = Tensor::from_slice(&ids)
            .f_view([texts.len() as i64, longest as i64])
            .and_then(|ids| ids.f_to_device(device))
            .map_err(torch)?;
        let lengths: Vec<i64> = texts.iter().map(|text| text.token_ids.len() as i64).collect();
        let capacity = longest as i64 + i64::from(max_new_tokens);
        let mut cache =
            KvCache::new(model.config(), texts.len() as i64, capacity, device, model.kind()).map_err(llama)?;
        let hidden_bh = model.prefill(&ids_bt, &lengths, &mut cache).map_err(llama)?;
        let row = |text: &&'a Text| Row { text, written: Vec::new(), positions: Vec::new(), finish_reason: "length" };
        Ok(Self {
            model,
            device,
            rows: texts.iter().map(row).collect(),
            open: (0..texts.len()).collect(),
            cache,
            hidden_bh,
        })
    }

    fn write(
        mut self,
        order: &Generation,
        capture: &Capture,
        captured: &mut u64,
        watch: Watch,
    ) -> Result<Vec<Sequence>> {
        let ends = &self.model.config().eos_token_ids;
        while !self.open.is_empty() {
            let logits_bv = self.model.head(&self.hidden_bh).map_err(llama)?;
            let places: Vec<Place> = self.open.iter().map(|&at| self.rows[at].next_place()).collect();
            let tokens = order.sampler.next(&logits_bv, &places)?;
            let targets: Vec<Target> = places
                .iter()
                .zip(&tokens)
                .map(|(place, &token)| Target { row: place.row, position: place.position, token })
                .collect();
            let positions = capture.positions(&logits_bv, &targets)?;
            *captured += targets.len() as u64;
            watch(*captured)?;

            let mut keep = Vec::with_capacity(self.open.len());
            let mut open = Vec::with_capacity(self.open.len());
            let mut next = Vec::with_capacity(self.open.len());
            for (cache_row, ((&at, &token), position)) in self.open.iter().zip(&tokens).zip(positions).enumerate() {
                let row = &mut self.rows[at];
                row.written.push(token);
                row.positions.push(position);
                if ends.contains(&token) {
                    row.finish_reason = "stop";
                } else if row.written.len() < order.max_new_tokens as usize {
                    keep.push(cache_row as i64);
                    open.push(at);
                    next.push(i64::from(token));
                }
            }
            if open.len() < self.open.len() && !open.is_empty() {
                self.cache.keep_rows(&keep).map_err(llama)?;
            }
            self.open = open;
            if !self.open.is_empty() {
                let ids_b = Tensor::from_slice(&next).f_to_device(self.device).map_err(torch)?;
                self.hidden_bh = self.model.decode(&ids_b, &mut self.cache).map_err(llama)?;
            }
        }
        Ok(self.rows.into_iter().map(Row::finish).collect())
    }
}

impl Row<'_> {
    fn next_place(&self) -> Place {
        Place { row: self.text.row, position: (self.text.token_ids.len() + self.written.len()) as u64 }
    }

    fn finish(self) -> Sequence {
        let mut token_ids = self.text.token_ids.clone();
        let mut target_mask = vec![false; token_ids.len()];
        target_mask.resize(token_ids.len() + self.written.len(), true);
        token_ids.extend(self.written);
        Sequence {
            row_id: self.text.row_id.clone(),
            row: self.text.row,
            tags: self.text.tags.clone(),
            token_ids,
            target_mask,
            finish_reason: self.finish_reason.to_owned(),
            positions: self.positions,
        }
    }
}
