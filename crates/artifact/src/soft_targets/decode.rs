//! From the bytes of a shard to what the losses consume, one row group at a time.

mod position;
#[cfg(test)]
mod tests;

use std::io::ErrorKind;

use arrow_array::{
    Array, ArrowPrimitiveType, ListArray, PrimitiveArray, RecordBatch,
    cast::AsArray,
    types::{Float32Type, UInt8Type, UInt32Type, UInt64Type},
};
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder};
use retort_core::{
    Code, Error, Result,
    spec::{Codec, Quantiser},
};

use self::position::Position;
pub(super) use self::position::has_counts;
use super::{
    DecodedSequence, Header, Limits, Shard, Source, SparseTargets, TailLogprobs,
    encode::MASS_TOLERANCE,
    guard::{self, Opened, corrupt},
    id_table,
    schema::{
        FINISH_REASON, HEAD_DELTA, HEAD_LOGPROB, HEAD_Q, HEAD_SIZE, ID_TABLE, LABEL_LOGPROB, LOG_SUM_EXP, MAX_LOGPROB,
        ROW, ROW_ID, TAGS, TAIL_COUNT, TAIL_DELTA, TAIL_MASS, TAIL_Q, TAIL_SIZE, TARGET_MASK, TOKEN_IDS, schema,
    },
    v1,
};

/// How far, relatively, what is rounded to eight bits may miss what it is derived from.
const COARSE_TOLERANCE: f64 = 0.02;
/// Below what f32 resolves beside one.
const LEAST_MASS: f64 = 1e-6;

/// Reads a whole shard. Never panics, whatever the bytes.
///
/// `ShardCorrupt` on anything malformed, `ShardTooNew` for a schema version above
/// [`super::SCHEMA_VERSION`], `ObjectTooLarge` for a sound file beyond `limits`, whose `max_entries`
/// here hold for all row groups together.
pub fn decode(source: impl Into<Source>, limits: Limits) -> Result<Shard> {
    let reader = Reader::open(source, limits)?;
    if reader.opened.entries > limits.max_entries {
        return Err(Error::new(
            Code::ObjectTooLarge,
            format!(
                "the shard has {} support entries, at most {} are read at once; use fewer or shorter rows a shard",
                reader.opened.entries, limits.max_entries
            ),
        ));
    }
    let header = reader.header().clone();
    let mut sequences = Vec::with_capacity(reader.rows() as usize);
    for group in reader {
        sequences.append(&mut group?);
    }
    Ok(Shard { header, sequences })
}

/// Reads a shard a row group at a time, so that memory does not grow with the file.
///
/// Everything that can be checked without values is checked on opening; errors as [`decode`]'s, and
/// [`Error::io`] where the disk does not give the file's bytes. After an error it ends.
pub struct Reader {
    source: Source,
    opened: Opened,
    limits: Limits,
    group: usize,
}

impl Reader {
    pub fn open(source: impl Into<Source>, limits: Limits) -> Result<Self> {
        let source = source.into();
        let opened = guard::open(&source, &limits).map_err(|error| or_disk(&source, error))?;
        Ok(Self { source, opened, limits, group: 0 })
    }

    pub fn header(&self) -> &Header {
        &self.opened.header
    }

    /// Of the whole shard.
    pub fn rows(&self) -> u64 {
        self.opened.rows
    }

    /// Goes back to the first row group.
    pub fn rewind(&mut self) {
        self.group = 0;
    }

    pub(super) fn opened(&self) -> &Opened {
        &self.opened
    }

    /// The next row group's columns.
    pub(super) fn next_batch(&mut self) -> Option<Result<RecordBatch>> {
        let groups = self.opened.metadata.row_groups();
        let rows = groups.get(self.group)?.num_rows();
        self.group += 1;
        let batch = self.read(self.group - 1, rows as usize).map_err(|error| or_disk(&self.source, error));
        if batch.is_err() {
            self.group = groups.len();
        }
        Some(batch)
    }

    fn read(&self, group: usize, rows: usize) -> Result<RecordBatch> {
        let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
        let expected = schema(guard::columns(&self.opened.header));
        let batches = guard::guarded(|| {
            let metadata = ArrowReaderMetadata::try_new(self.opened.metadata.clone(), options)?;
            let reader = ParquetRecordBatchReaderBuilder::new_with_metadata(self.source.clone(), metadata)
                .with_row_groups(vec![group])
                .with_batch_size(rows.max(1))
                .build()?;
            reader.map(|batch| Ok(batch?)).collect::<parquet::errors::Result<Vec<_>>>()
        })?
        .map_err(|error| corrupt(format!("its columns cannot be read: {error}")))?;
        let batch = match <[RecordBatch; 1]>::try_from(batches) {
            Ok([batch]) => batch,
            Err(none) if none.is_empty() && rows == 0 => RecordBatch::new_empty(expected.clone()),
            Err(_) => return Err(corrupt(format!("a row group does not read as {rows} rows"))),
        };
        let same = batch.num_rows() == rows
            && batch.num_columns() == expected.fields().len()
            && batch.columns().iter().zip(expected.fields()).all(|(column, field)| {
                column.data_type().equals_datatype(field.data_type()) && column.null_count() == 0
            });
        if same {
            Ok(batch)
        } else {
            Err(corrupt("its columns have other types or lengths than its version's".to_owned()))
        }
    }
}

/// A disk that fails says nothing of the file. Parquet keeps only the words of an I/O error, so where a
/// file seems corrupt, it is read once more.
fn or_disk(source: &Source, error: Error) -> Error {
    if error.code != Code::ShardCorrupt {
        return error;
    }
    match source.check_readable() {
        Err(fault) if !matches!(fault.kind(), ErrorKind::UnexpectedEof | ErrorKind::InvalidData) => {
            Error::io("the shard", fault)
        }
        _ => error,
    }
}

impl Iterator for Reader {
    type Item = Result<Vec<DecodedSequence>>;

    fn next(&mut self) -> Option<Self::Item> {
        let decoded = self.next_batch()?.and_then(|batch| assemble(&self.opened.header, &batch, &self.limits));
        if decoded.is_err() {
            self.group = self.opened.metadata.num_row_groups();
        }
        Some(decoded)
    }
}

/// The rows of one row group.
pub(super) fn assemble(header: &Header, batch: &RecordBatch, limits: &Limits) -> Result<Vec<DecodedSequence>> {
    let row_ids = batch.column(ROW_ID).as_string::<i32>();
    let finish_reasons = batch.column(FINISH_REASON).as_string::<i32>();
    let rows = batch.column(ROW).as_primitive::<UInt64Type>();
    let table = if header.schema_version == 1 { Vec::new() } else { table(header, batch)? };
    let mut sequences = Vec::with_capacity(batch.num_rows());
    for r in 0..batch.num_rows() {
        let row_id = row_ids.value(r);
        let shown: String = row_id.chars().take(80).collect();
        let fail = |why: String| corrupt(format!("row {shown:?}: {why}"));
        let token_ids = values::<UInt32Type>(list_of(batch, TOKEN_IDS), r);
        let mask_list = list_of(batch, TARGET_MASK).value(r);
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
        let positions = mask.true_count();
        let targets = if header.schema_version == 1 {
            v1::targets(header, batch, r, positions)
        } else {
            Row::new(header, batch, r, &table).targets(positions)
        };
        let tags = list_of(batch, TAGS).value(r);
        sequences.push(DecodedSequence {
            row_id: row_id.to_owned(),
            row: rows.value(r),
            tags: tags.as_string::<i32>().iter().flatten().map(str::to_owned).collect(),
            token_ids: token_ids.values().to_vec(),
            target_mask: mask.values().iter().collect(),
            finish_reason: finish_reasons.value(r).to_owned(),
            targets: targets.map_err(fail)?,
        });
    }
    Ok(sequences)
}

/// The row group's id table, which its first row carries.
fn table(header: &Header, batch: &RecordBatch) -> Result<Vec<u32>> {
    let lists = list_of(batch, ID_TABLE);
    if (1..lists.len()).any(|r| lists.value_length(r) != 0) {
        return Err(corrupt("a row that is not the first of its row group has an id table".to_owned()));
    }
    if lists.is_empty() {
        return Ok(Vec::new());
    }
    let table = values::<UInt32Type>(lists, 0).values().to_vec();
    id_table::check(&table, header.vocab_size).map_err(corrupt)?;
    Ok(table)
}

pub(super) fn list_of(batch: &RecordBatch, index: usize) -> &ListArray {
    batch.column(index).as_list::<i32>()
}

pub(super) fn values<T: ArrowPrimitiveType>(list: &ListArray, row: usize) -> PrimitiveArray<T> {
    list.value(row).as_primitive::<T>().clone()
}

/// What every version asks of a position's floats.
pub(super) fn check_floats(header: &Header, max: f32, tail_mass: f32, label: f32) -> Result<(), String> {
    for (what, value) in [("largest", max), ("label's", label)] {
        if !value.is_finite() || f64::from(value) > MASS_TOLERANCE {
            return Err(format!("its {what} log-probability is {value}"));
        }
    }
    // The most likely of n tokens has a probability of at least 1/n; of those drawn, any.
    let least = f64::from(header.vocab_size).ln() * (1.0 + COARSE_TOLERANCE) + MASS_TOLERANCE;
    if f64::from(max) < -least && !matches!(header.soft_targets.codec, Codec::Random { .. }) {
        return Err(format!("its largest log-probability is {max} with a vocabulary of {}", header.vocab_size));
    }
    if (0.0..=1.0).contains(&tail_mass) { Ok(()) } else { Err(format!("its tail has mass {tail_mass}")) }
}

/// One row's flat lists.
struct Row<'a> {
    header: &'a Header,
    table: &'a [u32],
    head_sizes: PrimitiveArray<UInt32Type>,
    head_deltas: PrimitiveArray<UInt32Type>,
    head_qs: PrimitiveArray<UInt8Type>,
    head_logprobs: PrimitiveArray<Float32Type>,
    tail_sizes: PrimitiveArray<UInt32Type>,
    tail_deltas: PrimitiveArray<UInt32Type>,
    tail_counts: PrimitiveArray<UInt8Type>,
    tail_qs: PrimitiveArray<UInt8Type>,
    maxima: PrimitiveArray<Float32Type>,
    tail_masses: PrimitiveArray<Float32Type>,
    labels: PrimitiveArray<Float32Type>,
    log_sum_exps: PrimitiveArray<Float32Type>,
}

impl<'a> Row<'a> {
    fn new(header: &'a Header, batch: &RecordBatch, r: usize, table: &'a [u32]) -> Self {
        Self {
            header,
            table,
            head_sizes: values(list_of(batch, HEAD_SIZE), r),
            head_deltas: values(list_of(batch, HEAD_DELTA), r),
            head_qs: values(list_of(batch, HEAD_Q), r),
            head_logprobs: values(list_of(batch, HEAD_LOGPROB), r),
            tail_sizes: values(list_of(batch, TAIL_SIZE), r),
            tail_deltas: values(list_of(batch, TAIL_DELTA), r),
            tail_counts: values(list_of(batch, TAIL_COUNT), r),
            tail_qs: values(list_of(batch, TAIL_Q), r),
            maxima: values(list_of(batch, MAX_LOGPROB), r),
            tail_masses: values(list_of(batch, TAIL_MASS), r),
            labels: values(list_of(batch, LABEL_LOGPROB), r),
            log_sum_exps: values(list_of(batch, LOG_SUM_EXP), r),
        }
    }

    fn targets(&self, positions: usize) -> Result<SparseTargets, String> {
        let lengths = [
            self.head_sizes.len(),
            self.tail_sizes.len(),
            self.maxima.len(),
            self.tail_masses.len(),
            self.labels.len(),
        ];
        if lengths.iter().any(|&length| length != positions) {
            return Err(format!(
                "{positions} targets have {lengths:?} head sizes, tail sizes, maxima, tail masses and labels"
            ));
        }
        let temperatures = self.header.soft_targets.temperatures.len();
        if self.log_sum_exps.len() != positions.saturating_mul(temperatures) {
            let found = self.log_sum_exps.len();
            return Err(format!("{positions} targets and {temperatures} temperatures have {found} log-sum-exps"));
        }
        self.check_log_sum_exps()?;
        let (head, tail) = self.check_lengths()?;
        let mut targets = SparseTargets {
            offsets: Vec::with_capacity(positions + 1),
            ids: Vec::with_capacity(head + tail),
            masses: Vec::with_capacity(head + tail),
            logprobs: Vec::with_capacity(head + tail),
            heads: Vec::with_capacity(head + tail),
            residuals: Vec::with_capacity(positions),
            top_ids: Vec::with_capacity(positions),
            label_logprobs: self.labels.values().to_vec(),
            log_sum_exps: self.log_sum_exps.values().to_vec(),
        };
        targets.offsets.push(0);
        let (mut head, mut tail, mut entries) = (0, 0, Vec::new());
        for p in 0..positions {
            let heads = head..head + self.head_sizes.value(p) as usize;
            let tails = tail..tail + self.tail_sizes.value(p) as usize;
            (head, tail) = (heads.end, tails.end);
            let or_empty =
                |range: &std::ops::Range<usize>, length: usize| if length == 0 { 0..0 } else { range.clone() };
            let position = Position {
                head_deltas: &self.head_deltas.values()[heads.clone()],
                head_qs: &self.head_qs.values()[or_empty(&heads, self.head_qs.len())],
                head_logprobs: &self.head_logprobs.values()[or_empty(&heads, self.head_logprobs.len())],
                tail_deltas: &self.tail_deltas.values()[tails.clone()],
                tail_counts: &self.tail_counts.values()[or_empty(&tails, self.tail_counts.len())],
                tail_qs: &self.tail_qs.values()[or_empty(&tails, self.tail_qs.len())],
                max: self.maxima.value(p),
                tail_mass: self.tail_masses.value(p),
            };
            let fail = |why: String| format!("position {p}: {why}");
            check_floats(self.header, position.max, position.tail_mass, self.labels.value(p)).map_err(fail)?;
            let top_id = position.entries(self.header, self.table, &mut entries).map_err(fail)?;
            for entry in &entries {
                targets.ids.push(entry.id);
                targets.masses.push(entry.mass as f32);
                targets.logprobs.push(entry.logprob as f32);
                targets.heads.push(entry.head);
            }
            targets.residuals.push(if self.header.soft_targets.codec.has_bucket() { position.tail_mass } else { 0.0 });
            targets.top_ids.push(top_id);
            targets.offsets.push(targets.ids.len() as u32); // at most the number of entries, which fits
        }
        Ok(targets)
    }

    /// A sum of p^(1/T) lies between 1, all mass on one token, and that of an even distribution.
    fn check_log_sum_exps(&self) -> Result<(), String> {
        let temperatures = &self.header.soft_targets.temperatures;
        let even = f64::from(self.header.vocab_size).ln();
        for (&value, temperature) in self.log_sum_exps.values().iter().zip(temperatures.iter().cycle()) {
            let end = (1.0 - 1.0 / temperature) * even;
            let slack = MASS_TOLERANCE * (1.0 + 1.0 / temperature) + end.abs() * 1e-5;
            let bounds = end.min(0.0) - slack..=end.max(0.0) + slack;
            if !bounds.contains(&f64::from(value)) {
                return Err(format!("a log-sum-exp at temperature {temperature} is {value}"));
            }
        }
        Ok(())
    }

    /// Entries of the row's heads and tails, which its lists of entries must have as many of.
    fn check_lengths(&self) -> Result<(usize, usize), String> {
        let sum = |sizes: &PrimitiveArray<UInt32Type>| sizes.values().iter().map(|&size| u64::from(size)).sum::<u64>();
        let (head, tail) = (sum(&self.head_sizes), sum(&self.tail_sizes));
        let (bytes, floats) = match self.header.soft_targets.quantiser {
            Quantiser::U8 => (head, 0),
            Quantiser::F32 => (0, head),
        };
        let counts = if has_counts(self.header.soft_targets.codec) { tail } else { 0 };
        let stored = if self.header.tail_logprobs == TailLogprobs::Stored { tail } else { 0 };
        for (what, found, expected) in [
            ("head ids", self.head_deltas.len(), head),
            ("bytes of log-probability in its heads", self.head_qs.len(), bytes),
            ("log-probabilities in its heads", self.head_logprobs.len(), floats),
            ("tail ids", self.tail_deltas.len(), tail),
            ("counts in its tails", self.tail_counts.len(), counts),
            ("bytes of log-probability in its tails", self.tail_qs.len(), stored),
        ] {
            if found as u64 != expected {
                return Err(format!("it has {found} {what}, not {expected}"));
            }
        }
        if head + tail > u64::from(u32::MAX) {
            return Err(format!("{} entries are too many for one row", head + tail));
        }
        Ok((head as usize, tail as usize))
    }
}
