//! Published shards of a job, in the order of their index, as they appear.
//!
//! A shard whose bytes are not what was published is never used: it is reported, and the stream waits
//! until another attempt has published it again.

use std::{collections::VecDeque, path::PathBuf, sync::Arc, time::Duration};

use retort_artifact::{
    prompts::Row,
    soft_targets::{DecodedSequence, Header, Limits, Reader, Source},
};
use retort_core::{Code, Error, Kind, Result, state::Split};
use retort_proto::PublishedShard;
use retort_worker::{Attempt, TaskContext};
use tokio::time::Instant;

use crate::init::{Teacher, tokenizer_mismatch};

/// Between two looks at what was published; the first wait of a stretch is the shortest.
const POLL: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(2));
/// A stream that waits for longer than this makes room when another task waits for this student.
const PATIENCE: Duration = Duration::from_secs(20);
/// A stream that waits says so this often.
const REMINDER: Duration = Duration::from_secs(300);
/// How often one shard may be found corrupt before it is given up: the store itself is at fault.
const MAX_WITHDRAWALS: u32 = 5;

/// A shard of which every row was decoded and checked. It lies in a file, and is read again a row group
/// at a time: memory does not grow with the shard.
pub struct Fetched {
    pub published: PublishedShard,
    /// Until its last row group was read.
    reader: Option<Reader>,
}

impl Fetched {
    /// The rows of the next row group; `None` after the last.
    pub async fn next_rows(&mut self) -> Result<Option<Vec<DecodedSequence>>> {
        let Some(mut reader) = self.reader.take() else { return Ok(None) };
        let (group, reader) = blocking(move || Ok((reader.next(), reader))).await?;
        let Some(rows) = group else { return Ok(None) };
        self.reader = Some(reader);
        rows.map(Some)
    }
}

/// Reads the shards of one split one after another.
pub struct ShardStream {
    cx: TaskContext,
    attempt: Attempt,
    split: Split,
    teacher: Teacher,
    /// Holds the shard that is read, without a name.
    folder: PathBuf,
    /// Lowest index that the next shard may have.
    next: u32,
    /// Line of the prompt set that the next shard begins with; `None` at the split's first.
    next_row: Option<u64>,
    queue: VecDeque<PublishedShard>,
    /// The queue ends with the split's last shard.
    complete: bool,
    /// Shard, epoch and count of the last withdrawal: the same epoch is not read again.
    withdrawn: Option<(u32, u64, u32)>,
}

impl ShardStream {
    /// From the split's first shard on. `folder` must exist.
    pub fn new(cx: TaskContext, attempt: Attempt, split: Split, teacher: Teacher, folder: PathBuf) -> Self {
        Self {
            cx,
            attempt,
            split,
            teacher,
            folder,
            next: 0,
            next_row: None,
            queue: VecDeque::new(),
            complete: false,
            withdrawn: None,
        }
    }

    /// The next shard, waited for as long as the attempt lives; `None` after the last.
    /// `attempt-yielded` once it has waited for long and another task waits for this worker.
    pub async fn next(&mut self) -> Result<Option<Fetched>> {
        let mut wait = POLL.0;
        let started = Instant::now();
        let mut reminded = started;
        loop {
            self.cx.check()?;
            if let Some(fetched) = self.try_next().await? {
                return Ok(Some(fetched));
            }
            if reminded.elapsed() >= REMINDER {
                reminded = Instant::now();
                let minutes = started.elapsed().as_secs() / 60;
                let pool = self.attempt.spec.teacher.pool.as_str();
                tracing::warn!(
                    minutes,
                    shard = self.next,
                    pool,
                    "no shard is published; does a teacher of this pool work?"
                );
            }
            if self.complete && self.queue.is_empty() && self.withdrawn.is_none() {
                return Ok(None);
            }
            if started.elapsed() > PATIENCE && self.cx.others_wait() {
                let message = format!("no shard came for {} s and another task waits", PATIENCE.as_secs());
                return Err(Error::new(Code::AttemptYielded, message));
            }
            tokio::select! {
                () = self.cx.cancelled.cancelled() => {}
                () = tokio::time::sleep(wait) => {}
            }
            wait = (wait * 3 / 2).min(POLL.1);
        }
    }

    /// The next shard if it is published and sound now.
    pub async fn try_next(&mut self) -> Result<Option<Fetched>> {
        if self.queue.is_empty() && !(self.complete && self.withdrawn.is_none()) {
            self.list().await?;
        }
        let Some(published) = self.queue.front().cloned() else { return Ok(None) };
        match self.fetch(&published).await {
            Ok((reader, end)) => {
                self.queue.pop_front();
                self.next = published.shard.saturating_add(1);
                self.next_row = end.or(self.next_row);
                self.withdrawn = None;
                Ok(Some(Fetched { published, reader: Some(reader) }))
            }
            Err(error) if is_corrupt(&error) => {
                self.withdraw(&published, error).await?;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    async fn list(&mut self) -> Result<()> {
        let answer = self.cx.list_published_shards(self.split, self.next).await?;
        self.queue = answer.shards.into();
        self.complete = answer.complete;
        if self.queue.iter().zip(self.queue.iter().skip(1)).any(|(a, b)| b.shard != a.shard.saturating_add(1)) {
            return Err(Error::internal("the orchestrator listed published shards with a gap between them"));
        }
        // A withdrawn shard may be listed until the orchestrator has taken it back.
        if let (Some(first), Some((shard, epoch, _))) = (self.queue.front(), self.withdrawn)
            && first.shard == shard
            && first.epoch <= epoch
        {
            self.queue.clear();
        }
        Ok(())
    }

    /// A shard whose rows are sound, and the line after its last; `None` if it has no rows.
    async fn fetch(&self, published: &PublishedShard) -> Result<(Reader, Option<u64>)> {
        let store = &self.cx.store;
        let file = store.get_verified_file(&published.key, &published.sha256, published.bytes, &self.folder).await?;
        let source = Source::of_file(file).map_err(|error| Error::io(&self.folder, error))?;
        let mut reader = blocking(move || Reader::open(source, Limits::default())).await?;
        self.check_header(published, reader.header())?;
        let mut rows = None;
        if published.reused {
            if reader.rows() != published.rows {
                let message =
                    format!("{}: it has {} rows, and {} are published", published.key, reader.rows(), published.rows);
                return Err(Error::new(Code::ShardCorrupt, message));
            }
            rows = Some(self.expected(published).await?);
        }
        blocking(move || {
            let end = check_rows(&mut reader, rows)?;
            reader.rewind();
            Ok((reader, end))
        })
        .await
    }

    fn check_header(&self, published: &PublishedShard, header: &Header) -> Result<()> {
        let job = self.attempt.job.as_str();
        let own = header.job == job && header.shard == published.shard;
        if header.split != self.split.as_str() || !(own || published.reused) {
            return Err(Error::new(
                Code::ShardCorrupt,
                format!(
                    "{} says it is {} shard {} of job {}, not {} shard {} of job {job}",
                    published.key, header.split, header.shard, header.job, self.split, published.shard
                ),
            ));
        }
        // Shards of several teachers do not come to be published in one job.
        if !published.teacher_sha256.is_empty() && header.teacher_sha256 != published.teacher_sha256 {
            return Err(Error::new(
                Code::ShardCorrupt,
                format!(
                    "{} says it was computed with the teacher weights {}, and is published as of {}",
                    published.key, header.teacher_sha256, published.teacher_sha256
                ),
            ));
        }
        if header.tokenizer_sha256 != self.teacher.tokenizer_sha256 {
            return Err(tokenizer_mismatch(
                &format!("the shard {}", published.key),
                &header.tokenizer_sha256,
                &self.teacher,
            ));
        }
        if header.vocab_size != self.teacher.vocab_size {
            return Err(Error::new(
                Code::VocabularyMismatch,
                format!(
                    "the shard {} was computed over a vocabulary of {} and the student has one of {}",
                    published.key, header.vocab_size, self.teacher.vocab_size
                ),
            ));
        }
        Ok(())
    }

    /// The rows that a reused shard must have: its header names the job that computed it.
    async fn expected(&self, published: &PublishedShard) -> Result<Expected> {
        let rows = self.cx.prompt_set(&self.attempt).await?;
        let of_split = |row: &Row| is_of(row, self.split);
        let first = self.next_row.or_else(|| rows.iter().position(of_split).map(|first| first as u64)).unwrap_or(0);
        Ok(Expected { key: published.key.clone(), split: self.split, rows, line: first })
    }

    async fn withdraw(&mut self, published: &PublishedShard, error: Error) -> Result<()> {
        let count = match self.withdrawn {
            Some((shard, _, count)) if shard == published.shard => count + 1,
            _ => 1,
        };
        if count > MAX_WITHDRAWALS {
            let message = format!("shard {} was found corrupt {count} times: {}", published.shard, error.message);
            return Err(Error::new(error.code, message));
        }
        tracing::warn!(
            shard = published.shard,
            epoch = published.epoch,
            code = %error.code,
            "a published shard cannot be used and will be computed again: {}",
            error.chain()
        );
        self.cx.report_corrupt_shard(published.shard, published.epoch, &error.chain()).await?;
        self.withdrawn = Some((published.shard, published.epoch, count));
        self.queue.clear();
        Ok(())
    }
}

/// Rows of the job's own prompt set, from a line on.
struct Expected {
    /// Of the shard, for messages.
    key: String,
    split: Split,
    rows: Arc<Vec<Row>>,
    /// Of the next row.
    line: u64,
}

impl Expected {
    fn check(&mut self, sequence: &DecodedSequence) -> Result<()> {
        let line = self.line;
        let row = usize::try_from(line).ok().and_then(|line| self.rows.get(line)).filter(|row| is_of(row, self.split));
        let id = row.map_or("", |row| &row.id);
        if row.is_none() || sequence.row != line || sequence.row_id != id {
            let message = format!(
                "{}: it has row {:?} of line {}, where the {} rows go on with {id:?} of line {line}",
                self.key, sequence.row_id, sequence.row, self.split
            );
            return Err(Error::new(Code::ShardCorrupt, message));
        }
        self.line += 1;
        Ok(())
    }
}

fn is_of(row: &Row, split: Split) -> bool {
    row.split.unwrap_or(Split::Train) == split
}

/// Decodes every row and holds it against what is expected; the line after the last.
fn check_rows(reader: &mut Reader, mut expected: Option<Expected>) -> Result<Option<u64>> {
    let mut end = None;
    for group in reader {
        for sequence in group? {
            if let Some(expected) = &mut expected {
                expected.check(&sequence)?;
            }
            end = Some(sequence.row.saturating_add(1));
        }
    }
    Ok(end)
}

/// Runs what reads and decodes on a thread that may wait for the disk.
async fn blocking<T: Send + 'static>(read: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let done = tokio::task::spawn_blocking(read).await;
    done.map_err(|error| Error::internal(format!("decoding a shard failed: {error}")))?
}

/// The object is there no more, or is not what was published.
fn is_corrupt(error: &Error) -> bool {
    error.kind() == Kind::Corrupt || error.code == Code::ObjectNotFound
}
