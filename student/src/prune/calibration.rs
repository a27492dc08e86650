//! The rows on which a teacher's heads and channels are weighed before it is pruned: the first of the first
//! training shards, so that every attempt takes the same and makes the same weights.

use retort_core::Result;

use crate::{example::Example, shards::ShardStream};

/// Token ids of the first `rows` rows, prompt and completion, waited for until they are published; fewer where
/// the split has no more. `stream` stands at the split's first shard.
pub async fn texts(mut stream: ShardStream, rows: usize, vocab_size: u32) -> Result<Vec<Vec<u32>>> {
    let mut texts = Vec::new();
    while texts.len() < rows {
        let Some(mut fetched) = stream.next().await? else { break };
        while let Some(sequences) = fetched.next_rows().await? {
            for sequence in sequences.into_iter().take(rows - texts.len()) {
                texts.push(Example::from_sequence(sequence, vocab_size, None)?.token_ids);
            }
        }
    }
    Ok(texts)
}
