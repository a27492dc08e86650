//! Published shards of a job, in the order of their index, as they appear.
//!
//! A shard whose bytes are not what was published is never used: it is reported, and the stream waits
//! until another attempt has published it again.

use std::{collections::VecDeque, time::Duration};

use retort_artifact::{
    prompts::Row,
    soft_targets::{self, Limits, Shard},
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
/// How often one shard may be found corrupt before it is given up: the store itself is at fault.
const MAX_WITHDRAWALS: u32 = 5;

/// A verified shard and where it came from.
#[derive(Clone, Debug)]
pub struct Fetched {
    pub published: PublishedShard,
    pub shard: Shard,
}

/// Reads the shards of one split one after another.
pub struct ShardStream {
    cx: TaskContext,
    attempt: Attempt,
    split: Split,
    teacher: Teacher,
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
    /// From the split's first shard on.
    pub fn new(cx: TaskContext, attempt: Attempt, split: Split, teacher: Teacher) -> Self {
        Self {
            cx,
            attempt,
            split,
            teacher,
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
        loop {
            self.cx.check()?;
            if let Some(fetched) = self.try_next().await? {
                return Ok(Some(fetched));
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
            Ok(shard) => {
                self.queue.pop_front();
                self.next = published.shard.saturating_add(1);
                self.next_row = shard.sequences.last().map(|last| last.row.saturating_add(1)).or(self.next_row);
                self.withdrawn = None;
                Ok(Some(Fetched { published, shard }))
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

    async fn fetch(&self, published: &PublishedShard) -> Result<Shard> {
        let bytes = self.cx.store.get_verified(&published.key, &published.sha256, published.bytes).await?;
        let decoded = tokio::task::spawn_blocking(move || soft_targets::decode(bytes, Limits::default())).await;
        let shard = decoded.map_err(|error| Error::internal(format!("decoding a shard failed: {error}")))??;
        let header = &shard.header;
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
        if published.reused {
            let rows = self.cx.prompt_set(&self.attempt).await?;
            self.check_rows(published, &shard, &rows)?;
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
        Ok(shard)
    }

    /// A reused shard's header names the job that computed it: its rows say whether it is this one.
    fn check_rows(&self, published: &PublishedShard, shard: &Shard, rows: &[Row]) -> Result<()> {
        let wrong = |what: String| Err(Error::new(Code::ShardCorrupt, format!("{}: {what}", published.key)));
        if shard.sequences.len() as u64 != published.rows {
            return wrong(format!("it has {} rows, and {} are published", shard.sequences.len(), published.rows));
        }
        let of_split = |row: &Row| row.split.unwrap_or(Split::Train) == self.split;
        let first = self.next_row.or_else(|| rows.iter().position(of_split).map(|first| first as u64)).unwrap_or(0);
        for (line, sequence) in (first..).zip(&shard.sequences) {
            let row = usize::try_from(line).ok().and_then(|line| rows.get(line)).filter(|row| of_split(row));
            let id = row.map_or("", |row| &row.id);
            if row.is_none() || sequence.row != line || sequence.row_id != id {
                return wrong(format!(
                    "it has row {:?} of line {}, where the {} rows go on with {id:?} of line {line}",
                    sequence.row_id, sequence.row, self.split
                ));
            }
        }
        Ok(())
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

/// The object is there no more, or is not what was published.
fn is_corrupt(error: &Error) -> bool {
    error.kind() == Kind::Corrupt || error.code == Code::ObjectNotFound
}
