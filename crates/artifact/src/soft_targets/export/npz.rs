//! Dense arrays for `numpy.load`: a zip of .npy files, the masses written position by position.
//!
//! An array's shape stands before its values, so the shards are gone through twice: once for
//! everything that is small, which also tells the size, and once for the masses.

use std::{
    io::{self, Seek, SeekFrom, Write},
    ops::Range,
    path::{Path, PathBuf},
};

use half::f16;
use retort_core::{Code, Error, Result};
use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

use super::{Origin, shown};
use crate::soft_targets::{DecodedSequence, Header, SparseTargets};

/// Almost all of a dense array is zeros: the fastest level leaves 1 to 2 % of it.
const DEFLATE_LEVEL: i64 = 1;
/// Sizes from here on need the zip's 64-bit fields; half of what 32 bits hold leaves room for what
/// deflate adds to bytes it cannot shorten.
const LARGE: u64 = 1 << 31;

/// Of the masses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    F16,
    F32,
}

impl Dtype {
    /// Of one number.
    pub fn bytes(self) -> usize {
        match self {
            Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    fn descr(self) -> &'static str {
        match self {
            Self::F16 => "<f2",
            Self::F32 => "<f4",
        }
    }
}

/// The first pass: everything but the masses, in memory. About 15 bytes a token, and 4 for each
/// temperature.
#[derive(Debug)]
pub struct NpzPlan {
    dtype: Dtype,
    origin: Option<Origin>,
    row_ids: Vec<String>,
    rows: Vec<u64>,
    row_offsets: Vec<u64>,
    position_offsets: Vec<u64>,
    token_ids: Vec<u32>,
    target_mask: Vec<u8>,
    top_ids: Vec<u32>,
    label_logprobs: Vec<f32>,
    residuals: Vec<f32>,
    temperatures: Vec<f64>,
    log_sum_exps: Vec<f32>,
}

impl NpzPlan {
    pub fn new(dtype: Dtype) -> Self {
        Self {
            dtype,
            origin: None,
            row_ids: Vec::new(),
            rows: Vec::new(),
            row_offsets: vec![0],
            position_offsets: vec![0],
            token_ids: Vec::new(),
            target_mask: Vec::new(),
            top_ids: Vec::new(),
            label_logprobs: Vec::new(),
            residuals: Vec::new(),
            temperatures: Vec::new(),
            log_sum_exps: Vec::new(),
        }
    }

    /// Takes one shard's sequences in. Errors: `TokenizerMismatch` where the shard is of another
    /// origin than those before it, `RequestInvalid` where it was captured for other temperatures.
    pub fn add(&mut self, header: &Header, sequences: &[DecodedSequence]) -> Result<()> {
        match &self.origin {
            Some(origin) => {
                origin.check(header)?;
                self.check_temperatures(header)?;
            }
            None => {
                self.origin = Some(Origin::of(header));
                self.temperatures.clone_from(&header.soft_targets.temperatures);
            }
        }
        for sequence in sequences {
            self.row_ids.push(sequence.row_id.clone());
            self.rows.push(sequence.row);
            self.token_ids.extend_from_slice(&sequence.token_ids);
            self.row_offsets.push(self.token_ids.len() as u64);
            self.target_mask.extend(sequence.target_mask.iter().map(|&target| u8::from(target)));
            self.top_ids.extend_from_slice(&sequence.targets.top_ids);
            self.label_logprobs.extend_from_slice(&sequence.targets.label_logprobs);
            self.residuals.extend_from_slice(&sequence.targets.residuals);
            self.log_sum_exps.extend_from_slice(&sequence.targets.log_sum_exps);
            self.position_offsets.push(self.top_ids.len() as u64);
        }
        Ok(())
    }

    pub fn sequences(&self) -> u64 {
        self.rows.len() as u64
    }

    /// Positions that carry a distribution.
    pub fn positions(&self) -> u64 {
        self.top_ids.len() as u64
    }

    /// Of a dense row of the masses.
    pub fn vocab_size(&self) -> u32 {
        self.origin.as_ref().map_or(0, |origin| origin.vocab_size)
    }

    /// What the arrays take once they are loaded; the file is smaller.
    pub fn bytes(&self) -> u64 {
        let masses =
            self.positions().saturating_mul(u64::from(self.vocab_size())).saturating_mul(self.dtype.bytes() as u64);
        let strings = self.sequences().saturating_mul(4 * self.row_id_chars() as u64);
        let rest = 24 * self.sequences() + 16 + 9 * self.token_ids.len() as u64 + 16 * self.positions();
        let tempered = 8 * self.temperatures.len() + 4 * self.log_sum_exps.len();
        masses.saturating_add(strings).saturating_add(rest).saturating_add(tempered as u64)
    }

    /// One array of log-sum-exps has the same temperatures throughout.
    fn check_temperatures(&self, header: &Header) -> Result<()> {
        let its = &header.soft_targets.temperatures;
        if *its == self.temperatures {
            return Ok(());
        }
        let message = format!(
            "shard {} of job {:?} was captured for the temperatures {its:?}, those before it for {:?}; export them apart",
            header.shard,
            shown(&header.job),
            self.temperatures
        );
        Err(Error::new(Code::RequestInvalid, message))
    }

    /// Of the longest; numpy knows no string type of none.
    fn row_id_chars(&self) -> usize {
        self.row_ids.iter().map(|id| id.chars().count()).max().unwrap_or(0).max(1)
    }

    /// Writes all arrays but the masses to `to`; `path` names it in errors.
    pub fn begin<W: Write + Seek>(self, path: &Path, to: W) -> Result<NpzWriter<W>> {
        let (positions, vocab_size) = (self.positions(), self.vocab_size());
        let dtype = self.dtype;
        let mut writer = NpzWriter {
            zip: ZipWriter::new(Once { to, failed: false, at: 0, end: 0 }),
            path: path.to_owned(),
            dtype,
            vocab_size: vocab_size as usize,
            row: Vec::new(),
            left: positions,
        };
        writer
            .small_arrays(self)
            .and_then(|()| writer.entry("masses", dtype.descr(), &[positions, u64::from(vocab_size)], dtype.bytes()))
            .map_err(|error| Error::io(path, error))?;
        Ok(writer)
    }
}

/// The second pass: the masses, in the order of the first.
#[derive(Debug)]
pub struct NpzWriter<W: Write + Seek> {
    zip: ZipWriter<Once<W>>,
    path: PathBuf,
    dtype: Dtype,
    vocab_size: usize,
    /// One position's bytes, all zero between two of them.
    row: Vec<u8>,
    /// Positions to come.
    left: u64,
}

impl<W: Write + Seek> NpzWriter<W> {
    /// Writes one sequence's masses: a row of the array for each position.
    pub fn push(&mut self, targets: &SparseTargets) -> Result<()> {
        self.left = self
            .left
            .checked_sub(targets.len() as u64)
            .ok_or_else(|| Error::internal("an npz export was given more positions than it was planned for"))?;
        self.row.resize(self.vocab_size * self.dtype.bytes(), 0);
        for p in 0..targets.len() {
            self.position(targets, targets.range(p)).map_err(|error| Error::io(&self.path, error))?;
        }
        Ok(())
    }

    fn position(&mut self, targets: &SparseTargets, entries: Range<usize>) -> io::Result<()> {
        let width = self.dtype.bytes();
        let place = |id: u32| id as usize * width..(id as usize + 1) * width;
        for (&id, &mass) in targets.ids[entries.clone()].iter().zip(&targets.masses[entries.clone()]) {
            match self.dtype {
                Dtype::F16 => self.row[place(id)].copy_from_slice(&f16::from_f32(mass).to_le_bytes()),
                Dtype::F32 => self.row[place(id)].copy_from_slice(&mass.to_le_bytes()),
            }
        }
        self.zip.write_all(&self.row)?;
        targets.ids[entries].iter().for_each(|&id| self.row[place(id)].fill(0));
        Ok(())
    }

    /// Ends the archive; the file is worth nothing before.
    pub fn finish(self) -> Result<W> {
        if self.left > 0 {
            return Err(Error::internal(format!(
                "an npz export lacks {} of the positions it was planned for",
                self.left
            )));
        }
        self.zip.finish().map(|once| once.to).map_err(|error| Error::io(&self.path, error.into()))
    }

    fn small_arrays(&mut self, plan: NpzPlan) -> io::Result<()> {
        let chars = plan.row_id_chars();
        self.entry("row_ids", &format!("<U{chars}"), &[plan.sequences()], 4 * chars)?;
        for id in &plan.row_ids {
            let mut padded: Vec<u8> = id.chars().flat_map(|c| u32::from(c).to_le_bytes()).collect();
            padded.resize(4 * chars, 0);
            self.zip.write_all(&padded)?;
        }
        self.array("rows", "<u8", plan.rows.iter().map(|row| row.to_le_bytes()))?;
        self.array("row_offsets", "<i8", plan.row_offsets.iter().map(|offset| offset.to_le_bytes()))?;
        self.array("position_offsets", "<i8", plan.position_offsets.iter().map(|offset| offset.to_le_bytes()))?;
        self.array("token_ids", "<i8", plan.token_ids.iter().map(|&id| u64::from(id).to_le_bytes()))?;
        self.entry("target_mask", "|b1", &[plan.target_mask.len() as u64], 1)?;
        self.zip.write_all(&plan.target_mask)?;
        self.array("top_ids", "<i8", plan.top_ids.iter().map(|&id| u64::from(id).to_le_bytes()))?;
        self.array("label_logprobs", "<f4", plan.label_logprobs.iter().map(|logprob| logprob.to_le_bytes()))?;
        self.array("residuals", "<f4", plan.residuals.iter().map(|mass| mass.to_le_bytes()))?;
        if plan.temperatures.is_empty() {
            return Ok(());
        }
        self.array("temperatures", "<f8", plan.temperatures.iter().map(|temperature| temperature.to_le_bytes()))?;
        self.entry("log_sum_exps", "<f4", &[plan.positions(), plan.temperatures.len() as u64], 4)?;
        self.values(plan.log_sum_exps.iter().map(|sum| sum.to_le_bytes()))
    }

    /// A whole array of one dimension.
    fn array<const N: usize>(
        &mut self,
        name: &str,
        descr: &str,
        values: impl ExactSizeIterator<Item = [u8; N]>,
    ) -> io::Result<()> {
        self.entry(name, descr, &[values.len() as u64], N)?;
        self.values(values)
    }

    /// The array's that was begun last.
    fn values<const N: usize>(&mut self, values: impl Iterator<Item = [u8; N]>) -> io::Result<()> {
        let mut buffer = Vec::with_capacity(1 << 16);
        for value in values {
            buffer.extend_from_slice(&value);
            if buffer.len() + N > buffer.capacity() {
                self.zip.write_all(&buffer)?;
                buffer.clear();
            }
        }
        self.zip.write_all(&buffer)
    }

    /// Begins an array; its values follow.
    fn entry(&mut self, name: &str, descr: &str, shape: &[u64], width: usize) -> io::Result<()> {
        let size = shape.iter().fold(width as u64, |size, &n| size.saturating_mul(n));
        let options = SimpleFileOptions::default()
            .compression_method(CompressionMethod::Deflated)
            .compression_level(Some(DEFLATE_LEVEL))
            .large_file(size >= LARGE);
        self.zip.start_file(format!("{name}.npy"), options)?;
        self.zip.write_all(&npy_header(descr, shape))
    }
}

/// Fails once, then takes everything and writes none of it: the archive's writer tries to end its
/// file when it is dropped and would complain on standard error of what was told already. Its
/// position goes on as if all were well, since that writer reckons with it.
#[derive(Debug)]
struct Once<W> {
    to: W,
    failed: bool,
    at: u64,
    end: u64,
}

impl<W> Once<W> {
    /// `None` from the first failure on.
    fn attempt<T>(&mut self, act: impl FnOnce(&mut W) -> io::Result<T>) -> io::Result<Option<T>> {
        if self.failed {
            return Ok(None);
        }
        let result = act(&mut self.to);
        self.failed = result.as_ref().is_err_and(|error| error.kind() != io::ErrorKind::Interrupted);
        result.map(Some)
    }
}

impl<W: Write> Write for Once<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.attempt(|to| to.write(bytes))?.unwrap_or(bytes.len());
        self.at += written as u64;
        self.end = self.end.max(self.at);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.attempt(W::flush).map(|_| ())
    }
}

impl<W: Seek> Seek for Once<W> {
    fn seek(&mut self, place: SeekFrom) -> io::Result<u64> {
        let found = self.attempt(|to| to.seek(place))?;
        self.at = found.unwrap_or(match place {
            SeekFrom::Start(at) => at,
            SeekFrom::Current(by) => self.at.saturating_add_signed(by),
            SeekFrom::End(by) => self.end.saturating_add_signed(by),
        });
        Ok(self.at)
    }
}

/// What stands before an array's values, format version 1.0: magic, version, the length of what
/// follows, and a Python literal padded so that the values start at a multiple of 64.
fn npy_header(descr: &str, shape: &[u64]) -> Vec<u8> {
    let shape: String = shape.iter().map(|n| format!("{n}, ")).collect();
    let literal = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({shape}), }}");
    let length = (10 + literal.len() + 1).next_multiple_of(64) - 10;
    let mut header = b"\x93NUMPY\x01\x00".to_vec();
    header.extend((length as u16).to_le_bytes()); // two numbers and a type: far below 64 KiB
    header.extend(format!("{literal:<width$}\n", width = length - 1).bytes());
    header
}
