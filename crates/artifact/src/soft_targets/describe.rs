//! A shard at a glance, as data for whoever prints it.

use arrow_array::{cast::AsArray, types::Float32Type};
use bytes::Bytes;
use retort_core::Result;
use serde::{Deserialize, Serialize};

use super::{
    Header, Limits, decode, guard,
    schema::{COLUMNS, TAIL_MASS},
};
use crate::sha256_hex;

/// What a shard holds and what it costs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Description {
    pub header: Header,
    /// Of the file.
    pub sha256: String,
    pub bytes: u64,
    pub rows: u64,
    /// Prompt and completion tokens.
    pub tokens: u64,
    /// Tokens that carry a distribution.
    pub target_tokens: u64,
    /// The file's bytes for each target token; 0 in a shard without any.
    pub bytes_per_token: f64,
    /// Mean number of tokens in a position's support.
    pub mean_support: f64,
    /// Mean probability outside the exact head.
    pub mean_tail_mass: f64,
    /// Of the teacher on the completions: exp of the mean negative log-probability.
    pub teacher_perplexity: f64,
    /// In file order.
    pub columns: Vec<Column>,
    /// The first ones, as many as were asked for.
    pub sequences: Vec<SequenceSummary>,
}

/// What one column takes in the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Column {
    pub name: String,
    /// Such as `BYTE_STREAM_SPLIT`.
    pub encoding: String,
    /// As stored.
    pub bytes: u64,
    pub uncompressed_bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SequenceSummary {
    pub row_id: String,
    /// Line in the prompt set, from 0.
    pub row: u64,
    pub tags: Vec<String>,
    pub finish_reason: String,
    pub token_ids: Vec<u32>,
    pub target_tokens: u64,
    /// exp of the mean negative log-probability of the sequence's targets; 0 without any.
    pub teacher_perplexity: f64,
}

/// Reads a whole shard and sums it up, with its first `sequences` rows.
///
/// Errors as [`decode`] does.
pub fn describe(bytes: Bytes, limits: Limits, sequences: usize) -> Result<Description> {
    let opened = guard::open(&bytes, &limits)?;
    let mut tail_mass = 0.0f64;
    for batch in decode::read(&bytes, &opened)? {
        let values = batch.column(TAIL_MASS).as_list::<i32>().values().as_primitive::<Float32Type>().clone();
        tail_mass += values.values().iter().map(|&mass| f64::from(mass)).sum::<f64>();
    }
    let columns = COLUMNS
        .iter()
        .enumerate()
        .map(|(index, column)| {
            let chunks = || opened.metadata.row_groups().iter().filter_map(|group| group.columns().get(index));
            Column {
                name: column.name.to_owned(),
                encoding: column.encoding.to_string(),
                bytes: chunks().map(|chunk| chunk.compressed_size().max(0) as u64).sum(),
                uncompressed_bytes: chunks().map(|chunk| chunk.uncompressed_size().max(0) as u64).sum(),
            }
        })
        .collect();
    let sha256 = sha256_hex(&bytes);
    let size = bytes.len() as u64;
    let shard = decode(bytes, limits)?;
    let target_tokens = shard.target_tokens();
    let per_token = |total: f64| if target_tokens == 0 { 0.0 } else { total / target_tokens as f64 };
    let entries: u64 = shard.sequences.iter().map(|sequence| sequence.targets.ids.len() as u64).sum();
    let label_logprobs: f64 =
        shard.sequences.iter().flat_map(|s| &s.targets.label_logprobs).map(|&logprob| f64::from(logprob)).sum();
    Ok(Description {
        sha256,
        bytes: size,
        rows: shard.sequences.len() as u64,
        tokens: shard.sequences.iter().map(|sequence| sequence.token_ids.len() as u64).sum(),
        target_tokens,
        bytes_per_token: per_token(size as f64),
        mean_support: per_token(entries as f64),
        mean_tail_mass: per_token(tail_mass),
        teacher_perplexity: if target_tokens == 0 { 0.0 } else { (-per_token(label_logprobs)).exp() },
        columns,
        sequences: shard.sequences.iter().take(sequences).map(summary).collect(),
        header: shard.header,
    })
}

fn summary(sequence: &super::DecodedSequence) -> SequenceSummary {
    let labels = &sequence.targets.label_logprobs;
    let total: f64 = labels.iter().map(|&logprob| f64::from(logprob)).sum();
    SequenceSummary {
        row_id: sequence.row_id.clone(),
        row: sequence.row,
        tags: sequence.tags.clone(),
        finish_reason: sequence.finish_reason.clone(),
        token_ids: sequence.token_ids.clone(),
        target_tokens: labels.len() as u64,
        teacher_perplexity: if labels.is_empty() { 0.0 } else { (-total / labels.len() as f64).exp() },
    }
}
