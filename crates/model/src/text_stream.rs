//! An answer as text while its tokens come.

use retort_core::Result;

use crate::Tokenizer;

/// Most tokens whose text waits for another one; a character takes four.
const MOST_PENDING: usize = 16;
/// As tokens may spell U+FFFD itself: at one go, in the letters that stand for bytes, or byte for byte.
const REPLACEMENTS: [&str; 3] = ["\u{fffd}", "\u{ef}\u{bf}\u{bd}", "<0xEF><0xBF><0xBD>"];

/// Turns tokens into text as they come, holding back a character until its last byte is there.
///
/// Takes time in proportion to the tokens, whatever they are: bytes that never become text are told as U+FFFD.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    /// Tokens whose text is not final, after enough before them to decode alike.
    ids: Vec<u32>,
    /// How many of them have been told.
    told: usize,
    /// But for so many bytes at the end of their text: a character that they begin.
    held: usize,
    /// Whether control tokens are left out.
    skip_special: bool,
}

impl<'a> TextStream<'a> {
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, ids: Vec::new(), told: 0, held: 0, skip_special: true }
    }

    /// That tells control tokens too.
    pub(crate) fn of_all(tokenizer: &'a Tokenizer) -> Self {
        Self { skip_special: false, ..Self::new(tokenizer) }
    }

    /// The text that a token completes, often one word, sometimes nothing yet.
    pub fn push(&mut self, token: u32) -> Result<String> {
        self.ids.push(token);
        let mut text = self.pending()?;
        // What may still become a character reads as U+FFFD so far, a byte of it or all.
        let mut begun = text.len() - text.trim_end_matches(char::REPLACEMENT_CHARACTER).len();
        if begun > 0 && self.ends_in_replacement() {
            begun = 0;
        }
        if self.ids.len() - self.told > MOST_PENDING {
            if begun == text.len() && begun == self.held {
                // Control tokens that are left out: they have no text to give, nor surroundings.
                self.ids.truncate(self.told);
                return Ok(String::new());
            }
            // Too many for one character: the last may be begun, none before it.
            begun = begun.min(char::REPLACEMENT_CHARACTER.len_utf8());
        } else if begun == text.len() {
            return Ok(String::new());
        }
        // What was new now only gives the next tokens their surroundings.
        self.ids.drain(..self.told);
        (self.told, self.held) = (self.ids.len(), begun);
        text.truncate(text.len() - begun);
        Ok(text)
    }

    /// What is still held back, when no more will come.
    pub fn finish(self) -> Result<String> {
        self.pending()
    }

    fn pending(&self) -> Result<String> {
        let before = self.tokenizer.decode(&self.ids[..self.told], self.skip_special)?;
        let before = before.get(..before.len().saturating_sub(self.held)).unwrap_or(&before);
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

    /// Whether a U+FFFD at the end of the text is written there, and does not stand for a character begun.
    fn ends_in_replacement(&self) -> bool {
        let last = self.ids[self.ids.len().saturating_sub(3)..].iter();
        let spelled: String = last.filter_map(|&id| self.tokenizer.token(id)).collect();
        REPLACEMENTS.iter().any(|&replacement| spelled.ends_with(replacement))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// One token a byte, in the letters that stand for bytes; a token of two bytes for each merge.
    fn byte_level(merges: &[(&str, &str)]) -> Tokenizer {
        let dir = tempfile::tempdir().unwrap();
        crate::tokenizer::tests::write(dir.path());
        let path = dir.path().join("tokenizer.json");
        let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        for (index, (one, other)) in merges.iter().enumerate() {
            json["model"]["vocab"][format!("{one}{other}")] = json!(257 + index);
        }
        json["model"]["merges"] = json!(merges);
        Tokenizer::from_parts("t", json.to_string().as_bytes(), &json!({})).unwrap()
    }

    /// One token a byte as SentencePiece falls back to them, but for `a` and `b`.
    fn byte_fallback() -> Tokenizer {
        let mut vocab: serde_json::Map<String, Value> =
            (0..256).map(|byte| (format!("<0x{byte:02X}>"), json!(byte + 1))).collect();
        vocab.extend([("<unk>", 0), ("a", 257), ("b", 258)].map(|(token, id)| (token.to_owned(), json!(id))));
        let json = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": null, "post_processor": null,
            "decoder": { "type": "Sequence", "decoders": [{ "type": "ByteFallback" }, { "type": "Fuse" }] },
            "model": { "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                       "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": true,
                       "vocab": vocab, "merges": [] }
        });
        Tokenizer::from_parts("t", json.to_string().as_bytes(), &json!({})).unwrap()
    }

    /// All that is told of these tokens; never are more than some tens of them read anew.
    fn told(tokenizer: &Tokenizer, ids: &[u32]) -> String {
        let (mut stream, mut told) = (TextStream::new(tokenizer), String::new());
        for &id in ids {
            told += &stream.push(id).unwrap();
            assert!(stream.ids.len() <= 2 * (MOST_PENDING + 1), "{}", stream.ids.len());
        }
        told + &stream.finish().unwrap()
    }

    #[test]
    fn a_text_of_replacement_characters_is_told_as_it_comes() {
        let text = "\u{fffd}".repeat(400) + "ab\u{1f600}";
        let mut starts: Vec<usize> = (0..1200).map(|byte| byte / 3 * 3).collect();
        starts.extend([1200, 1201, 1202, 1202, 1202, 1202]);
        for tokenizer in [byte_level(&[]), byte_fallback()] {
            let ids = tokenizer.encode(&text, false).unwrap();
            assert_eq!(told(&tokenizer, &ids), text);
            assert_eq!(tokenizer.starts_in(&ids, &text).unwrap().unwrap(), starts);
        }
    }

    #[test]
    fn characters_that_tokens_share_are_told_one_by_one() {
        // The second byte of a letter and the first of the next.
        let tokenizer = byte_level(&[("\u{a9}", "\u{c3}")]);
        let text = "\u{e9}".repeat(100);
        let ids = tokenizer.encode(&text, false).unwrap();
        assert_eq!(ids.len(), 101);
        assert_eq!(told(&tokenizer, &ids), text);
        let starts: Vec<usize> = (0..=100usize).map(|token| 2 * token.saturating_sub(1)).collect();
        assert_eq!(tokenizer.starts_in(&ids, &text).unwrap().unwrap(), starts);
    }

    #[test]
    fn bytes_that_are_no_text_are_told_as_they_decode() {
        let tokenizer = byte_level(&[]);
        let of = |token: &str| tokenizer.token_to_id(token).unwrap();
        let (no_text, begins, control) = (of("\u{ff}"), of("\u{c3}"), of("<s>"));
        let end = tokenizer.encode("\u{1f600}ab\u{1f600}", false).unwrap();
        for count in (0..40).chain([1000]) {
            let bad = [vec![no_text; count], end.clone(), vec![begins; count]].concat();
            assert_eq!(told(&tokenizer, &bad), tokenizer.decode(&bad, true).unwrap(), "{count}");
            let silent = [vec![begins], vec![control; count], end.clone()].concat();
            assert_eq!(told(&tokenizer, &silent), tokenizer.decode(&silent, true).unwrap(), "{count}");
        }
    }

    #[test]
    fn a_stream_never_tells_half_a_character() {
        let tokenizer = byte_level(&[]);
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
