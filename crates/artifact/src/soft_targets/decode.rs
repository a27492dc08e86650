//! From the bytes of a shard to what the losses consume.

use arrow_array::{
    Array, ArrowPrimitiveType, ListArray, PrimitiveArray, RecordBatch,
    cast::AsArray,
    types::{Float32Type, UInt8Type, UInt16Type, UInt32Type, UInt64Type},
};
use bytes::Bytes;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder};
use retort_core::Result;

use super::{
    DecodedSequence, Header, Limits, Shard, SparseTargets,
    encode::MASS_TOLERANCE,
    guard::{self, Opened, corrupt},
    quantise::{dequantise, head_masses},
    schema::{
        COUNT, FINISH_REASON, LABEL_LOGPROB, LOGPROB_Q, MAX_LOGPROB, ROW, ROW_ID, SUPPORT_DELTA, SUPPORT_SIZE, TAGS,
        TAIL_MASS, TARGET_MASK, TOKEN_IDS, schema,
    },
};

/// Reads a shard. Never panics, whatever the bytes.
///
/// `ShardCorrupt` on anything malformed, `ShardTooNew` for a schema version above
/// [`super::SCHEMA_VERSION`], `ObjectTooLarge` for a sound file beyond `limits`.
pub fn decode(bytes: Bytes, limits: Limits) -> Result<Shard> {
    let opened = guard::open(&bytes, &limits)?;
    let batches = read(&bytes, &opened)?;
    let mut sequences = Vec::with_capacity(opened.rows as usize);
    for batch in &batches {
        assemble(&opened.header, batch, &limits, &mut sequences)?;
    }
    if sequences.len() as u64 != opened.rows {
        return Err(corrupt(format!("{} rows were read of {}", sequences.len(), opened.rows)));
    }
    Ok(Shard { header: opened.header, sequences })
}

/// The columns' values, of the sizes that [`guard::open`] has allowed.
pub(super) fn read(bytes: &Bytes, opened: &Opened) -> Result<Vec<RecordBatch>> {
    let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
    let batches = guard::guarded(|| {
        let metadata = ArrowReaderMetadata::try_new(opened.metadata.clone(), options)?;
        let rows = (opened.rows as usize).max(1);
        let reader = ParquetRecordBatchReaderBuilder::new_with_metadata(bytes.clone(), metadata)
            .with_batch_size(rows)
            .build()?;
        reader.map(|batch| Ok(batch?)).collect::<parquet::errors::Result<Vec<_>>>()
    })?
    .map_err(|error| corrupt(format!("its columns cannot be read: {error}")))?;
    let expected = schema();
    for batch in &batches {
        let same = batch.num_columns() == expected.fields().len()
            && batch.columns().iter().zip(expected.fields()).all(|(column, field)| {
                column.data_type().equals_datatype(field.data_type()) && column.null_count() == 0
            });
        if !same {
            return Err(corrupt("its columns have other types than version 1's".to_owned()));
        }
    }
    Ok(batches)
}

fn assemble(header: &Header, batch: &RecordBatch, limits: &Limits, into: &mut Vec<DecodedSequence>) -> Result<()> {
    let row_ids = batch.column(ROW_ID).as_string::<i32>();
    let finish_reasons = batch.column(FINISH_REASON).as_string::<i32>();
    let rows = batch.column(ROW).as_primitive::<UInt64Type>();
    let lists = |index: usize| batch.column(index).as_list::<i32>();
    for r in 0..batch.num_rows() {
        let row_id = row_ids.value(r);
        let shown: String = row_id.chars().take(80).collect();
        let fail = |why: String| corrupt(format!("row {shown:?}: {why}"));
        let token_ids = values::<UInt32Type>(lists(TOKEN_IDS), r);
        let mask_list = lists(TARGET_MASK).value(r);
        let mask = mask_list.as_boolean();
        if token_ids.len() as u64 > limits.max_tokens_per_row {
            return Err(fail(format!("it has {} tokens, at most {}", token_ids.len(), limits.max_tokens_per_row)));
        }
        if mask.len() != token_ids.len() || (!mask.is_empty() && mask.value(0)) {
            return Err(fail("its target mask does not fit its tokens".to_owned()));
        }
        if token_ids.values().iter().any(|&id| id >= header.vocab_size) {
            return Err(fail(format!("a token is outside the vocabulary of {}", header.vocab_size)));
        }
        let flat = Flat {
            sizes: &values::<UInt16Type>(lists(SUPPORT_SIZE), r),
            deltas: &values::<UInt32Type>(lists(SUPPORT_DELTA), r),
            counts: &values::<UInt8Type>(lists(COUNT), r),
            qs: &values::<UInt8Type>(lists(LOGPROB_Q), r),
            maxima: &values::<Float32Type>(lists(MAX_LOGPROB), r),
            tail_masses: &values::<Float32Type>(lists(TAIL_MASS), r),
            labels: &values::<Float32Type>(lists(LABEL_LOGPROB), r),
        };
        let targets = flat.targets(header, mask.true_count()).map_err(fail)?;
        let tags = lists(TAGS).value(r);
        into.push(DecodedSequence {
            row_id: row_id.to_owned(),
            row: rows.value(r),
            tags: tags.as_string::<i32>().iter().flatten().map(str::to_owned).collect(),
            token_ids: token_ids.values().to_vec(),
            target_mask: mask.values().iter().collect(),
            finish_reason: finish_reasons.value(r).to_owned(),
            targets,
        });
    }
    Ok(())
}

fn values<T: ArrowPrimitiveType>(list: &ListArray, row: usize) -> PrimitiveArray<T> {
    list.value(row).as_primitive::<T>().clone()
}

/// One row's flat lists.
struct Flat<'a> {
    sizes: &'a PrimitiveArray<UInt16Type>,
    deltas: &'a PrimitiveArray<UInt32Type>,
    counts: &'a PrimitiveArray<UInt8Type>,
    qs: &'a PrimitiveArray<UInt8Type>,
    maxima: &'a PrimitiveArray<Float32Type>,
    tail_masses: &'a PrimitiveArray<Float32Type>,
    labels: &'a PrimitiveArray<Float32Type>,
}

impl Flat<'_> {
    fn targets(&self, header: &Header, positions: usize) -> Result<SparseTargets, String> {
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
            top_ids: Vec::with_capacity(positions),
            label_logprobs: self.labels.values().to_vec(),
        };
        targets.offsets.push(0);
        let mut scratch = Default::default();
        for p in 0..positions {
            self.position(header, p, &mut targets, &mut scratch).map_err(|why| format!("position {p}: {why}"))?;
        }
        Ok(targets)
    }

    fn position(
        &self,
        header: &Header,
        p: usize,
        targets: &mut SparseTargets,
        (head_qs, head): &mut (Vec<u8>, Vec<f64>),
    ) -> Result<(), String> {
        let start = targets.ids.len();
        let end = start + usize::from(self.sizes.value(p));
        let (deltas, counts, qs) =
            (&self.deltas.values()[start..end], &self.counts.values()[start..end], &self.qs.values()[start..end]);
        let (max, tail_mass, label) = (self.maxima.value(p), self.tail_masses.value(p), self.labels.value(p));
        for (what, value) in [("largest", max), ("label's", label)] {
            if !value.is_finite() || f64::from(value) > MASS_TOLERANCE {
                return Err(format!("its {what} log-probability is {value}"));
            }
        }
        // The most likely of n tokens has a probability of at least 1/n.
        if f64::from(max) < -f64::from(header.vocab_size).ln() - MASS_TOLERANCE {
            return Err(format!("its largest log-probability is {max} with a vocabulary of {}", header.vocab_size));
        }
        if !(0.0..=1.0).contains(&tail_mass) {
            return Err(format!("its tail has mass {tail_mass}"));
        }
        let top_id = push_ids(header, deltas, qs, &mut targets.ids)?;
        check_counts(header, counts, qs, tail_mass)?;

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
                _ => (f64::from(tail_mass) * f64::from(count) / f64::from(header.draws), dequantise(max, q)),
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
fn push_ids(header: &Header, deltas: &[u32], qs: &[u8], ids: &mut Vec<u32>) -> Result<u32, String> {
    let (mut id, mut top) = (0u64, None);
    for (i, (&delta, &q)) in deltas.iter().zip(qs).enumerate() {
        if i > 0 && delta == 0 {
            return Err(format!("token {id} is in its support twice"));
        }
        id += u64::from(delta);
        if id >= u64::from(header.vocab_size) {
            return Err(format!("token {id} is outside the vocabulary of {}", header.vocab_size));
        }
        let id = id as u32; // below vocab_size
        if q == 0 && top.replace(id).is_some() {
            return Err("two tokens are marked as its most likely".to_owned());
        }
        ids.push(id);
    }
    top.ok_or_else(|| "none of its tokens is marked as the most likely".to_owned())
}

fn check_counts(header: &Header, counts: &[u8], qs: &[u8], tail_mass: f32) -> Result<(), String> {
    let head = counts.iter().filter(|&&count| count == 0).count();
    if head == 0 || head > header.head as usize {
        return Err(format!("its head has {head} entries, the header says {}", header.head));
    }
    if counts.iter().zip(qs).any(|(&count, &q)| count > 0 && q == 0) {
        return Err("a tail entry is marked as its most likely".to_owned());
    }
    let drawn: u32 = counts.iter().map(|&count| u32::from(count)).sum();
    if drawn == header.draws || (drawn == 0 && f64::from(tail_mass) <= MASS_TOLERANCE) {
        Ok(())
    } else {
        Err(format!("its tail has {drawn} draws and mass {tail_mass}, the header says {} draws", header.draws))
    }
}
