//! Rows of each optimiser step: which they are (a pure function of the spec) and where they come
//! from (published shards, streamed while the teacher still works).

use std::path::Path;

use retort_core::{
    Code, Error, Result,
    random::{Counter, Purpose},
};
use serde::{Deserialize, Serialize};

use crate::{
    example::Example,
    shards::{Fetched, ShardStream},
    spill::Spill,
    weights::RowWeights,
};

/// The order of the training rows over all passes.
///
/// Rows are counted in the order of the shards' index. The first pass reads them as they come, so that
/// training can follow the teacher; each later pass is a shuffle of its own, drawn from the job's seed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    seed: u64,
    rows: u64,
    batch_rows: u64,
    /// The last shuffled pass that was asked for.
    shuffled: Option<(u32, Vec<u64>)>,
}

impl Order {
    pub fn new(seed: u64, rows: u64, batch_rows: u32) -> Self {
        Self { seed, rows, batch_rows: u64::from(batch_rows.max(1)), shuffled: None }
    }

    /// Optimiser steps of one pass; the last may have fewer rows.
    pub fn steps_per_pass(&self) -> u64 {
        self.rows.div_ceil(self.batch_rows)
    }

    /// Those of a whole run: every pass reads every row once, and its last step takes what is left.
    pub fn steps(&self, passes: u32) -> Result<u32> {
        u32::try_from(self.steps_per_pass().saturating_mul(u64::from(passes)))
            .map_err(|_| Error::new(Code::SpecInvalid, format!("{passes} passes make more steps than can be counted")))
    }

    /// Rows of the step with this index, counted from 0 over all passes.
    pub fn rows_of(&mut self, step: u32) -> Vec<u64> {
        let per_pass = self.steps_per_pass().max(1);
        let pass = (u64::from(step) / per_pass) as u32;
        let start = u64::from(step) % per_pass * self.batch_rows;
        let end = (start + self.batch_rows).min(self.rows);
        if pass == 0 {
            return (start..end).collect();
        }
        if self.shuffled.as_ref().is_none_or(|(of, _)| *of != pass) {
            let mut rows: Vec<u64> = (0..self.rows).collect();
            Counter::new(self.seed, Purpose::Shuffle, pass.into(), 0).shuffle(&mut rows);
            self.shuffled = Some((pass, rows));
        }
        match &self.shuffled {
            Some((_, rows)) => rows[start as usize..end as usize].to_vec(),
            None => Vec::new(),
        }
    }
}

/// A shard that the training has read; listed in each checkpoint's manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Consumed {
    pub shard: u32,
    pub epoch: u64,
    pub sha256: String,
    pub rows: u64,
}

/// Training rows, fetched as far as they were asked for.
pub struct TrainingData {
    stream: ShardStream,
    spill: Spill,
    order: Order,
    vocab_size: u32,
    /// Of the soft targets, where it is not 1; and which of the shards' it is.
    temperature: Option<(usize, f64)>,
    weights: RowWeights,
    consumed: Vec<Consumed>,
}

impl TrainingData {
    /// Spills into `folder`.
    pub fn new(
        stream: ShardStream,
        order: Order,
        vocab_size: u32,
        temperature: Option<(usize, f64)>,
        weights: RowWeights,
        folder: &Path,
    ) -> Result<Self> {
        let spill = Spill::create(folder)?;
        Ok(Self { stream, spill, order, vocab_size, temperature, weights, consumed: Vec::new() })
    }

    /// Rows of the step with this index; waits until the teacher has published them all.
    pub async fn rows_of(&mut self, step: u32) -> Result<Vec<Example>> {
        let rows = self.order.rows_of(step);
        let needed = rows.iter().max().map_or(0, |&row| row + 1);
        while self.spill.len() < needed {
            let Some(fetched) = self.stream.next().await? else {
                return Err(Error::new(
                    Code::Internal,
                    format!(
                        "the published shards hold {} training rows, the plan counts {}",
                        self.spill.len(),
                        self.order.rows
                    ),
                ));
            };
            self.keep(fetched).await?;
        }
        let read = self.spill.reader(&rows)?;
        let read = tokio::task::spawn_blocking(read).await;
        read.map_err(|error| Error::internal(format!("reading rows failed: {error}")))?
    }

    /// Shards read so far, in order.
    pub fn consumed(&self) -> &[Consumed] {
        &self.consumed
    }

    async fn keep(&mut self, mut fetched: Fetched) -> Result<()> {
        let before = self.spill.len();
        while let Some(rows) = fetched.next_rows().await? {
            for sequence in rows {
                let line = sequence.row;
                let example = Example::from_sequence(sequence, self.vocab_size, self.temperature)?;
                let example = self.weights.weigh(line, example).await?;
                // A few megabytes into the page cache: short enough for this thread.
                self.spill.append(&[example])?;
            }
        }
        let published = fetched.published;
        self.consumed.push(Consumed {
            shard: published.shard,
            epoch: published.epoch,
            sha256: published.sha256,
            rows: self.spill.len() - before,
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_pass_follows_the_shards_and_every_pass_reads_every_row_once() {
        let mut order = Order::new(7, 21, 4);
        assert_eq!(order.steps_per_pass(), 6);
        let first: Vec<u64> = (0..6).flat_map(|step| order.rows_of(step)).collect();
        assert_eq!(first, (0..21).collect::<Vec<_>>());
        assert_eq!(order.rows_of(5), [20]);
        let mut passes = Vec::new();
        for pass in 1..4 {
            let rows: Vec<u64> = (6 * pass..6 * pass + 6).flat_map(|step| order.rows_of(step)).collect();
            let mut sorted = rows.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, first);
            assert_ne!(rows, first);
            passes.push(rows);
        }
        assert_ne!(passes[0], passes[1]);
    }

    #[test]
    fn a_step_has_its_rows_whoever_asks_and_in_which_order() {
        let mut straight = Order::new(7, 21, 4);
        let all: Vec<_> = (0..18).map(|step| straight.rows_of(step)).collect();
        for step in [17, 3, 8, 7, 12] {
            assert_eq!(Order::new(7, 21, 4).rows_of(step), all[step as usize]);
            assert_eq!(straight.rows_of(step), all[step as usize]);
        }
        assert_ne!(Order::new(8, 21, 4).rows_of(8), all[8]);
        assert!(Order::new(1, 0, 4).rows_of(0).is_empty());
    }
}
