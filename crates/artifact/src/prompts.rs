//! Prompt sets: JSONL, one row a line, in the form of OpenAI's chat messages.
//!
//! ```json
//! {"id": "refund-1", "messages": [{"role": "user", "content": "Where is my refund?"}],
//!  "tags": ["billing"], "split": "train", "completion": "It is on its way.", "weight": 2}
//! ```
//!
//! Only `messages` is needed. `completion` is what a teacher in score mode judges.

mod overlap;
mod parse;
mod split;
mod stored;
mod text;

use retort_core::{Code, Error, Result};
use serde::Serialize;

pub use overlap::{NGRAM_WORDS, Overlap, overlaps};
pub use parse::{MAX_FILE_BYTES, MAX_LINE_BYTES, line_of, parse, parse_line, read};
pub use retort_core::state::Split;
pub use split::{assign_splits, check_splits};
pub use stored::{check_stored, to_jsonl};

/// One prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub id: String,
    /// Never empty; the last is the user's.
    pub messages: Vec<Message>,
    pub tags: Vec<String>,
    /// None until [`assign_splits`] has decided, unless the file says.
    pub split: Option<Split>,
    /// What the assistant is to answer; score mode needs it.
    pub completion: Option<String>,
    /// Of a completion that was given in pieces of other weights than 1: these, which end to end are all of it.
    pub pieces: Vec<Piece>,
    /// Of each of its target tokens in training, 1 unless the file says otherwise; 0 trains on none of them.
    pub weight: f64,
}

/// A part of a completion, whose target tokens have a weight of their own.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Piece {
    /// Of the completion's text; never 0.
    pub bytes: usize,
    /// Times the row's; 0 trains on none of them.
    pub weight: f64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Message {
    pub role: Role,
    pub content: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    System,
    User,
    Assistant,
}

impl Role {
    /// As chat templates write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

impl Row {
    /// Weight of what stands at this byte of the completion; its last piece's of what stands behind it.
    pub fn weight_at(&self, byte: usize) -> f64 {
        let mut end = 0;
        let piece = self.pieces.iter().find(|piece| {
            end += piece.bytes;
            byte < end
        });
        self.weight * piece.or(self.pieces.last()).map_or(1.0, |piece| piece.weight)
    }
}

/// Refuses a prompt set for score mode in which a row has no completion. `text` is what the rows
/// were parsed from.
pub fn require_completions(name: &str, text: &[u8], rows: &[Row]) -> Result<()> {
    match rows.iter().position(|row| row.completion.is_none()) {
        None => Ok(()),
        Some(row) => Err(Error::new(
            Code::PromptMalformed,
            format!(
                "{name} line {}: there is no \"completion\", which the teacher is to score; add one to every row, or \
                 set teacher.mode to generate",
                line_of(text, row)
            ),
        )),
    }
}

#[cfg(test)]
mod tests;
