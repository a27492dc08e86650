//! An answer as text while its tokens come.

use retort_core::Result;

use crate::Tokenizer;

/// Turns tokens into text as they come, holding back a character until its last byte is there.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    /// Tokens whose text is not final, after enough before them to decode alike.
    ids: Vec<u32>,
    /// How many of them have been told.
    told: usize,
    /// Whether control tokens are left out.
    skip_special: bool,
}

impl<'a> TextStream<'a> {
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, ids: Vec::new(), told: 0, skip_special: true }
    }

    /// That tells control tokens too.
    pub(crate) fn of_all(tokenizer: &'a Tokenizer) -> Self {
        Self { skip_special: false, ..Self::new(tokenizer) }
    }

    /// The text that a token completes, often one word, sometimes nothing yet.
    pub fn push(&mut self, token: u32) -> Result<String> {
        self.ids.push(token);
        let text = self.pending()?;
        if text.is_empty() || text.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        // What was new now only gives the next tokens their surroundings.
        self.ids.drain(..self.told);
        self.told = self.ids.len();
        Ok(text)
    }

    /// What is still held back, when no more will come.
    pub fn finish(self) -> Result<String> {
        self.pending()
    }

    fn pending(&self) -> Result<String> {
        let before = self.tokenizer.decode(&self.ids[..self.told], self.skip_special)?;
        let all = self.tokenizer.decode(&self.ids, self.skip_special)?;
        // Where a token changes how those before it decode, what was told cannot be taken back.
        let same: usize = before
            .chars()
            .zip(all.chars())
            .take_while(|(one, other)| one == other)
            .map(|(one, _)| one.len_utf8())
            .sum();
        Ok(all[same..].to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_never_tells_half_a_character() {
        let dir = tempfile::tempdir().unwrap();
        crate::tokenizer::tests::write(dir.path());
        let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
        let text = "a\u{e9}\u{4f60}\u{1f600}!";
        let ids = tokenizer.encode(text, false).unwrap();
        let mut stream = TextStream::new(&tokenizer);
        let told: Vec<String> =
            ids.iter().map(|&id| stream.push(id).unwrap()).filter(|told| !told.is_empty()).collect();
        assert_eq!(told, ["a", "\u{e9}", "\u{4f60}", "\u{1f600}", "!"]);
        assert_eq!(stream.finish().unwrap(), "");

        let mut stream = TextStream::new(&tokenizer);
        assert!(ids[..2].iter().map(|&id| stream.push(id).unwrap()).collect::<String>() == "a");
        assert_eq!(stream.finish().unwrap(), "\u{fffd}", "what never became a character");
    }
}
