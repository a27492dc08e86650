//! What a stage is told, and what it answers: plain data, which crosses threads and machines alike.

use retort_artifact::soft_targets::Position;
use retort_core::{Code, Error, Result};
use retort_llama::{Part, Piece as Run, Room, Share};

use crate::{capture::Capture, sampling::Sampler};

/// The start of a shard. Whatever slots held before is forgotten.
#[derive(Clone, Debug, PartialEq)]
pub struct Begin {
    pub capture: Capture,
    /// How [`Ask::Next`] draws; `None` where nothing is drawn.
    pub sampler: Option<Sampler>,
    pub room: Room,
}

/// Tokens that go through the layers together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    pub lane: u32,
    /// Done before the pieces, in order.
    pub shares: Vec<Share>,
    pub pieces: Vec<Piece>,
    /// Of all pieces, one after another.
    pub token_ids: Vec<u32>,
}

/// New tokens of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    pub run: Run,
    /// Names the sequence's random streams: see [`stream`].
    pub stream: u64,
    pub ask: Ask,
}

/// What is wanted of a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Only its keys and values.
    Nothing,
    /// Soft targets of its own tokens from this index on, the first excepted: what predicts that one is
    /// not in the piece. Where the sequence goes on in a later step, of the token `next` too.
    Score { first: u32, next: Option<u32> },
    /// The token that follows it, drawn, and its soft target.
    Next,
}

/// A soft target and the token it predicts, given or drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Taken {
    pub token: u32,
    pub position: Position,
}

/// Hidden states between two stages: packed `[tokens, hidden]`, little endian.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Activations {
    pub tokens: u32,
    pub bytes: Vec<u8>,
}

/// What a stage makes of a step.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// For the next stage.
    Activations(Activations),
    /// Of the last stage: what the pieces asked for, piece after piece.
    Taken(Vec<Taken>),
}

/// What one stage holds of the teacher, told by whoever asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    pub part: Part,
    /// Bytes of a number of its activations.
    pub number_bytes: u32,
    pub hidden_size: u32,
    /// Bytes of weights that were read.
    pub bytes_read: u64,
}

/// The name of a completion's random streams: line of the prompt set, and which of its completions.
pub fn stream(row: u64, completion: u32) -> u64 {
    row | u64::from(completion) << 40
}

impl Activations {
    /// Refuses bytes that are not as many as tokens and hidden size call for.
    pub fn check(&self, number_bytes: usize, hidden: i64) -> Result<()> {
        let needed = u64::from(self.tokens) * hidden.unsigned_abs() * number_bytes as u64;
        if self.bytes.len() as u64 == needed {
            return Ok(());
        }
        let (held, tokens) = (self.bytes.len(), self.tokens);
        let message = format!("{held} bytes of activations for {tokens} tokens of {hidden}; it must be {needed}");
        Err(Error::new(Code::RequestInvalid, message))
    }
}

impl Step {
    /// How many [`Taken`] answer it.
    pub fn wanted(&self) -> usize {
        self.pieces.iter().map(Piece::wanted).sum()
    }
}

impl Piece {
    /// How many [`Taken`] answer it.
    pub fn wanted(&self) -> usize {
        match self.ask {
            Ask::Nothing => 0,
            Ask::Score { first, next } => {
                self.run.tokens.saturating_sub(self.first_scored(first)) as usize + usize::from(next.is_some())
            }
            Ask::Next => 1,
        }
    }

    /// The first index whose prediction lies in this piece too.
    pub(crate) fn first_scored(&self, first: u32) -> u32 {
        first.max(1)
    }
}
