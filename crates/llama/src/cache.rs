//! Keys and values of positions already computed, one row a sequence.

use tch::{Device, Kind, Tensor};

use crate::{
    Config, Error, Result,
    attention::{self, Mask},
};

/// Rows of different lengths share one capacity. Memory is `2 x layers x rows x capacity x
/// key-value heads x head size` numbers, taken at the start and zeroed.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<Layer>,
    lengths: Vec<i64>,
    capacity: i64,
    window: Option<i64>,
    kind: Kind,
    device: Device,
}

#[derive(Debug)]
struct Layer {
    key_bkcd: Tensor,
    value_bkcd: Tensor,
}

/// Where the next positions go, worked out once a step and used by every layer.
pub(crate) struct Step {
    /// Positions of the new tokens, int64 `[b, t]`, or `[1, t]` where all rows agree.
    pub(crate) position_bt: Tensor,
    /// The first new position, where all rows agree.
    start: Option<i64>,
    tokens: i64,
    /// Keys the longest row has after this step.
    keys: i64,
    /// What the new tokens see; `None` where no mask, or the causal one, says the same.
    bias_b1ts: Option<Tensor>,
}

impl KvCache {
    /// Room for `batch` rows of up to `capacity` positions each.
    pub fn new(config: &Config, batch: i64, capacity: i64, device: Device, kind: Kind) -> Result<Self> {
        if batch < 1 || capacity < 1 {
            return Err(Error::Invalid(format!("a cache of {batch} rows by {capacity} positions holds nothing")));
        }
        if capacity > config.max_position_embeddings {
            return Err(Error::TooLong(format!(
                "{capacity} positions are more than the model's context of {}",
                config.max_position_embeddings
            )));
        }
        let shape = [batch, config.num_key_value_heads, capacity, config.head_dim];
        let zeros = || Tensor::f_zeros(shape, (kind, device));
        let layers = (0..config.num_hidden_layers)
            .map(|_| Ok(Layer { key_bkcd: zeros()?, value_bkcd: zeros()? }))
            .collect::<Result<_>>()?;
        let lengths = vec![0; batch as usize];
        Ok(Self { layers, lengths, capacity, window: config.sliding_window, kind, device })
    }

    /// Positions held, one number a row.
    pub fn lengths(&self) -> &[i64] {
        &self.lengths
    }

    pub fn batch(&self) -> usize {
        self.lengths.len()
    }

    pub fn capacity(&self) -> i64 {
        self.capacity
    }

    /// Keeps these rows, in this order, and drops the others.
    pub fn keep_rows(&mut self, rows: &[i64]) -> Result<()> {
        let lengths: Option<Vec<_>> =
            rows.iter().map(|&row| self.lengths.get(usize::try_from(row).ok()?).copied()).collect();
        let Some(lengths) = lengths else {
            return Err(Error::Invalid(format!("rows {rows:?} of a cache with {} rows", self.lengths.len())));
        };
        tch::no_grad(|| {
            let rows = Tensor::f_from_slice(rows)?.f_to_device(self.device)?;
            for layer in &mut self.layers {
                layer.key_bkcd = layer.key_bkcd.f_index_select(0, &rows)?;
                layer.value_bkcd = layer.value_bkcd.f_index_select(0, &rows)?;
            }
            self.lengths = lengths;
            Ok(())
        })
    }

    /// Adds another cache's rows after these, so that new sequences join a running batch.
    pub fn append(&mut self, other: KvCache) -> Result<()> {
        let alike = |cache: &KvCache| (cache.layers.len(), cache.capacity, cache.kind, cache.device);
        if alike(self) != alike(&other) {
            return Err(Error::Invalid("the caches differ in layers, capacity, dtype or device".into()));
        }
        tch::no_grad(|| {
            for (layer, more) in self.layers.iter_mut().zip(&other.layers) {
                layer.key_bkcd = Tensor::f_cat(&[&layer.key_bkcd, &more.key_bkcd], 0)?;
                layer.value_bkcd = Tensor::f_cat(&[&layer.value_bkcd, &more.value_bkcd], 0)?;
            }
            self.lengths.extend_from_slice(&other.lengths);
            Ok(())
        })
    }

    /// Plans `tokens` new positions in each row.
    pub(crate) fn plan(&self, tokens: i64) -> Result<Step> {
        let longest = self.lengths.iter().copied().max().unwrap_or(0);
        let keys = longest + tokens;
        if keys > self.capacity {
            return Err(Error::TooLong(format!(
                "{keys} positions do not fit the cache: it holds {} a row",
                self.capacity
            )));
        }
        let start = self.lengths.iter().all(|&length| length == longest).then_some(longest);
        let starts_b1 = match start {
            Some(start) => Tensor::f_from_slice(&[start])?,
            None => Tensor::f_from_slice(&self.lengths)?,
        };
        let starts_b1 = starts_b1.f_to_device(self.device)?.f_unsqueeze(1)?;
        let position_bt = starts_b1.f_add(&Tensor::f_arange(tokens, (Kind::Int64, self.device))?)?;
        let within_window = self.window.is_none_or(|window| keys <= window);
        let plain = within_window && start.is_some_and(|start| start == 0 || tokens == 1);
        let bias_b1ts = if plain {
            None
        } else {
            Some(attention::bias(&position_bt, keys, self.window, (self.kind, self.device))?)
        };
        Ok(Step { position_bt, start, tokens, keys, bias_b1ts })
    }

    /// Stores a layer's new keys and values, then attends to all that the rows hold.
    pub(crate) fn attend(
        &mut self,
        layer: usize,
        step: &Step,
        query_bqtd: &Tensor,
        key_bktd: &Tensor,
        value_bktd: &Tensor,
    ) -> Result<Tensor> {
        let device = self.device;
        let layer = self.layers.get_mut(layer).ok_or_else(|| Error::Invalid("the cache has too few layers".into()))?;
        layer.store(step, key_bktd, value_bktd, device)?;
        if step.start == Some(0) && step.tokens > 1 {
            let mask = step.bias_b1ts.as_ref().map_or(Mask::Causal, Mask::Bias);
            return attention::attend(query_bqtd, key_bktd, value_bktd, &mask);
        }
        let mask = step.bias_b1ts.as_ref().map_or(Mask::All, Mask::Bias);
        let key_bksd = layer.key_bkcd.f_narrow(2, 0, step.keys)?;
        let value_bksd = layer.value_bkcd.f_narrow(2, 0, step.keys)?;
        if step.tokens == 1 {
            attention::attend_one(query_bqtd, &key_bksd, &value_bksd, &mask)
        } else {
            attention::attend(query_bqtd, &key_bksd, &value_bksd, &mask)
        }
    }

    /// Counts positions that a step has stored; what lies beyond a row's count is overwritten later.
    pub(crate) fn advance(&mut self, by: &[i64]) {
        for (length, by) in self.lengths.iter_mut().zip(by) {
            *length += by;
        }
    }
}

impl Layer {
    fn store(&mut self, step: &Step, key_bktd: &Tensor, value_bktd: &Tensor, device: Device) -> Result<()> {
        let pairs = [(&mut self.key_bkcd, key_bktd), (&mut self.value_bkcd, value_bktd)];
        if let Some(start) = step.start {
            for (kept, new) in pairs {
                kept.f_narrow(2, start, step.tokens)?.f_copy_(new)?;
            }
            return Ok(());
        }
        let rows = step.position_bt.size2()?.0;
        let row_b1 = Tensor::f_arange(rows, (Kind::Int64, device))?.f_unsqueeze(1)?;
        for (kept, new) in pairs {
            // Indices on both sides of the heads axis put it last but one: [b, t, k, d].
            let new_btkd = new.f_transpose(1, 2)?;
            let _ = kept.f_index_put_(&[Some(&row_b1), None, Some(&step.position_bt)], &new_btkd, false)?;
        }
        Ok(())
    }
}
