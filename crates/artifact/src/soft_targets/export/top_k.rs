//! Top-k lists in Parquet: for every token the teacher's most likely next tokens and their
//! log-probabilities, in columns that any reader of Parquet knows what to do with.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use arrow_array::{
    RecordBatch,
    builder::{Float32Builder, Int32Builder, ListBuilder, StringBuilder, UInt64Builder},
};
use arrow_schema::{DataType, Field, Schema, SchemaRef};
use parquet::{
    arrow::ArrowWriter,
    basic::{Compression, ZstdLevel},
    errors::ParquetError,
    file::{metadata::KeyValue, properties::WriterProperties},
};
use retort_core::{Code, Error, Result};

use super::Origin;
use crate::soft_targets::{DecodedSequence, Header, SparseTargets, schema::element};

/// What a trainer's loss passes over.
const NO_LABEL: i32 = -100;
const ZSTD_LEVEL: i32 = 3;
/// Values gathered before they are handed to the encoder.
const BATCH_VALUES: usize = 1 << 20;
/// Encoded bytes a row group takes at most, and so what a reader must hold.
const ROW_GROUP_BYTES: usize = 64 << 20;

/// Writes rows as they come, in row groups of at most some 64 MiB.
#[derive(Debug)]
pub struct TopKWriter<W: Write + Send> {
    writer: ArrowWriter<W>,
    path: PathBuf,
    k: Option<usize>,
    /// Of what was pushed.
    origin: Option<Origin>,
    columns: Columns,
}

impl<W: Write + Send> TopKWriter<W> {
    /// `path` names `to` in errors. Of each position the `k` most likely tokens are written, or
    /// the whole head where that has fewer or no `k` is given.
    pub fn new(path: &Path, to: W, k: Option<usize>) -> Result<Self> {
        let level = ZstdLevel::try_new(ZSTD_LEVEL).map_err(|error| Error::internal(format!("zstd level: {error}")))?;
        let properties = WriterProperties::builder().set_compression(Compression::ZSTD(level)).build();
        let writer =
            ArrowWriter::try_new(to, schema(), Some(properties)).map_err(|error| Error::io(path, cause(error)))?;
        Ok(Self { writer, path: path.to_owned(), k, origin: None, columns: Columns::default() })
    }

    /// Writes one sequence of a shard with this header.
    ///
    /// Errors: `TokenizerMismatch` where the shard is of another origin than those before it,
    /// `ObjectTooLarge` for a vocabulary whose ids do not fit 32 bits with a sign.
    pub fn push(&mut self, header: &Header, sequence: &DecodedSequence) -> Result<()> {
        let codec = header.soft_targets.codec;
        if codec.max_head(header.vocab_size) == 0 {
            let message =
                format!("a shard of the codec {} has no head to export as top-k; use jsonl or npz", codec.name());
            return Err(Error::new(Code::RequestInvalid, message));
        }
        match &self.origin {
            Some(origin) => origin.check(header)?,
            None if i32::try_from(header.vocab_size).is_ok() => self.origin = Some(Origin::of(header)),
            None => {
                let message =
                    format!("a vocabulary of {} does not fit the 32-bit ids of a top-k export", header.vocab_size);
                return Err(Error::new(Code::ObjectTooLarge, message));
            }
        }
        self.columns.push(sequence, self.k.unwrap_or(usize::MAX));
        if self.columns.values >= BATCH_VALUES { self.write() } else { Ok(()) }
    }

    /// Ends the file; it is worth nothing before.
    pub fn finish(mut self) -> Result<()> {
        self.write()?;
        let mut metadata = vec![("retort.export", "top-k".to_owned())];
        metadata.extend(self.k.map(|k| ("retort.k", k.to_string())));
        metadata.extend(self.origin.iter().flat_map(Origin::pairs));
        for (key, value) in metadata {
            self.writer.append_key_value_metadata(KeyValue::new(key.to_owned(), value));
        }
        // Parquet's `into_inner` would keep only the words of an I/O error.
        self.writer.finish().map(drop).map_err(|error| Error::io(&self.path, cause(error)))
    }

    fn write(&mut self) -> Result<()> {
        let batch = self.columns.take()?;
        let io = |error| Error::io(&self.path, cause(error));
        self.writer.write(&batch).map_err(io)?;
        if self.writer.in_progress_size() >= ROW_GROUP_BYTES { self.writer.flush().map_err(io) } else { Ok(()) }
    }
}

/// The head of position `p`: at most `k` of its `(id, log-probability)`, the most likely first and the
/// others falling, of equals the smaller id first.
fn head(targets: &SparseTargets, p: usize, k: usize) -> Vec<(u32, f32)> {
    let range = targets.range(p);
    let mut head: Vec<(u32, f32)> =
        range.filter(|&e| targets.heads[e]).map(|e| (targets.ids[e], targets.logprobs[e])).collect();
    let top = targets.top_ids[p];
    head.sort_by(|a, b| (b.0 == top).cmp(&(a.0 == top)).then(b.1.total_cmp(&a.1)).then(a.0.cmp(&b.0)));
    head.truncate(k);
    head
}

#[derive(Debug)]
struct Columns {
    row_id: StringBuilder,
    row: UInt64Builder,
    tags: ListBuilder<StringBuilder>,
    input_ids: ListBuilder<Int32Builder>,
    labels: ListBuilder<Int32Builder>,
    top_indices: ListBuilder<ListBuilder<Int32Builder>>,
    top_values: ListBuilder<ListBuilder<Float32Builder>>,
    /// Tokens and entries since the last batch.
    values: usize,
}

impl Default for Columns {
    fn default() -> Self {
        let int32 = || ListBuilder::new(Int32Builder::new()).with_field(element(DataType::Int32));
        let float32 = ListBuilder::new(Float32Builder::new()).with_field(element(DataType::Float32));
        Self {
            row_id: StringBuilder::new(),
            row: UInt64Builder::new(),
            tags: ListBuilder::new(StringBuilder::new()).with_field(element(DataType::Utf8)),
            input_ids: int32(),
            labels: int32(),
            top_indices: ListBuilder::new(int32()).with_field(element(list(DataType::Int32))),
            top_values: ListBuilder::new(float32).with_field(element(list(DataType::Float32))),
            values: 0,
        }
    }
}

impl Columns {
    /// Ids fit: they lie below the vocabulary's size, which was checked.
    fn push(&mut self, sequence: &DecodedSequence, k: usize) {
        let (tokens, mask) = (&sequence.token_ids, &sequence.target_mask);
        self.row_id.append_value(&sequence.row_id);
        self.row.append_value(sequence.row);
        sequence.tags.iter().for_each(|tag| self.tags.values().append_value(tag));
        self.tags.append(true);
        let label = |(&id, &target): (&u32, &bool)| Some(if target { id as i32 } else { NO_LABEL });
        self.input_ids.values().extend(tokens.iter().map(|&id| Some(id as i32)));
        self.input_ids.append(true);
        self.labels.values().extend(tokens.iter().zip(mask).map(label));
        self.labels.append(true);
        self.values += tokens.len();
        // The output at a token predicts the next one; nothing follows the last.
        let mut p = 0;
        for i in 0..tokens.len() {
            if mask.get(i + 1) == Some(&true) {
                for (id, logprob) in head(&sequence.targets, p, k) {
                    self.top_indices.values().values().append_value(id as i32);
                    self.top_values.values().values().append_value(logprob);
                    self.values += 1;
                }
                p += 1;
            }
            self.top_indices.values().append(true);
            self.top_values.values().append(true);
        }
        self.top_indices.append(true);
        self.top_values.append(true);
    }

    /// What was pushed; nothing is left.
    fn take(&mut self) -> Result<RecordBatch> {
        self.values = 0;
        RecordBatch::try_new(
            schema(),
            vec![
                Arc::new(self.row_id.finish()),
                Arc::new(self.row.finish()),
                Arc::new(self.tags.finish()),
                Arc::new(self.input_ids.finish()),
                Arc::new(self.labels.finish()),
                Arc::new(self.top_indices.finish()),
                Arc::new(self.top_values.finish()),
            ],
        )
        .map_err(|error| Error::with_source(Code::Internal, "the export's columns do not fit its schema", error))
    }
}

fn schema() -> SchemaRef {
    let column = |name: &str, data_type| Field::new(name, data_type, false);
    Arc::new(Schema::new(vec![
        column("row_id", DataType::Utf8),
        column("row", DataType::UInt64),
        column("tags", list(DataType::Utf8)),
        column("input_ids", list(DataType::Int32)),
        column("labels", list(DataType::Int32)),
        column("top_indices", list(list(DataType::Int32))),
        column("top_values", list(list(DataType::Float32))),
    ]))
}

fn list(data_type: DataType) -> DataType {
    DataType::List(element(data_type))
}

/// The IO error under a writer's, so that a full disk is told as one.
fn cause(error: ParquetError) -> io::Error {
    match error {
        ParquetError::External(source) => source.downcast::<io::Error>().map_or_else(io::Error::other, |io| *io),
        other => io::Error::other(other),
    }
}
