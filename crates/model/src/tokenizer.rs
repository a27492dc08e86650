//! Text to token ids and back, and conversations to prompts, by the model's own files.

use std::{collections::HashMap, fs, path::Path};

use retort_core::{Code, Error, Result};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use time::OffsetDateTime;

use crate::{
    ChatMessage, ChatTemplate, TextStream, chat_template,
    file::{malformed, read, read_json_if_there},
};

/// Large vocabularies come to some twenty megabytes.
const MAX_TOKENIZER_BYTES: u64 = 1 << 28;
const MAX_CONFIG_BYTES: u64 = 1 << 24;

/// What a folder holds beside config and weights, and a model made from it needs too.
const TEXT_FILES: [&str; 5] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
];

/// A `tokenizer.json` and the chat template beside it.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    template: Option<ChatTemplate>,
    special_tokens: Vec<(String, String)>,
    place: String,
    vocab_size: u32,
    sha256: String,
}

impl Tokenizer {
    /// Reads `tokenizer.json`, and, where there are any, `tokenizer_config.json`,
    /// `special_tokens_map.json` and `chat_template.jinja`.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let bytes = read(&path, MAX_TOKENIZER_BYTES)?;
        let config = read_json_if_there(&dir.join("tokenizer_config.json"), MAX_CONFIG_BYTES)?;
        let map = read_json_if_there(&dir.join("special_tokens_map.json"), MAX_CONFIG_BYTES)?;
        let source = chat_template::find_source(dir, &config)?;
        Self::assemble(&path.display().to_string(), &bytes, special_tokens(&[&config, &map]), source)
    }

    /// As [`Tokenizer::from_dir`] of a folder with these two files, `tokenizer.json` and
    /// `tokenizer_config.json`; errors call both `place`.
    pub fn from_parts(place: &str, tokenizer: &[u8], config: &Value) -> Result<Self> {
        let source = chat_template::source_in(place, config)?.map(|source| (place.to_owned(), source));
        Self::assemble(place, tokenizer, special_tokens(&[config]), source)
    }

    /// `template` is the file it stands in, and its text.
    fn assemble(
        place: &str,
        tokenizer: &[u8],
        special_tokens: Vec<(String, String)>,
        template: Option<(String, String)>,
    ) -> Result<Self> {
        let mut inner = tokenizers::Tokenizer::from_bytes(tokenizer)
            .map_err(|error| malformed(place, format!("is no tokenizer: {error}")))?;
        // A tokenizer saved in training may pad or cut; texts here are taken whole.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| malformed(place, error))?;
        let vocab_size = inner.get_vocab(true).into_values().max().map_or(0, |id| id.saturating_add(1));
        let compile =
            |(place, source): (String, String)| ChatTemplate::compile(&place, &source, special_tokens.clone(), None);
        let template = template.map(compile).transpose()?;
        Ok(Self { inner, template, special_tokens, place: place.to_owned(), vocab_size, sha256: sha256_hex(tokenizer) })
    }

    /// [`ChatTemplate::probe`] of the model's template, if it has one.
    pub fn probe_template(&self) -> Result<()> {
        self.template.as_ref().map_or(Ok(()), ChatTemplate::probe)
    }

    /// Makes the chat template's date this one instead of the present.
    pub fn pin_date(&mut self, now: OffsetDateTime) -> Result<()> {
        self.template = self.template.as_ref().map(|template| template.at(Some(now))).transpose()?;
        Ok(())
    }

    /// Token ids of a text. `add_special` adds what the model expects around a plain text, such as
    /// a first token; a rendered chat has it already.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, add_special).map_err(|error| malformed(&self.place, error))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of token ids; bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.inner.decode(ids, skip_special).map_err(|error| malformed(&self.place, error))
    }

    /// Where in `text` the character lies in which each token begins, bytes: 0 for tokens before the text, its length
    /// for those behind it. `None` where the tokens do not spell it, white space around it aside, as when the
    /// tokenizer normalises what it reads.
    pub fn starts_in(&self, ids: &[u32], text: &str) -> Result<Option<Vec<usize>>> {
        let (mut stream, mut told) = (TextStream::of_all(self), String::new());
        let mut starts = Vec::with_capacity(ids.len());
        for &id in ids {
            starts.push(told.len());
            told += &stream.push(id)?;
        }
        told += &stream.finish()?;
        let trimmed = text.trim();
        let before = text.len() - text.trim_start().len();
        let found = told.find(text).map(|at| (at, 0));
        let Some((at, from)) = found.or_else(|| told.find(trimmed).map(|at| (at, before))) else { return Ok(None) };
        let place = |start: usize| if start < at { 0 } else { (start - at + from).min(text.len()) };
        Ok(Some(starts.into_iter().map(place).collect()))
    }

    /// One more than the highest token id. A model's embedding may have more rows.
    pub fn vocab_size(&self) -> u32 {
        self.vocab_size
    }

    /// Every token with its id.
    pub fn vocabulary(&self) -> HashMap<String, u32> {
        self.inner.get_vocab(true)
    }

    /// `VocabularyMismatch` when a token's id is beyond a model's `vocab_size`.
    pub fn require_fits(&self, vocab_size: i64) -> Result<()> {
        if i64::from(self.vocab_size) <= vocab_size {
            return Ok(());
        }
        Err(Error::new(
            Code::VocabularyMismatch,
            format!(
                "{}: its highest token is {}, but config.json beside it says a vocabulary of {vocab_size} tokens",
                self.place,
                self.vocab_size - 1
            ),
        ))
    }

    /// The prompt's text by the model's template. Control tokens that stand in a message become
    /// what they are in the vocabulary, as with transformers.
    pub fn render_chat(&self, messages: &[ChatMessage], add_generation_prompt: bool) -> Result<String> {
        self.require_template()?.render(messages, add_generation_prompt)
    }

    /// The chat template, of a model that has one.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// `ModelMalformed` for a model without a chat template.
    pub fn require_template(&self) -> Result<&ChatTemplate> {
        self.template()
            .ok_or_else(|| malformed(&self.place, "comes without a chat template; put a chat_template.jinja beside it"))
    }

    /// [`Tokenizer::render_chat`], encoded.
    pub fn encode_chat(&self, messages: &[ChatMessage], add_generation_prompt: bool) -> Result<Vec<u32>> {
        self.encode(&self.render_chat(messages, add_generation_prompt)?, false)
    }

    /// The id of `eos_token`. Generation stops at more: see [`crate::Config::eos_token_ids`].
    pub fn eos_id(&self) -> Option<u32> {
        self.special_id("eos_token")
    }

    /// The id of a special token by its role, such as `bos_token` or `pad_token`.
    pub fn special_id(&self, role: &str) -> Option<u32> {
        let (_, token) = self.special_tokens.iter().find(|(name, _)| name == role)?;
        self.inner.token_to_id(token)
    }

    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// As `tokenizer.json` writes it.
    pub(crate) fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// What `tokenizer.json` says, in the one form that its older spellings are read into: merges are pairs, and
    /// every field is there.
    pub fn to_json(&self) -> Result<Value> {
        serde_json::to_value(&self.inner).map_err(|error| malformed(&self.place, error))
    }

    /// SHA-256 of `tokenizer.json`, in hexadecimal.
    pub fn tokenizer_sha256(&self) -> String {
        self.sha256.clone()
    }

    /// SHA-256 of the template's text, in hexadecimal; of nothing where there is no template.
    pub fn chat_template_sha256(&self) -> String {
        sha256_hex(self.template.as_ref().map_or("", ChatTemplate::source).as_bytes())
    }
}

/// Copies the tokenizer's files, the chat template and `generation_config.json`, those that exist,
/// so that a folder of new weights is complete.
pub fn copy_text_files(from: &Path, into: &Path) -> Result<()> {
    fs::create_dir_all(into).map_err(|error| Error::io(into, error))?;
    for name in TEXT_FILES {
        let source = from.join(name);
        if source.exists() {
            let target = into.join(name);
            fs::copy(&source, &target).map_err(|error| Error::io(&target, error))?;
        }
    }
    Ok(())
}

/// Pairs such as `("bos_token", "<s>")`; the first file that names a role counts.
fn special_tokens(files: &[&Value]) -> Vec<(String, String)> {
    let mut tokens: Vec<(String, String)> = Vec::new();
    for file in files.iter().filter_map(|file| file.as_object()) {
        for (role, value) in file.iter().filter(|(role, _)| role.ends_with("_token")) {
            let token = value.as_str().or_else(|| value.get("content").and_then(Value::as_str));
            if let Some(token) = token
                && !tokens.iter().any(|(known, _)| known == role)
            {
                tokens.push((role.clone(), token.to_owned()));
            }
        }
    }
    tokens
}

fn sha256_hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
pub(crate) mod tests;
