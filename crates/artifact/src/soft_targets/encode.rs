//! From a teacher's raw distributions to the bytes of a shard.

use std::sync::Arc;

use arrow_array::{
    ArrayRef, BooleanArray, Float32Array, ListArray, RecordBatch, StringArray, UInt8Array, UInt16Array, UInt32Array,
    UInt64Array,
};
use arrow_buffer::OffsetBuffer;
use bytes::Bytes;
use parquet::{
    arrow::{ArrowWriter, arrow_writer::ArrowWriterOptions},
    file::metadata::KeyValue,
};
use retort_core::{Code, Error, Result};

use super::{
    Encoded, Header, Limits, Position, Sequence, decode, fidelity, guard, quantise,
    schema::{self, CONTENT_KEY},
};
use crate::sha256_hex;

/// Mass that may be left to no tail entry, and the most that rounding may add to a whole.
pub(super) const MASS_TOLERANCE: f64 = 1e-3;

/// Writes a shard, reads it back and measures what storing cost.
///
/// The same header and sequences give the same bytes. A distribution that cannot be one (not
/// finite, masses above 1, an id twice, a target without distribution) is
/// [`Code::ShardUnfaithful`], naming row and position.
pub fn encode(header: &Header, sequences: &[Sequence]) -> Result<Encoded> {
    header.check().map_err(|why| Error::internal(format!("the shard's header cannot be written: {why}")))?;
    let mut columns = Columns::default();
    for sequence in sequences {
        columns.push(header, sequence)?;
    }
    let target_tokens = columns.max_logprob.len() as u64;
    let bytes = write(header, columns.into_batch()?)
        .map_err(|error| Error::with_source(Code::Internal, "the shard could not be written as parquet", error))?;
    let shard = decode(bytes.clone(), Limits::for_own_bytes()).map_err(|error| {
        let message = format!("the shard cannot be read back after writing: {}", error.chain());
        Error::with_source(Code::ShardUnfaithful, message, error)
    })?;
    let fidelity = fidelity::measure(sequences, &shard)?;
    Ok(Encoded { sha256: sha256_hex(&bytes), bytes, rows: sequences.len() as u64, target_tokens, fidelity })
}

impl Limits {
    /// For bytes that this process has just made from what is in its memory already.
    fn for_own_bytes() -> Self {
        Self { max_bytes: u64::MAX, max_rows: u64::MAX, max_tokens_per_row: u64::MAX, max_entries: u64::MAX }
    }
}

/// The file's columns; lists are flat, with where each row ends.
#[derive(Default)]
struct Columns {
    row_id: Vec<String>,
    row: Vec<u64>,
    tags: Vec<String>,
    tags_end: Vec<usize>,
    token_ids: Vec<u32>,
    target_mask: Vec<bool>,
    tokens_end: Vec<usize>,
    finish_reason: Vec<String>,
    support_size: Vec<u16>,
    max_logprob: Vec<f32>,
    tail_mass: Vec<f32>,
    label_logprob: Vec<f32>,
    positions_end: Vec<usize>,
    support_delta: Vec<u32>,
    count: Vec<u8>,
    logprob_q: Vec<u8>,
    entries_end: Vec<usize>,
}

impl Columns {
    fn push(&mut self, header: &Header, sequence: &Sequence) -> Result<()> {
        let fail = |why: String| unfaithful(&sequence.row_id, &why);
        if sequence.token_ids.len() != sequence.target_mask.len() {
            let (tokens, mask) = (sequence.token_ids.len(), sequence.target_mask.len());
            return Err(fail(format!("{tokens} tokens have a target mask of {mask}")));
        }
        let targets = sequence.target_mask.iter().filter(|&&target| target).count();
        if targets != sequence.positions.len() {
            return Err(fail(format!("{targets} targets have {} distributions", sequence.positions.len())));
        }
        if sequence.target_mask.first() == Some(&true) {
            return Err(fail("the first token is marked as a target, but nothing precedes it".to_owned()));
        }
        if let Some(id) = sequence.token_ids.iter().find(|&&id| id >= header.vocab_size) {
            return Err(fail(format!("token {id} is outside the vocabulary of {}", header.vocab_size)));
        }
        self.row_id.push(sequence.row_id.clone());
        self.row.push(sequence.row);
        self.tags.extend_from_slice(&sequence.tags);
        self.tags_end.push(self.tags.len());
        self.token_ids.extend_from_slice(&sequence.token_ids);
        self.target_mask.extend_from_slice(&sequence.target_mask);
        self.tokens_end.push(self.token_ids.len());
        self.finish_reason.push(sequence.finish_reason.clone());
        for (p, position) in sequence.positions.iter().enumerate() {
            self.push_position(header, position).map_err(|why| fail(format!("position {p}: {why}")))?;
        }
        self.positions_end.push(self.max_logprob.len());
        self.entries_end.push(self.support_delta.len());
        Ok(())
    }

    fn push_position(&mut self, header: &Header, position: &Position) -> Result<(), String> {
        let (top_id, max) = top(&position.head).ok_or("the head is empty")?;
        if position.head.len() > header.head as usize {
            return Err(format!("the head has {} entries, the header says {}", position.head.len(), header.head));
        }
        let tail_mass = tail_mass(header, position)?;
        check_logprob("the label's log-probability", position.label_logprob)?;

        let head = position.head.iter().map(|&(id, logprob)| (id, 0u8, logprob));
        let mut entries: Vec<(u32, u8, f32)> = head.chain(position.tail.iter().copied()).collect();
        entries.sort_unstable_by_key(|&(id, ..)| id);
        let mut before = None;
        for &(id, count, logprob) in &entries {
            check_logprob("a log-probability", logprob)?;
            if id >= header.vocab_size {
                return Err(format!("token {id} is outside the vocabulary of {}", header.vocab_size));
            }
            if before == Some(id) {
                return Err(format!("token {id} is in the support twice"));
            }
            if f64::from(logprob) > f64::from(max) + MASS_TOLERANCE {
                return Err(format!("tail token {id} is likelier ({logprob}) than the head's best ({max})"));
            }
            self.support_delta.push(id - before.unwrap_or(0));
            self.count.push(count);
            self.logprob_q.push(if id == top_id { 0 } else { quantise::quantise(max, logprob) });
            before = Some(id);
        }
        self.support_size.push(entries.len() as u16); // at most MAX_HEAD + MAX_DRAWS = 1279
        self.max_logprob.push(max);
        self.tail_mass.push(tail_mass);
        self.label_logprob.push(position.label_logprob);
        Ok(())
    }

    fn into_batch(self) -> Result<RecordBatch> {
        let tags = StringArray::from_iter_values(&self.tags);
        let arrays: Vec<ArrayRef> = vec![
            Arc::new(StringArray::from_iter_values(&self.row_id)),
            Arc::new(UInt64Array::from(self.row)),
            list(&self.tags_end, Arc::new(tags))?,
            list(&self.tokens_end, Arc::new(UInt32Array::from(self.token_ids)))?,
            list(&self.tokens_end, Arc::new(BooleanArray::from(self.target_mask)))?,
            Arc::new(StringArray::from_iter_values(&self.finish_reason)),
            list(&self.positions_end, Arc::new(UInt16Array::from(self.support_size)))?,
            list(&self.entries_end, Arc::new(UInt32Array::from(self.support_delta)))?,
            list(&self.entries_end, Arc::new(UInt8Array::from(self.count)))?,
            list(&self.entries_end, Arc::new(UInt8Array::from(self.logprob_q)))?,
            list(&self.positions_end, Arc::new(Float32Array::from(self.max_logprob)))?,
            list(&self.positions_end, Arc::new(Float32Array::from(self.tail_mass)))?,
            list(&self.positions_end, Arc::new(Float32Array::from(self.label_logprob)))?,
        ];
        RecordBatch::try_new(schema::schema(), arrays)
            .map_err(|error| Error::with_source(Code::Internal, "the shard's columns do not fit its schema", error))
    }
}

/// The likeliest entry; of equals the smallest id, so that it does not depend on their order.
pub(super) fn top(head: &[(u32, f32)]) -> Option<(u32, f32)> {
    head.iter().copied().reduce(|best, entry| {
        let better = entry.1 > best.1 || (entry.1 == best.1 && entry.0 < best.0);
        if better { entry } else { best }
    })
}

/// True mass of the head, in double precision.
pub(super) fn head_mass(position: &Position) -> f64 {
    position.head.iter().map(|&(_, logprob)| f64::from(logprob).exp()).sum()
}

fn tail_mass(header: &Header, position: &Position) -> Result<f32, String> {
    let head = head_mass(position);
    if !head.is_finite() || head > 1.0 + MASS_TOLERANCE {
        return Err(format!("the head's mass is {head:.6}"));
    }
    let tail_mass = (1.0 - head).clamp(0.0, 1.0);
    let drawn: u32 = position.tail.iter().map(|&(_, count, _)| u32::from(count)).sum();
    if position.tail.iter().any(|&(_, count, _)| count == 0) {
        return Err("a tail entry was drawn 0 times".to_owned());
    }
    if position.tail.is_empty() {
        if header.draws > 0 && tail_mass > MASS_TOLERANCE {
            return Err(format!("the tail has mass {tail_mass:.6} and no draws"));
        }
    } else if drawn != header.draws {
        return Err(format!("the tail has {drawn} draws, the header says {}", header.draws));
    }
    Ok(tail_mass as f32)
}

fn check_logprob(what: &str, logprob: f32) -> Result<(), String> {
    if logprob.is_finite() && f64::from(logprob) <= MASS_TOLERANCE {
        Ok(())
    } else {
        Err(format!("{what} is {logprob}; the teacher's output cannot be trusted"))
    }
}

fn list(ends: &[usize], values: ArrayRef) -> Result<ArrayRef> {
    let mut offsets = Vec::with_capacity(ends.len() + 1);
    offsets.push(0i32);
    for &end in ends {
        let end = i32::try_from(end).map_err(|_| {
            Error::new(
                Code::ObjectTooLarge,
                format!("the shard has {end} values in one column, at most {} fit; use fewer rows a shard", i32::MAX),
            )
        })?;
        offsets.push(end);
    }
    let field = schema::element(values.data_type().clone());
    let list = ListArray::try_new(field, OffsetBuffer::new(offsets.into()), values, None)
        .map_err(|error| Error::with_source(Code::Internal, "a list column of the shard is malformed", error))?;
    Ok(Arc::new(list))
}

fn write(header: &Header, batch: RecordBatch) -> Result<Bytes, Box<dyn std::error::Error + Send + Sync>> {
    let options =
        ArrowWriterOptions::new().with_properties(schema::writer_properties()?).with_skip_arrow_metadata(true);
    let mut writer = ArrowWriter::try_new_with_options(Vec::new(), batch.schema(), options)?;
    writer.write(&batch)?;
    writer.flush()?;
    writer.sync()?;
    let content = guard::content_sha256(writer.inner(), header);
    for (key, value) in header.pairs() {
        writer.append_key_value_metadata(KeyValue::new(key.to_owned(), value));
    }
    writer.append_key_value_metadata(KeyValue::new(CONTENT_KEY.to_owned(), content));
    Ok(Bytes::from(writer.into_inner()?))
}

fn unfaithful(row_id: &str, why: &str) -> Error {
    let row_id: String = row_id.chars().take(80).collect();
    Error::new(Code::ShardUnfaithful, format!("row {row_id:?}: {why}"))
}
