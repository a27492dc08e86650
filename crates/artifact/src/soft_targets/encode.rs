//! From a teacher's raw distributions to the bytes of a shard, one row group at a time.

use std::{
    io::{self, Write},
    ops::Range,
};

use bytes::Bytes;
use parquet::{
    arrow::{ArrowWriter, arrow_writer::ArrowWriterOptions},
    file::metadata::KeyValue,
};
use retort_core::{Code, Error, Result, spec::Codec};
use sha2::{Digest, Sha256};

use self::columns::Columns;
use super::{
    DecodedSequence, Encoded, Fidelity, Header, Limits, Position, Reader, Sequence, Source, TailLogprobs, decode,
    fidelity::Totals,
    guard,
    schema::{self, CONTENT_KEY},
};
use crate::hash::hex;

mod columns;

/// Mass that may be left to no tail entry, and the most that rounding may add to a whole.
pub(super) const MASS_TOLERANCE: f64 = 1e-3;

/// Support entries after which a row group ends; `make bench-shard-memory` shows what it takes.
const GROUP_ENTRIES: usize = 4 << 20;
/// Tokens after which it ends in any case.
const GROUP_TOKENS: usize = 4 << 20;

/// Writes a shard into memory, reads it back and measures what storing cost.
///
/// The same header and sequences give the same bytes. A distribution that cannot be one (not
/// finite, masses above 1, an id twice, a target without distribution) is
/// [`Code::ShardUnfaithful`], naming row and position.
///
/// More entries than [`super::decode`] reads by default are [`Code::ObjectTooLarge`]: who reads a shard
/// whole could not read this one. [`Writer`] has no such bound.
pub fn encode(header: &Header, sequences: &[Sequence]) -> Result<Encoded> {
    let entries: usize = sequences.iter().map(entries).sum();
    let most = Limits::default().max_entries;
    if entries as u64 > most {
        return Err(Error::new(
            Code::ObjectTooLarge,
            format!(
                "the shard has {entries} support entries, at most {most} are read at once; use fewer rows a shard \
                 (prompts.shard_rows) or a sparser codec"
            ),
        ));
    }
    let mut writer = Writer::new(header.clone(), Vec::new())?;
    for group in groups(sequences) {
        writer.write_group(&sequences[group])?;
    }
    let (bytes, written) = writer.finish()?;
    let bytes = Bytes::from(bytes);
    written.verify(bytes.clone())?;
    Ok(Encoded {
        bytes,
        sha256: written.sha256,
        rows: written.rows,
        target_tokens: written.target_tokens,
        fidelity: written.fidelity,
    })
}

/// Writes a shard a row group at a time, so that memory does not grow with the file.
pub struct Writer<W: Write + Send> {
    header: Header,
    parquet: ArrowWriter<Hashed<W>>,
    /// Rows of the row group that is being filled, and how much they hold.
    pending: Vec<Sequence>,
    filled: Filled,
    target_tokens: u64,
    totals: Totals,
    /// Of each row as it will be read back.
    digests: Vec<[u8; 32]>,
}

/// What a finished file must be when it is read back.
#[derive(Debug)]
pub struct Written {
    /// Of the whole file.
    pub sha256: String,
    pub bytes: u64,
    pub rows: u64,
    /// Positions that carry a distribution.
    pub target_tokens: u64,
    pub fidelity: Fidelity,
    header: Header,
    digests: Vec<[u8; 32]>,
}

impl<W: Write + Send> Writer<W> {
    /// `header.tail_logprobs`, where it is a mean, is filled in at the end.
    pub fn new(mut header: Header, into: W) -> Result<Self> {
        if let TailLogprobs::Mean(mean) = &mut header.tail_logprobs {
            *mean = 0.0;
        }
        header
            .check_written()
            .map_err(|why| Error::internal(format!("the shard's header cannot be written: {why}")))?;
        let options =
            ArrowWriterOptions::new().with_properties(schema::writer_properties()?).with_skip_arrow_metadata(true);
        let parquet = ArrowWriter::try_new_with_options(Hashed::new(into), schema::schema(&schema::COLUMNS), options)
            .map_err(unwritable)?;
        Ok(Self {
            header,
            parquet,
            pending: Vec::new(),
            filled: Filled::default(),
            target_tokens: 0,
            totals: Totals::default(),
            digests: Vec::new(),
        })
    }

    /// Adds a row; errors as [`encode`]'s, some only with a later row or at the end.
    pub fn push(&mut self, sequence: Sequence) -> Result<()> {
        if !self.filled.takes(&sequence) {
            self.flush()?;
            self.filled.takes(&sequence);
        }
        self.pending.push(sequence);
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        let pending = std::mem::take(&mut self.pending);
        self.filled = Filled::default();
        if pending.is_empty() { Ok(()) } else { self.write_group(&pending) }
    }

    /// Writes one row group, and measures what a reader of it will get.
    fn write_group(&mut self, sequences: &[Sequence]) -> Result<()> {
        let mut columns = Columns::default();
        for sequence in sequences {
            columns.push(&self.header, sequence)?;
        }
        let batch = columns.into_batch(&self.header)?;
        let read = decode::assemble(&self.header, &batch, &Limits::for_own_bytes()).map_err(unreadable)?;
        for (sequence, read) in sequences.iter().zip(&read) {
            self.totals.add(&self.header, sequence, read)?;
            self.target_tokens += read.targets.len() as u64;
            self.digests.push(digest(&self.header, read));
        }
        self.parquet.write(&batch).and_then(|()| self.parquet.flush()).map_err(unwritable)
    }

    /// Ends the file. What it says must still be held against [`Written::verify`].
    pub fn finish(mut self) -> Result<(W, Written)> {
        self.flush()?;
        if let TailLogprobs::Mean(mean) = &mut self.header.tail_logprobs {
            *mean = self.totals.mean_tail_logprob();
        }
        self.parquet.sync().map_err(|error| unwritable(error.into()))?;
        let content = guard::content_sha256(self.parquet.inner().hasher.clone(), &self.header);
        for (key, value) in self.header.pairs() {
            self.parquet.append_key_value_metadata(KeyValue::new(key.to_owned(), value));
        }
        self.parquet.append_key_value_metadata(KeyValue::new(CONTENT_KEY.to_owned(), content));
        let Hashed { into, hasher, bytes } = self.parquet.into_inner().map_err(unwritable)?;
        let written = Written {
            sha256: hex(&hasher.finalize()),
            bytes,
            rows: self.digests.len() as u64,
            target_tokens: self.target_tokens,
            fidelity: self.totals.means(),
            header: self.header,
            digests: self.digests,
        };
        Ok((into, written))
    }
}

impl Written {
    /// Reads the file and holds every row against what was written.
    pub fn verify(&self, source: impl Into<Source>) -> Result<()> {
        let reader = Reader::open(source, Limits::for_own_bytes()).map_err(unreadable)?;
        if *reader.header() != self.header {
            return Err(Error::new(
                Code::ShardUnfaithful,
                "the shard's header reads back otherwise than it was written",
            ));
        }
        let mut expected = self.digests.iter();
        for group in reader {
            for read in group.map_err(unreadable)? {
                if expected.next() != Some(&digest(&self.header, &read)) {
                    return Err(unfaithful(&read.row_id, "it reads back otherwise than it was written"));
                }
            }
        }
        match expected.len() {
            0 => Ok(()),
            left => Err(Error::new(Code::ShardUnfaithful, format!("{left} rows of the shard do not read back"))),
        }
    }
}

impl Limits {
    /// For bytes that this process has just made from what is in its memory already.
    fn for_own_bytes() -> Self {
        Self { max_bytes: u64::MAX, max_rows: u64::MAX, max_tokens_per_row: u64::MAX, max_entries: u64::MAX }
    }
}

/// What the rows of a row group hold so far.
#[derive(Default)]
struct Filled {
    rows: usize,
    entries: usize,
    tokens: usize,
}

impl Filled {
    /// Counts a row in if the row group has room; its first row always has.
    fn takes(&mut self, sequence: &Sequence) -> bool {
        let entries =
            sequence.positions.iter().map(|position| position.head.len() + position.tail.len()).sum::<usize>();
        let full = self.entries + entries > GROUP_ENTRIES || self.tokens + sequence.token_ids.len() > GROUP_TOKENS;
        if full && self.rows > 0 {
            return false;
        }
        self.rows += 1;
        self.entries += entries;
        self.tokens += sequence.token_ids.len();
        true
    }
}

/// Support entries of a row.
fn entries(sequence: &Sequence) -> usize {
    sequence.positions.iter().map(|position| position.head.len() + position.tail.len()).sum()
}

/// Rows of each row group.
fn groups(sequences: &[Sequence]) -> Vec<Range<usize>> {
    let mut groups: Vec<Range<usize>> = Vec::new();
    let mut filled = Filled::default();
    for (at, sequence) in sequences.iter().enumerate() {
        match groups.last_mut() {
            Some(group) if filled.takes(sequence) => group.end = at + 1,
            _ => {
                filled = Filled::default();
                filled.takes(sequence);
                groups.push(at..at + 1);
            }
        }
    }
    groups
}

/// Of all that a reader uses of a row; of its log-probabilities where they do not wait for the shard's
/// mean.
fn digest(header: &Header, sequence: &DecodedSequence) -> [u8; 32] {
    let mut hasher = Sha256::new();
    let targets = &sequence.targets;
    for text in std::iter::once(&sequence.row_id).chain([&sequence.finish_reason]).chain(&sequence.tags) {
        hasher.update((text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    }
    hasher.update(sequence.row.to_le_bytes());
    for flags in [&sequence.target_mask, &targets.heads] {
        hasher.update(flags.iter().map(|&flag| u8::from(flag)).collect::<Vec<_>>());
    }
    for words in [&sequence.token_ids, &targets.offsets, &targets.ids, &targets.top_ids] {
        hasher.update((words.len() as u64).to_le_bytes());
        words.iter().for_each(|word| hasher.update(word.to_le_bytes()));
    }
    let none = Vec::new();
    let logprobs = if header.tail_logprobs == TailLogprobs::Stored { &targets.logprobs } else { &none };
    for floats in [&targets.masses, &targets.residuals, &targets.label_logprobs, &targets.log_sum_exps, logprobs] {
        hasher.update((floats.len() as u64).to_le_bytes());
        floats.iter().for_each(|float| hasher.update(float.to_le_bytes()));
    }
    hasher.finalize().into()
}

/// Hands bytes on, hashing and counting them.
struct Hashed<W> {
    into: W,
    hasher: Sha256,
    bytes: u64,
}

impl<W> Hashed<W> {
    fn new(into: W) -> Self {
        Self { into, hasher: Sha256::new(), bytes: 0 }
    }
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        let written = self.into.write(piece)?;
        self.hasher.update(&piece[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.into.flush()
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

/// Target mass of a tail of `drawn` draws whose true mass is `mass`; `None` where a codec cannot have
/// so many. `slack` is how far, relatively, a stored mass may be off.
pub(super) fn tail_mass(codec: Codec, drawn: u32, mass: f64, slack: f64) -> Option<f64> {
    let (fits, mass) = match codec {
        Codec::Full | Codec::TopK { .. } | Codec::TopKTail { .. } => (drawn == 0, 0.0),
        Codec::HeadDraws { draws, .. } => (drawn == draws || (drawn == 0 && mass <= MASS_TOLERANCE), mass),
        Codec::Random { draws } => (drawn == draws, mass),
        // Of a tail lighter than the threshold there is at most one sample, which weighs that much.
        Codec::Threshold { threshold } => {
            let light = mass <= threshold * (1.0 + slack);
            (drawn <= codec.max_draws() && (drawn > 0 || light), mass.max(threshold))
        }
    };
    fits.then_some(mass)
}

fn unfaithful(row_id: &str, why: &str) -> Error {
    let row_id: String = row_id.chars().take(80).collect();
    Error::new(Code::ShardUnfaithful, format!("row {row_id:?}: {why}"))
}

fn unreadable(error: Error) -> Error {
    let message = format!("the shard cannot be read back after writing: {}", error.chain());
    Error::with_source(Code::ShardUnfaithful, message, error)
}

fn unwritable(error: parquet::errors::ParquetError) -> Error {
    Error::with_source(Code::Internal, "the shard could not be written as parquet", error)
}
