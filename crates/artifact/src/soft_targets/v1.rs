//! Version 1, which is read and no longer written.
//!
//! Head and tail lie in one sorted list of entries, each with a count (0 in the head), a byte of
//! log-probability in other steps than today's, and ids as plain differences.

mod quantise;

use arrow_array::{
    PrimitiveArray, RecordBatch,
    types::{Float32Type, UInt8Type, UInt16Type, UInt32Type},
};
use arrow_schema::DataType;
use parquet::basic::Encoding;
use retort_core::spec::Codec;

use self::quantise::{dequantise, head_masses};
use super::{
    Header, SparseTargets,
    decode::{check_floats, list_of, values},
    encode::MASS_TOLERANCE,
    schema::{self, Column, FINISH_REASON, Per, ROW, ROW_ID, TAGS, TARGET_MASK, TOKEN_IDS, column, list},
};

pub(super) use quantise::NAME as QUANTISER;

const SUPPORT_SIZE: usize = 6;
const SUPPORT_DELTA: usize = 7;
const COUNT: usize = 8;
const LOGPROB_Q: usize = 9;
const MAX_LOGPROB: usize = 10;
const TAIL_MASS: usize = 11;
const LABEL_LOGPROB: usize = 12;

/// In file order; the first six are those of today.
pub(super) const COLUMNS: [Column; 13] = {
    use Encoding::BYTE_STREAM_SPLIT;
    [
        schema::COLUMNS[ROW_ID],
        schema::COLUMNS[ROW],
        schema::COLUMNS[TAGS],
        schema::COLUMNS[TOKEN_IDS],
        schema::COLUMNS[TARGET_MASK],
        schema::COLUMNS[FINISH_REASON],
        column("support_size", || list(DataType::UInt16), BYTE_STREAM_SPLIT, Per::Target),
        column("support_delta", || list(DataType::UInt32), BYTE_STREAM_SPLIT, Per::Entry),
        column("count", || list(DataType::UInt8), BYTE_STREAM_SPLIT, Per::Entry),
        column("logprob_q", || list(DataType::UInt8), BYTE_STREAM_SPLIT, Per::Entry),
        column("max_logprob", || list(DataType::Float32), BYTE_STREAM_SPLIT, Per::Target),
        column("tail_mass", || list(DataType::Float32), BYTE_STREAM_SPLIT, Per::Target),
        column("label_logprob", || list(DataType::Float32), BYTE_STREAM_SPLIT, Per::Target),
    ]
};

/// Mean tail mass is summed over this column.
pub(super) const TAIL_MASS_COLUMN: usize = TAIL_MASS;

/// The soft targets of row `r`, which has `positions` targets.
pub(super) fn targets(
    header: &Header,
    batch: &RecordBatch,
    r: usize,
    positions: usize,
) -> Result<SparseTargets, String> {
    let (head, draws) = match header.soft_targets.codec {
        Codec::HeadDraws { head, draws } => (head, draws),
        other => return Err(format!("version 1 has no codec {}", other.name())),
    };
    Flat {
        header,
        head,
        draws,
        sizes: &values::<UInt16Type>(list_of(batch, SUPPORT_SIZE), r),
        deltas: &values::<UInt32Type>(list_of(batch, SUPPORT_DELTA), r),
        counts: &values::<UInt8Type>(list_of(batch, COUNT), r),
        qs: &values::<UInt8Type>(list_of(batch, LOGPROB_Q), r),
        maxima: &values::<Float32Type>(list_of(batch, MAX_LOGPROB), r),
        tail_masses: &values::<Float32Type>(list_of(batch, TAIL_MASS), r),
        labels: &values::<Float32Type>(list_of(batch, LABEL_LOGPROB), r),
    }
    .targets(positions)
}

/// One row's flat lists.
struct Flat<'a> {
    header: &'a Header,
    head: u32,
    draws: u32,
    sizes: &'a PrimitiveArray<UInt16Type>,
    deltas: &'a PrimitiveArray<UInt32Type>,
    counts: &'a PrimitiveArray<UInt8Type>,
    qs: &'a PrimitiveArray<UInt8Type>,
    maxima: &'a PrimitiveArray<Float32Type>,
    tail_masses: &'a PrimitiveArray<Float32Type>,
    labels: &'a PrimitiveArray<Float32Type>,
}

impl Flat<'_> {
    fn targets(&self, positions: usize) -> Result<SparseTargets, String> {
        let lengths = [self.sizes.len(), self.maxima.len(), self.tail_masses.len(), self.labels.len()];
        if lengths.iter().any(|&length| length != positions) {
            return Err(format!("{positions} targets have {lengths:?} sizes, maxima, tail masses and labels"));
        }
        let entries: usize = self.sizes.values().iter().map(|&size| usize::from(size)).sum();
        let lengths = [self.deltas.len(), self.counts.len(), self.qs.len()];
        if lengths.iter().any(|&length| length != entries) || u32::try_from(entries).is_err() {
            return Err(format!("{entries} entries have {lengths:?} ids, counts and log-probabilities"));
        }
        let mut targets = SparseTargets {
            offsets: Vec::with_capacity(positions + 1),
            ids: Vec::with_capacity(entries),
            masses: Vec::with_capacity(entries),
            logprobs: Vec::with_capacity(entries),
            heads: self.counts.values().iter().map(|&count| count == 0).collect(),
            top_ids: Vec::with_capacity(positions),
            label_logprobs: self.labels.values().to_vec(),
            residuals: vec![0.0; positions],
            log_sum_exps: Vec::new(),
        };
        targets.offsets.push(0);
        let mut scratch = Default::default();
        for p in 0..positions {
            self.position(p, &mut targets, &mut scratch).map_err(|why| format!("position {p}: {why}"))?;
        }
        Ok(targets)
    }

    fn position(
        &self,
        p: usize,
        targets: &mut SparseTargets,
        (head_qs, head): &mut (Vec<u8>, Vec<f64>),
    ) -> Result<(), String> {
        let start = targets.ids.len();
        let end = start + usize::from(self.sizes.value(p));
        let (deltas, counts, qs) =
            (&self.deltas.values()[start..end], &self.counts.values()[start..end], &self.qs.values()[start..end]);
        let (max, tail_mass, label) = (self.maxima.value(p), self.tail_masses.value(p), self.labels.value(p));
        check_floats(self.header, max, tail_mass, label)?;
        let top_id = push_ids(self.header.vocab_size, deltas, qs, &mut targets.ids)?;
        check_counts((self.head, self.draws), counts, qs, tail_mass)?;

        head_qs.clear();
        head_qs.extend(counts.iter().zip(qs).filter(|(count, _)| **count == 0).map(|(_, q)| *q));
        head_masses(max, tail_mass, head_qs, head);
        let whole = head.iter().sum::<f64>() + f64::from(tail_mass);
        if (whole - 1.0).abs() > MASS_TOLERANCE {
            return Err(format!("its masses sum to {whole}"));
        }
        let mut head = head.iter();
        for (&count, &q) in counts.iter().zip(qs) {
            let (mass, logprob) = match (count, head.as_slice()) {
                (0, [mass, rest @ ..]) => {
                    head = rest.iter();
                    (*mass, mass.ln())
                }
                _ => (f64::from(tail_mass) * f64::from(count) / f64::from(self.draws), dequantise(max, q)),
            };
            targets.masses.push(mass as f32);
            targets.logprobs.push(logprob as f32);
        }
        targets.top_ids.push(top_id);
        targets.offsets.push(targets.ids.len() as u32); // at most the number of entries, which fits
        Ok(())
    }
}

/// Undoes the deltas; the position's most likely id.
fn push_ids(vocab_size: u32, deltas: &[u32], qs: &[u8], ids: &mut Vec<u32>) -> Result<u32, String> {
    let (mut id, mut top) = (0u64, None);
    for (i, (&delta, &q)) in deltas.iter().zip(qs).enumerate() {
        if i > 0 && delta == 0 {
            return Err(format!("token {id} is in its support twice"));
        }
        id += u64::from(delta);
        if id >= u64::from(vocab_size) {
            return Err(format!("token {id} is outside the vocabulary of {vocab_size}"));
        }
        let id = id as u32; // below vocab_size
        if q == 0 && top.replace(id).is_some() {
            return Err("two tokens are marked as its most likely".to_owned());
        }
        ids.push(id);
    }
    top.ok_or_else(|| "none of its tokens is marked as the most likely".to_owned())
}

fn check_counts((most, draws): (u32, u32), counts: &[u8], qs: &[u8], tail_mass: f32) -> Result<(), String> {
    let head = counts.iter().filter(|&&count| count == 0).count();
    if head == 0 || head > most as usize {
        return Err(format!("its head has {head} entries, the header says {most}"));
    }
    if counts.iter().zip(qs).any(|(&count, &q)| count > 0 && q == 0) {
        return Err("a tail entry is marked as its most likely".to_owned());
    }
    let drawn: u32 = counts.iter().map(|&count| u32::from(count)).sum();
    if drawn == draws || (drawn == 0 && f64::from(tail_mass) <= MASS_TOLERANCE) {
        Ok(())
    } else {
        Err(format!("its tail has {drawn} draws and mass {tail_mass}, the header says {draws} draws"))
    }
}
