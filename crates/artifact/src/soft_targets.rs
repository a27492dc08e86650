//! Soft-target shards: a teacher's distributions, stored sparsely in Parquet.
//!
//! What is kept of a distribution is its codec ([`retort_core::spec::Codec`]): an exact head, samples of
//! the rest that carry its mass, a bucket, or everything. All codecs have one set of columns and decode
//! into one form, [`SparseTargets`]. A support is a set: its ids are stored by rank in a table of the
//! row group's frequent tokens, sorted, as differences; a log-probability takes one byte. The format
//! is `docs/formats/soft-targets.md`, and what each codec costs and keeps is `docs/fidelity.md`.

mod decode;
mod describe;
mod encode;
pub mod export;
mod fidelity;
mod guard;
mod header;
mod id_table;
mod quantise;
mod schema;
mod source;
mod temperature;
mod v1;

use bytes::Bytes;

pub use decode::{Reader, decode};
pub use describe::{Column, Description, SequenceSummary, describe};
pub use encode::{Writer, Written, encode};
pub use fidelity::Fidelity;
pub use header::{Header, SCHEMA_VERSION, TailLogprobs};
pub use quantise::{MAX_ERROR as QUANTISER_MAX_ERROR, NEAR_ERROR as QUANTISER_NEAR_ERROR, RANGE as QUANTISER_RANGE};
pub use source::Source;

/// One row of a shard as the teacher hands it over: raw, before quantisation.
#[derive(Clone, Debug, PartialEq)]
pub struct Sequence {
    pub row_id: String,
    /// Line in the prompt set, from 0.
    pub row: u64,
    pub tags: Vec<String>,
    /// Prompt and completion, as the model reads them.
    pub token_ids: Vec<u32>,
    /// Same length; true where the token is part of the completion, that is a target. The first
    /// token has nothing before it to be predicted from and is never a target.
    pub target_mask: Vec<bool>,
    /// `stop`, `length` or `given` (scored, not generated).
    pub finish_reason: String,
    /// One for each true of the mask, in order: the distribution that predicts that token, which
    /// is the model's output at the token before it.
    pub positions: Vec<Position>,
}

/// A teacher's distribution at one position. Natural logarithms, temperature 1.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Position {
    /// The most likely tokens `(id, log-probability)`, in any order, no id twice; as many as the
    /// header's codec says, and none for pure sampling.
    pub head: Vec<(u32, f32)>,
    /// Samples of what the head leaves: `(id, times drawn, log-probability in the whole
    /// distribution)`, in any order, no id twice and none of the head's.
    pub tail: Vec<(u32, u8, f32)>,
    /// Log-probability of the token that follows.
    pub label_logprob: f32,
    /// log sum_v p_v^(1/T) over the whole vocabulary, for each of the header's temperatures T.
    pub log_sum_exps: Vec<f32>,
}

/// A written shard.
#[derive(Clone, Debug)]
pub struct Encoded {
    pub bytes: Bytes,
    /// Of `bytes`.
    pub sha256: String,
    pub rows: u64,
    /// Positions that carry a distribution.
    pub target_tokens: u64,
    pub fidelity: Fidelity,
}

/// A shard as read back.
#[derive(Clone, Debug, PartialEq)]
pub struct Shard {
    pub header: Header,
    pub sequences: Vec<DecodedSequence>,
}

impl Shard {
    /// Positions that carry a distribution.
    pub fn target_tokens(&self) -> u64 {
        self.sequences.iter().map(|sequence| sequence.targets.len() as u64).sum()
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct DecodedSequence {
    pub row_id: String,
    /// Line in the prompt set, from 0.
    pub row: u64,
    pub tags: Vec<String>,
    pub token_ids: Vec<u32>,
    pub target_mask: Vec<bool>,
    pub finish_reason: String,
    pub targets: SparseTargets,
}

/// What the losses consume: the positions of one sequence, their supports laid end to end.
///
/// Position `p` has entries `offsets[p]..offsets[p + 1]` of `ids`, `masses`, `logprobs` and `heads`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SparseTargets {
    /// One more than there are positions; starts at 0.
    pub offsets: Vec<u32>,
    /// Strictly increasing within a position, each below the vocabulary's size.
    pub ids: Vec<u32>,
    /// Target mass t_v of each entry. With `residuals` they sum to 1 at each position, but for a bare
    /// top-k, where the rest was lost, and for a threshold's positions whose tail is lighter than it:
    /// those sum to 1 in expectation.
    pub masses: Vec<f32>,
    /// Teacher's log p_v of each entry. For a head entry this is the logarithm of its mass; a
    /// tail entry's mass is its share of the draws, which is another number.
    pub logprobs: Vec<f32>,
    /// True where the entry is of the exact head, false where it is a sample of the rest. A loss does not
    /// ask: the student leaves it empty.
    pub heads: Vec<bool>,
    /// Mass of each position that belongs to no entry but to all other tokens together; 0 unless
    /// the codec keeps a bucket.
    pub residuals: Vec<f32>,
    /// The teacher's most likely token at each position; of those drawn, the one drawn most, where
    /// there is no head.
    pub top_ids: Vec<u32>,
    /// Teacher's log-probability of the actual token at each position.
    pub label_logprobs: Vec<f32>,
    /// [`Position::log_sum_exps`] of each position, one after another.
    pub log_sum_exps: Vec<f32>,
}

impl SparseTargets {
    /// Number of positions.
    pub fn len(&self) -> usize {
        self.label_logprobs.len()
    }

    pub fn is_empty(&self) -> bool {
        self.label_logprobs.is_empty()
    }

    /// Entries of position `p` in `ids`, `masses`, `logprobs` and `heads`.
    pub fn range(&self, p: usize) -> std::ops::Range<usize> {
        self.offsets[p] as usize..self.offsets[p + 1] as usize
    }
}

/// What decoding may take. Everything is checked before memory is taken for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Of the file.
    pub max_bytes: u64,
    pub max_rows: u64,
    pub max_tokens_per_row: u64,
    /// Support entries of a row group, and of a shard that is decoded whole; each takes about 30
    /// bytes while decoding.
    pub max_entries: u64,
}

impl Default for Limits {
    /// 1 GiB, 4096 rows of at most 262,144 tokens, 64 Mi entries (about 2 GiB decoded).
    fn default() -> Self {
        Self { max_bytes: 1 << 30, max_rows: 4096, max_tokens_per_row: 1 << 18, max_entries: 1 << 26 }
    }
}
