//! The tokenizer that a GGUF file embeds, as its metadata state it, checked.

use std::collections::HashMap;

use retort_core::Result;

use super::metadata::Metadata;
use super::pre_tokenizer::PreTokenizer;

/// Beyond every token there is; bounds the search for merges.
const MAX_TOKEN_BYTES: usize = 4096;

#[derive(Debug)]
pub(crate) struct Vocabulary {
    pub(crate) model: Model,
    /// In the order of their ids.
    pub(crate) tokens: Vec<Token>,
    pub(crate) bos: Option<u32>,
    pub(crate) eos: Option<u32>,
    pub(crate) pad: Option<u32>,
    pub(crate) unknown: Option<u32>,
    /// Every id that ends an answer: end of sequence, of turn, of message.
    pub(crate) ends: Vec<u32>,
    /// Whether encoding puts bos before, and eos behind, a text.
    pub(crate) add_bos: bool,
    pub(crate) add_eos: bool,
    pub(crate) chat_template: Option<String>,
}

/// One entry of the vocabulary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    pub text: String,
    pub kind: TokenKind,
}

/// What a token is for, as `tokenizer.ggml.token_type` says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenKind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    /// Fills a hole in the ids.
    Unused,
    /// One byte, `<0x00>` to `<0xFF>`.
    Byte,
}

#[derive(Debug)]
pub(crate) enum Model {
    /// Byte-level BPE, GGUF's `gpt2`.
    ByteLevel { pre: PreTokenizer, merges: Vec<(String, String)> },
    /// SentencePiece BPE, GGUF's `llama`.
    SentencePiece { scores: Vec<f64>, add_space_prefix: bool },
}

impl TokenKind {
    const ALL: [Self; 6] = [Self::Normal, Self::Unknown, Self::Control, Self::UserDefined, Self::Unused, Self::Byte];

    /// As `tokenizer.ggml.token_type` has it.
    pub fn number(self) -> i32 {
        match self {
            Self::Normal => 1,
            Self::Unknown => 2,
            Self::Control => 3,
            Self::UserDefined => 4,
            Self::Unused => 5,
            Self::Byte => 6,
        }
    }

    /// Files from before there were types have 0.
    fn from_number(number: i64) -> Option<Self> {
        if number == 0 {
            return Some(Self::Normal);
        }
        Self::ALL.into_iter().find(|kind| i64::from(kind.number()) == number)
    }
}

impl Token {
    /// Fills a hole in the ids, or a row of the embedding that no text has.
    pub fn padding(id: usize) -> Self {
        Self { text: format!("[PAD{id}]"), kind: TokenKind::Unused }
    }
}

impl Vocabulary {
    pub(crate) fn read(metadata: &Metadata) -> Result<Self> {
        let tokens = tokens(metadata)?;
        let name = metadata.required("tokenizer.ggml.model", metadata.string("tokenizer.ggml.model"))?;
        let model = match name {
            "gpt2" => byte_level(metadata, &tokens)?,
            "llama" => sentence_piece(metadata, &tokens)?,
            other => {
                return Err(metadata.unsupported(format!(
                    "the tokenizer is of type {other}; retort reads gpt2 (byte-level BPE) and llama (SentencePiece BPE)"
                )));
            }
        };
        let special = |name: &str| -> Result<Option<u32>> {
            let key = format!("tokenizer.ggml.{name}_token_id");
            match metadata.unsigned(&key)? {
                Some(id) if id < tokens.len() as u64 => Ok(Some(id as u32)),
                Some(id) => Err(metadata.malformed(format!("{key} is {id}, but there are {} tokens", tokens.len()))),
                None => Ok(None),
            }
        };
        let (bos, eos) = (special("bos")?, special("eos")?);
        let mut ends: Vec<u32> = Vec::new();
        for end in [eos, special("eot")?, special("eom")?].into_iter().flatten() {
            if !ends.contains(&end) {
                ends.push(end);
            }
        }
        let bos_by_default = match &model {
            Model::ByteLevel { pre, .. } => *pre == PreTokenizer::Llama3,
            Model::SentencePiece { .. } => true,
        };
        let unknown = match special("unknown")? {
            Some(id) => Some(id),
            None => tokens.iter().position(|token| token.kind == TokenKind::Unknown).map(|id| id as u32),
        };
        let add_bos = metadata.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(bos_by_default);
        let add_eos = metadata.bool("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
        for (added, id, name) in [(add_bos, bos, "bos"), (add_eos, eos, "eos")] {
            if added && id.is_none() {
                return Err(metadata.malformed(format!("texts get a {name} token, but there is none")));
            }
        }
        Ok(Self {
            pad: special("padding")?,
            unknown,
            bos,
            eos,
            ends,
            add_bos,
            add_eos,
            chat_template: metadata.string("tokenizer.chat_template")?.map(str::to_owned),
            model,
            tokens,
        })
    }

    /// The text of a special token.
    pub(crate) fn text(&self, id: Option<u32>) -> Option<&str> {
        id.and_then(|id| self.tokens.get(id as usize)).map(|token| token.text.as_str())
    }
}

fn tokens(metadata: &Metadata) -> Result<Vec<Token>> {
    let key = "tokenizer.ggml.tokens";
    let texts = metadata.required(key, metadata.strings(key))?;
    if texts.is_empty() {
        return Err(metadata.malformed("the vocabulary is empty"));
    }
    let kinds = metadata.integers("tokenizer.ggml.token_type")?;
    if let Some(kinds) = kinds
        && kinds.len() != texts.len()
    {
        return Err(metadata.malformed(format!("{} tokens have {} types", texts.len(), kinds.len())));
    }
    let mut seen = HashMap::with_capacity(texts.len());
    let mut tokens = Vec::with_capacity(texts.len());
    for (id, text) in texts.iter().enumerate() {
        if text.is_empty() || text.len() > MAX_TOKEN_BYTES {
            return Err(
                metadata.malformed(format!("token {id} has {} bytes, outside 1 to {MAX_TOKEN_BYTES}", text.len()))
            );
        }
        let number = kinds.map_or(1, |kinds| kinds[id]);
        let Some(kind) = TokenKind::from_number(number) else {
            return Err(metadata.malformed(format!("token {id} has the unknown type {number}")));
        };
        if let Some(other) = seen.insert(text.as_str(), id) {
            return Err(metadata.malformed(format!("tokens {other} and {id} are both {text:?}")));
        }
        tokens.push(Token { text: text.clone(), kind });
    }
    Ok(tokens)
}

fn byte_level(metadata: &Metadata, tokens: &[Token]) -> Result<Model> {
    let pre = match metadata.string("tokenizer.ggml.pre")? {
        None | Some("default") => {
            tracing::warn!(
                file = metadata.place(),
                "the file does not say how its tokenizer cuts text; assuming GPT-2's way"
            );
            PreTokenizer::Gpt2
        }
        Some(name) => PreTokenizer::from_name(name).ok_or_else(|| {
            metadata.unsupported(format!(
                "the tokenizer cuts text in the way of {name}; retort knows {}",
                PreTokenizer::names()
            ))
        })?,
    };
    let known: HashMap<&str, ()> = tokens.iter().map(|token| (token.text.as_str(), ())).collect();
    let key = "tokenizer.ggml.merges";
    let lines = metadata.required(key, metadata.strings(key))?;
    let mut merges = Vec::with_capacity(lines.len());
    for (number, line) in lines.iter().enumerate() {
        // Byte-level texts hold no space: byte 32 is written as another character.
        let Some((left, right)) = line.split_once(' ') else {
            return Err(metadata.malformed(format!("merge {number} is {line:?}, not two tokens with a space between")));
        };
        let merged = format!("{left}{right}");
        if let Some(missing) = [left, right, &merged].into_iter().find(|text| !known.contains_key(text)) {
            return Err(metadata.malformed(format!("merge {number}, {line:?}, needs the token {missing:?}")));
        }
        merges.push((left.to_owned(), right.to_owned()));
    }
    Ok(Model::ByteLevel { pre, merges })
}

fn sentence_piece(metadata: &Metadata, tokens: &[Token]) -> Result<Model> {
    if metadata.contains("tokenizer.ggml.precompiled_charsmap") {
        return Err(metadata.unsupported("the tokenizer normalises text with a table of its own"));
    }
    let key = "tokenizer.ggml.scores";
    let scores = metadata.required(key, metadata.floats(key))?;
    if scores.len() != tokens.len() {
        return Err(metadata.malformed(format!("{} tokens have {} scores", tokens.len(), scores.len())));
    }
    if let Some(id) = scores.iter().position(|score| !score.is_finite()) {
        return Err(metadata.malformed(format!("the score of token {id} is {}", scores[id])));
    }
    let add_space_prefix = metadata.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    Ok(Model::SentencePiece { scores: scores.to_vec(), add_space_prefix })
}
