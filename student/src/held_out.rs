//! The small part of the held-out rows that is measured at each checkpoint.

use retort_core::Result;

use crate::{example::Example, shards::ShardStream};

/// Target tokens measured at a checkpoint; enough to see a trend, few enough to cost little. The
/// evaluation after training measures all rows.
const MAX_TARGETS: usize = 2048;

/// Grows until it has enough, then stays as it is, so that later figures compare.
pub struct HeldOutSample {
    stream: ShardStream,
    vocab_size: u32,
    examples: Vec<Example>,
    targets: usize,
}

impl HeldOutSample {
    pub fn new(stream: ShardStream, vocab_size: u32) -> Self {
        Self { stream, vocab_size, examples: Vec::new(), targets: 0 }
    }

    /// Rows of the shards published by now; none before the first. Waits for nothing.
    pub async fn rows(&mut self) -> Result<&[Example]> {
        while self.targets < MAX_TARGETS {
            let Some(mut fetched) = self.stream.try_next().await? else { break };
            while let Some(rows) = fetched.next_rows().await? {
                for sequence in rows {
                    if self.targets >= MAX_TARGETS {
                        return Ok(&self.examples);
                    }
                    let example = Example::from_sequence(sequence, self.vocab_size, None)?;
                    self.targets += example.targets.len();
                    self.examples.push(example);
                }
            }
        }
        Ok(&self.examples)
    }
}
