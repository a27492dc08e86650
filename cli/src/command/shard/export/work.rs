//! The thread that reads the shards and writes the export.

use std::{
    fs::File,
    io::{self, BufWriter, ErrorKind, Write},
    ops::ControlFlow::{self, Break, Continue},
    path::{Path, PathBuf},
};

use indicatif::ProgressBar;
use retort_artifact::soft_targets::{
    DecodedSequence, Header, Limits, Reader, Source, TailLogprobs,
    export::{Dtype, NpzPlan, TopKWriter},
};
use retort_core::{Code, Error, Result};
use retort_export::Unfinished;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::{DEFAULT_MAX_BYTES, Export, Format, Precision, target};
use crate::{
    command::shard::files,
    output::lost,
    text::{bytes, count},
};

/// Of the progress bar, for each file.
pub const STEPS: u64 = 1000;

pub struct Work {
    pub options: Export,
    pub files: Vec<PathBuf>,
    /// Cancelled, the export stops after the sequence it is at.
    pub stop: CancellationToken,
    pub bar: ProgressBar,
}

/// How an export ended that did not fail.
pub enum Ended {
    Done(Written),
    /// By a signal: nothing was written.
    Stopped,
    /// The reader of a stream has gone, and asked for no more.
    Unread,
}

#[derive(Default)]
pub struct Written {
    pub sequences: u64,
    /// Target tokens.
    pub positions: u64,
    /// Of the file; `None` for a stream.
    pub bytes: Option<u64>,
}

impl Work {
    pub fn run(self) -> Result<Ended> {
        let out = &self.options.out;
        if target::is_stream(out) {
            self.check_splits()?;
            return self.lines(target::stream(out)?).map(ended);
        }
        self.check_splits()?;
        let unfinished = Unfinished::beside(out, self.options.force, &self.files)?;
        let written = match self.options.format {
            Format::Jsonl => self.lines(unfinished.file()),
            Format::Npz => self.npz(unfinished.file()),
            Format::TopK => self.top_k(unfinished.file()),
        }?;
        if self.stop.is_cancelled() {
            return Ok(Ended::Stopped);
        }
        match written {
            Continue(written) => Ok(Ended::Done(Written { bytes: Some(unfinished.publish()?), ..written })),
            broken_off => Ok(ended(broken_off)),
        }
    }

    fn lines(&self, out: impl Write) -> Result<ControlFlow<Ended, Written>> {
        let mut out = BufWriter::new(out);
        let written = self.each(&[], |header, sequence| {
            let line = line(header, sequence);
            self.unless_unread(writeln!(out, "{line}"))
        })?;
        Ok(match self.unless_unread(out.flush())? {
            Continue(()) => written,
            Break(unread) => Break(unread),
        })
    }

    fn unless_unread(&self, result: io::Result<()>) -> Result<ControlFlow<Ended>> {
        match result {
            Ok(()) => Ok(Continue(())),
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(Break(Ended::Unread)),
            Err(error) if self.options.out == Path::new("-") => Err(lost(error.kind())),
            Err(error) => Err(Error::io(&self.options.out, error)),
        }
    }

    fn top_k(&self, file: &File) -> Result<ControlFlow<Ended, Written>> {
        let mut writer = TopKWriter::new(&self.options.out, file, self.options.k.map(|k| k as usize))?;
        let written = self.each(&[], |header, sequence| writer.push(header, sequence).map(Continue))?;
        if written.is_continue() {
            writer.finish()?;
        }
        Ok(written)
    }

    /// Goes through the shards twice: the size must be known before anything is written.
    fn npz(&self, file: &File) -> Result<ControlFlow<Ended, Written>> {
        let dtype = match self.options.dtype {
            Some(Precision::F16) => Dtype::F16,
            Some(Precision::F32) | None => Dtype::F32,
        };
        self.bar.set_message("sizing");
        let (mut plan, mut hashes) = (NpzPlan::new(dtype), Vec::new());
        for (at, path) in self.files.iter().enumerate() {
            if self.stop.is_cancelled() {
                return Ok(Break(Ended::Stopped));
            }
            let source = files::open(path)?;
            hashes.push(hash(path, &source)?);
            let reader = reader(path, source)?;
            let header = reader.header().clone();
            for group in reader {
                let mut sequences = group.map_err(|error| files::named(path, &error))?;
                sequences.retain(|sequence| self.wants(&header, sequence));
                plan.add(&header, &sequences)?;
            }
            self.show(at, 1.0);
        }
        self.check_size(&plan, dtype)?;
        self.bar.reset();
        self.bar.set_message("writing");
        let mut writer = plan.begin(&self.options.out, BufWriter::new(file))?;
        let written = self.each(&hashes, |_, sequence| writer.push(&sequence.targets).map(Continue))?;
        if written.is_continue() {
            writer.finish()?.flush().map_err(|error| Error::io(&self.options.out, error))?;
        }
        Ok(written)
    }

    fn check_size(&self, plan: &NpzPlan, dtype: Dtype) -> Result<()> {
        let (size, max) = (plan.bytes(), self.options.max_bytes.unwrap_or(DEFAULT_MAX_BYTES));
        if size <= max {
            return Ok(());
        }
        Err(Error::new(
            Code::ObjectTooLarge,
            format!(
                "the arrays would take {} once loaded ({} target tokens x a vocabulary of {} x {} bytes), more than \
                 the {} of --max-bytes; choose fewer rows with --rows, take --dtype f16, or allow {size} bytes",
                bytes(size),
                count(plan.positions()),
                count(u64::from(plan.vocab_size())),
                dtype.bytes(),
                bytes(max)
            ),
        ))
    }

    /// Takes every sequence in turn, until one says to stop or a signal does. Where hashes of the
    /// files are given, a file must still have its own.
    ///
    /// Errors: `RequestInvalid` when there is none: an export of nothing was not asked for.
    fn each(
        &self,
        hashes: &[String],
        mut take: impl FnMut(&Header, &DecodedSequence) -> Result<ControlFlow<Ended>>,
    ) -> Result<ControlFlow<Ended, Written>> {
        let mut written = Written::default();
        for (at, path) in self.files.iter().enumerate() {
            let source = files::open(path)?;
            if let Some(known) = hashes.get(at)
                && *known != hash(path, &source)?
            {
                let message = format!("{}: it changed while it was exported; start again", path.display());
                return Err(Error::new(Code::FileUnreadable, message));
            }
            let reader = reader(path, source)?;
            let (header, rows, mut read) = (reader.header().clone(), reader.rows(), 0u64);
            for group in reader {
                for sequence in group.map_err(|error| files::named(path, &error))? {
                    if self.stop.is_cancelled() {
                        return Ok(Break(Ended::Stopped));
                    }
                    read += 1;
                    self.show(at, read as f64 / rows as f64);
                    if !self.wants(&header, &sequence) {
                        continue;
                    }
                    if let Break(ended) = take(&header, &sequence)? {
                        return Ok(Break(ended));
                    }
                    written.sequences += 1;
                    written.positions += sequence.targets.len() as u64;
                }
            }
        }
        match written.sequences {
            0 => Err(self.nothing()),
            _ => Ok(Continue(written)),
        }
    }

    fn nothing(&self) -> Error {
        let why = match (self.options.rows, self.options.split) {
            (Some(_), _) => {
                "no row of the shards lies in --rows; it counts lines of the prompt set, which `retort shard show` lists"
            }
            (None, Some(_)) => "no shard has rows of that --split",
            (None, None) => "the shards have no rows to export",
        };
        Error::new(Code::RequestInvalid, why)
    }

    /// Whether its split and its row were asked for.
    fn wants(&self, header: &Header, sequence: &DecodedSequence) -> bool {
        self.options.split.is_none_or(|split| split.takes(&header.split))
            && self.options.rows.is_none_or(|rows| rows.contains(sequence.row))
    }

    /// Errors: `RequestInvalid` for shards of both splits where nobody said which: what judges a student
    /// must not train it unnoticed.
    fn check_splits(&self) -> Result<()> {
        if self.options.split.is_some() {
            return Ok(());
        }
        let mut first: Option<(&Path, String)> = None;
        for path in &self.files {
            let split = reader(path, files::open(path)?)?.header().split.clone();
            let (before, known) = first.get_or_insert_with(|| (path, split.clone()));
            if *known != split {
                let message = format!(
                    "{} is of the split {known}, {} of {split}; say which with --split train, held_out or all",
                    before.display(),
                    path.display()
                );
                return Err(Error::new(Code::RequestInvalid, message));
            }
        }
        Ok(())
    }

    /// So many files are done, and that part of the next.
    fn show(&self, files: usize, part: f64) {
        self.bar.set_position((STEPS as f64 * (files as f64 + part)) as u64);
    }
}

fn hash(path: &Path, source: &Source) -> Result<String> {
    source.sha256().map_err(|error| files::named(path, &error))
}

fn reader(path: &Path, source: Source) -> Result<Reader> {
    Reader::open(source, Limits::default()).map_err(|error| files::named(path, &error))
}

fn ended(written: ControlFlow<Ended, Written>) -> Ended {
    match written {
        Continue(written) => Ended::Done(written),
        Break(ended) => ended,
    }
}

fn line(header: &Header, sequence: &DecodedSequence) -> Value {
    let (targets, temperatures) = (&sequence.targets, &header.soft_targets.temperatures);
    // A sample's own probability is known where it was stored; the mean of all is nobody's.
    let own = |e: &usize| targets.heads[*e] || header.tail_logprobs == TailLogprobs::Stored;
    let count = temperatures.len();
    let position = |p: usize| {
        let range = targets.range(p);
        let mut position = json!({
            "ids": targets.ids[range.clone()],
            "mass": targets.masses[range.clone()],
            "logprobs": range.map(|e| Some(e).filter(own).map(|e| targets.logprobs[e])).collect::<Vec<_>>(),
            "top": targets.top_ids[p],
            "label_logprob": targets.label_logprobs[p],
            "residual": targets.residuals[p],
        });
        if count > 0 {
            position["log_sum_exps"] = json!(targets.log_sum_exps[p * count..(p + 1) * count]);
        }
        position
    };
    let mut line = json!({
        "row_id": sequence.row_id,
        "split": header.split,
        "row": sequence.row,
        "tags": sequence.tags,
        "token_ids": sequence.token_ids,
        "target_mask": sequence.target_mask,
        "finish_reason": sequence.finish_reason,
        "targets": (0..targets.len()).map(position).collect::<Vec<_>>(),
    });
    if count > 0 {
        line["temperatures"] = json!(temperatures);
    }
    line
}
