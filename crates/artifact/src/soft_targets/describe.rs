//! A shard at a glance, as data for whoever prints it.

use arrow_array::{cast::AsArray, types::Float32Type};
use parquet::file::reader::Length as _;
use retort_core::Result;
use serde::{Deserialize, Serialize};

use super::{Header, Limits, Reader, Source, decode, guard, schema::TAIL_MASS, v1};

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

/// Reads a whole shard, a row group at a time, and sums it up, with its first `sequences` rows.
///
/// Errors as [`decode`](super::decode()) does.
pub fn describe(source: impl Into<Source>, limits: Limits, sequences: usize) -> Result<Description> {
    let source = source.into();
    let mut reader = Reader::open(source.clone(), limits)?;
    let header = reader.header().clone();
    let mut sums = Sums::default();
    let mut first = Vec::new();
    while let Some(batch) = reader.next_batch() {
        let batch = batch?;
        let tail_mass = batch.column(if header.schema_version == 1 { v1::TAIL_MASS_COLUMN } else { TAIL_MASS });
        let tail_mass = tail_mass.as_list::<i32>().values().as_primitive::<Float32Type>().values();
        sums.tail_mass += tail_mass.iter().map(|&mass| f64::from(mass)).sum::<f64>();
        for sequence in decode::assemble(&header, &batch, &limits)? {
            sums.rows += 1;
            sums.tokens += sequence.token_ids.len() as u64;
            sums.targets += sequence.targets.len() as u64;
            sums.entries += sequence.targets.ids.len() as u64;
            sums.logprobs += sequence.targets.label_logprobs.iter().map(|&logprob| f64::from(logprob)).sum::<f64>();
            if first.len() < sequences {
                first.push(summary(&sequence));
            }
        }
    }
    let per_token = |total: f64| if sums.targets == 0 { 0.0 } else { total / sums.targets as f64 };
    Ok(Description {
        sha256: source.sha256()?,
        bytes: source.len(),
        rows: sums.rows,
        tokens: sums.tokens,
        target_tokens: sums.targets,
        bytes_per_token: per_token(source.len() as f64),
        mean_support: per_token(sums.entries as f64),
        mean_tail_mass: per_token(sums.tail_mass),
        teacher_perplexity: if sums.targets == 0 { 0.0 } else { (-per_token(sums.logprobs)).exp() },
        columns: columns(&reader),
        sequences: first,
        header,
    })
}

#[derive(Default)]
struct Sums {
    rows: u64,
    tokens: u64,
    targets: u64,
    entries: u64,
    tail_mass: f64,
    logprobs: f64,
}

fn columns(reader: &Reader) -> Vec<Column> {
    let groups = reader.opened().metadata.row_groups();
    let column = |(index, column): (usize, &super::schema::Column)| {
        let chunks = || groups.iter().filter_map(|group| group.columns().get(index));
        Column {
            name: column.name.to_owned(),
            encoding: column.encoding.to_string(),
            bytes: chunks().map(|chunk| chunk.compressed_size().max(0) as u64).sum(),
            uncompressed_bytes: chunks().map(|chunk| chunk.uncompressed_size().max(0) as u64).sum(),
        }
    };
    guard::columns(reader.header()).iter().enumerate().map(column).collect()
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
