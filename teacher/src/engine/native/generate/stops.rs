//! Texts that end a completion.

use retort_core::Result;
use retort_llama::{TextStream, Tokenizer};

/// Watches one completion's text as its tokens come.
pub(super) struct Stops<'a> {
    stream: TextStream<'a>,
    texts: &'a [String],
    /// The end of what was told, as long as the longest text less one byte, and maybe a little longer.
    tail: String,
    longest: usize,
}

impl<'a> Stops<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, texts: &'a [String]) -> Self {
        let longest = texts.iter().map(String::len).max().unwrap_or(0);
        Self { stream: TextStream::new(tokenizer), texts, tail: String::new(), longest }
    }

    /// Whether a text is complete with this token, which may bring more behind it.
    pub(super) fn reached(&mut self, token: u32) -> Result<bool> {
        self.tail.push_str(&self.stream.push(token)?);
        if self.texts.iter().any(|text| self.tail.contains(text.as_str())) {
            return Ok(true);
        }
        let mut keep = self.tail.len().saturating_sub(self.longest.saturating_sub(1));
        while !self.tail.is_char_boundary(keep) {
            keep -= 1;
        }
        self.tail.drain(..keep);
        Ok(false)
    }
}
