//! One row group's columns, filled position by position and checked on the way.

use std::sync::Arc;

use arrow_array::{
    ArrayRef, BooleanArray, Float32Array, ListArray, RecordBatch, StringArray, UInt8Array, UInt32Array, UInt64Array,
};
use arrow_buffer::OffsetBuffer;
use retort_core::{
    Code, Error, Result,
    spec::{Codec, Quantiser},
};

use super::{MASS_TOLERANCE, head_mass, tail_mass, top, unfaithful};
use crate::soft_targets::{
    Header, Position, Sequence, TailLogprobs,
    decode::has_counts,
    id_table::IdTable,
    quantise::{coarse, coarse_share, quantise},
    schema,
};

/// Lists are flat, with where each row ends; ids are not yet ranks.
#[derive(Default)]
pub(super) struct Columns {
    row_id: Vec<String>,
    row: Vec<u64>,
    tags: Vec<String>,
    tags_end: Vec<usize>,
    token_ids: Vec<u32>,
    target_mask: Vec<bool>,
    tokens_end: Vec<usize>,
    finish_reason: Vec<String>,
    head_size: Vec<u32>,
    /// Id, byte and log-probability of each entry.
    head: Vec<(u32, u8, f32)>,
    heads_end: Vec<usize>,
    tail_size: Vec<u32>,
    /// Id, count and byte of each entry.
    tail: Vec<(u32, u8, u8)>,
    tails_end: Vec<usize>,
    max_logprob: Vec<f32>,
    tail_mass: Vec<f32>,
    label_logprob: Vec<f32>,
    positions_end: Vec<usize>,
    log_sum_exp: Vec<f32>,
    log_sum_exps_end: Vec<usize>,
}

impl Columns {
    pub(super) fn push(&mut self, header: &Header, sequence: &Sequence) -> Result<()> {
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
        self.heads_end.push(self.head.len());
        self.tails_end.push(self.tail.len());
        self.log_sum_exps_end.push(self.log_sum_exp.len());
        Ok(())
    }

    fn push_position(&mut self, header: &Header, position: &Position) -> Result<(), String> {
        let codec = header.soft_targets.codec;
        check_support(header, position)?;
        check_logprob("the label's log-probability", position.label_logprob)?;
        let mass = head_mass(position);
        if !mass.is_finite() || mass > 1.0 + MASS_TOLERANCE {
            return Err(format!("the head's mass is {mass:.6}"));
        }
        let mass = (1.0 - mass).clamp(0.0, 1.0);
        let drawn: u32 = position.tail.iter().map(|&(_, count, _)| u32::from(count)).sum();
        if tail_mass(codec, drawn, mass, MASS_TOLERANCE).is_none() {
            return Err(format!("the tail has mass {mass:.6} and {drawn} draws, which {} cannot have", codec.name()));
        }
        let (temperatures, found) = (header.soft_targets.temperatures.len(), position.log_sum_exps.len());
        if temperatures != found || position.log_sum_exps.iter().any(|value| !value.is_finite()) {
            return Err(format!("{temperatures} temperatures have log-sum-exps {:?}", position.log_sum_exps));
        }

        // Without a head, what was drawn is measured from the likeliest of it.
        let drawn_max = || position.tail.iter().map(|entry| entry.2).fold(f32::NEG_INFINITY, f32::max);
        let (top_id, max) = top(&position.head).unwrap_or_else(|| (u32::MAX, drawn_max()));
        self.head_size.push(position.head.len() as u32);
        self.head.extend(position.head.iter().map(|&(id, logprob)| {
            let q = if id == top_id { 0 } else { quantise(max, logprob) };
            (id, q, logprob)
        }));
        self.tail_size.push(position.tail.len() as u32);
        self.tail.extend(position.tail.iter().map(|&(id, count, logprob)| (id, count, quantise(max, logprob))));
        self.max_logprob.push(coarse(max));
        self.tail_mass.push(coarse_share(mass));
        self.label_logprob.push(coarse(position.label_logprob));
        self.log_sum_exp.extend_from_slice(&position.log_sum_exps);
        Ok(())
    }

    pub(super) fn into_batch(mut self, header: &Header) -> Result<RecordBatch> {
        let table = match header.soft_targets.codec {
            // Every token in every support: there is nothing to bring together.
            Codec::Full => IdTable::default(),
            _ => {
                let ids = self.head.iter().map(|entry| &entry.0).chain(self.tail.iter().map(|entry| &entry.0));
                IdTable::frequent(ids, header.vocab_size)
            }
        };
        let rank = |id: u32| u32::try_from(table.rank(id)).unwrap_or(u32::MAX);
        self.head.iter_mut().for_each(|entry| entry.0 = rank(entry.0));
        self.tail.iter_mut().for_each(|entry| entry.0 = rank(entry.0));
        let head_delta = sort_and_difference(&mut self.head, &self.head_size, |entry| entry.0);
        let tail_delta = sort_and_difference(&mut self.tail, &self.tail_size, |entry| entry.0);

        // The row group's first row carries the table.
        let table_end = vec![table.ids().len(); self.row.len()];
        let none = vec![0; self.row.len()];
        let heads_if = |wanted: bool| if wanted { &self.heads_end } else { &none };
        let tails_if = |wanted: bool| if wanted { &self.tails_end } else { &none };
        let bytes = header.soft_targets.quantiser == Quantiser::U8;
        let counts = has_counts(header.soft_targets.codec);
        let stored = header.tail_logprobs == TailLogprobs::Stored;
        let u8s = |wanted: bool, values: Vec<u8>| Arc::new(UInt8Array::from(if wanted { values } else { vec![] }));
        let head_q = u8s(bytes, self.head.iter().map(|entry| entry.1).collect());
        let head_logprob = if bytes { vec![] } else { self.head.iter().map(|entry| entry.2).collect() };
        let tail_count = u8s(counts, self.tail.iter().map(|entry| entry.1).collect());
        let tail_q = u8s(stored, self.tail.iter().map(|entry| entry.2).collect());
        let arrays: Vec<ArrayRef> = vec![
            Arc::new(StringArray::from_iter_values(&self.row_id)),
            Arc::new(UInt64Array::from(self.row)),
            list(&self.tags_end, Arc::new(StringArray::from_iter_values(&self.tags)))?,
            list(&self.tokens_end, Arc::new(UInt32Array::from(self.token_ids)))?,
            list(&self.tokens_end, Arc::new(BooleanArray::from(self.target_mask)))?,
            Arc::new(StringArray::from_iter_values(&self.finish_reason)),
            list(&table_end, Arc::new(UInt32Array::from(table.ids().to_vec())))?,
            list(&self.positions_end, Arc::new(UInt32Array::from(self.head_size)))?,
            list(&self.heads_end, Arc::new(UInt32Array::from(head_delta)))?,
            list(heads_if(bytes), head_q)?,
            list(heads_if(!bytes), Arc::new(Float32Array::from(head_logprob)))?,
            list(&self.positions_end, Arc::new(UInt32Array::from(self.tail_size)))?,
            list(&self.tails_end, Arc::new(UInt32Array::from(tail_delta)))?,
            list(tails_if(counts), tail_count)?,
            list(tails_if(stored), tail_q)?,
            list(&self.positions_end, Arc::new(Float32Array::from(self.max_logprob)))?,
            list(&self.positions_end, Arc::new(Float32Array::from(self.tail_mass)))?,
            list(&self.positions_end, Arc::new(Float32Array::from(self.label_logprob)))?,
            list(&self.log_sum_exps_end, Arc::new(Float32Array::from(self.log_sum_exp)))?,
        ];
        RecordBatch::try_new(schema::schema(&schema::COLUMNS), arrays)
            .map_err(|error| Error::with_source(Code::Internal, "the shard's columns do not fit its schema", error))
    }
}

/// Sorts each position's entries by rank; the differences, each position's first one whole.
fn sort_and_difference<T>(entries: &mut [T], sizes: &[u32], rank: impl Fn(&T) -> u32) -> Vec<u32> {
    let mut deltas = Vec::with_capacity(entries.len());
    let mut rest = entries;
    for &size in sizes {
        let (position, later) = rest.split_at_mut(size as usize);
        rest = later;
        position.sort_unstable_by_key(&rank);
        let mut before = 0;
        for entry in &*position {
            deltas.push(rank(entry) - before);
            before = rank(entry);
        }
    }
    deltas
}

/// Head and tail hold what a teacher can say: each id once, finite log-probabilities, sizes of the codec.
fn check_support(header: &Header, position: &Position) -> Result<(), String> {
    let codec = header.soft_targets.codec;
    let most = codec.max_head(header.vocab_size) as usize;
    if position.head.is_empty() && most > 0 {
        return Err("the head is empty".to_owned());
    }
    if position.head.len() > most {
        return Err(format!("the head has {} entries, the codec {} has {most}", position.head.len(), codec.name()));
    }
    let best = top(&position.head).map(|(_, logprob)| logprob);
    let head = position.head.iter().map(|&(id, logprob)| (id, 1, logprob));
    let mut ids = Vec::with_capacity(position.head.len() + position.tail.len());
    for (id, count, logprob) in head.chain(position.tail.iter().copied()) {
        check_logprob("a log-probability", logprob)?;
        if id >= header.vocab_size {
            return Err(format!("token {id} is outside the vocabulary of {}", header.vocab_size));
        }
        if let Some(best) = best
            && f64::from(logprob) > f64::from(best) + MASS_TOLERANCE
        {
            return Err(format!("tail token {id} is likelier ({logprob}) than the head's best ({best})"));
        }
        if count == 0 {
            return Err("a tail entry was drawn 0 times".to_owned());
        }
        if count > 1 && !has_counts(codec) {
            return Err(format!("tail token {id} was drawn {count} times; {} draws each once", codec.name()));
        }
        ids.push(id);
    }
    ids.sort_unstable();
    match ids.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(twice) => Err(format!("token {} is in the support twice", twice[0])),
        None => Ok(()),
    }
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
                format!("a row group has {end} list values, at most {} fit; use shorter rows", i32::MAX),
            )
        })?;
        offsets.push(end);
    }
    let element = schema::element(values.data_type().clone());
    let list = ListArray::try_new(element, OffsetBuffer::new(offsets.into()), values, None);
    list.map(|list| Arc::new(list) as ArrayRef)
        .map_err(|error| Error::with_source(Code::Internal, "a list of the shard is malformed", error))
}
