//! A Hugging Face tokenizer as GGUF's metadata state it: tokens with their kinds, merges or scores, special tokens, how
//! text is cut, and the chat template.
//!
//! Nothing is guessed. Text is cut in a way that llama.cpp has a name for, or the export is refused; whether texts get
//! a first and a last token is asked of the tokenizer itself.

mod scores;

use std::{collections::HashSet, path::Path};

use retort_core::{Code, Error, Result};
use retort_import::gguf::{PreTokenizer, SPACE, Token, TokenKind};
use retort_model::{Config, Tokenizer};
use serde_json::{Value as Json, json};

use crate::header::Value;

/// Rows that an embedding may have beyond the tokenizer: each gets a token in the file.
const MAX_TEXTLESS: i64 = 1 << 16;

/// All of `tokenizer.*`; `folder` is the model's, for errors.
pub(crate) fn keys(tokenizer: &Tokenizer, config: &Config, folder: &Path) -> Result<Vec<(String, Value)>> {
    tokenizer.require_fits(config.vocab_size)?;
    let place = folder.join("tokenizer.json").display().to_string();
    let textless = config.vocab_size - i64::from(tokenizer.vocab_size());
    if textless > MAX_TEXTLESS {
        let what = format!("{place}: {textless} rows of the embedding have no token; no model pads it by so many");
        return Err(Error::new(Code::ModelMalformed, what));
    }
    let source = Source { json: tokenizer.to_json()?, place };
    let merges = source.merges()?;
    let mut keys = Vec::new();
    let mut add = |key: &str, value: Value| keys.push((format!("tokenizer.ggml.{key}"), value));
    let tokens = match source.cut()? {
        Cut::Bytes(pre) => {
            let tokens = source.tokens(config, false)?;
            add("model", Value::String("gpt2".to_owned()));
            add("pre", Value::String(pre.name().to_owned()));
            let lines = merges.iter().map(|(left, right)| source.line(left, right)).collect::<Result<_>>()?;
            add("merges", Value::Strings(lines));
            tokens
        }
        Cut::SentencePiece { add_space_prefix } => {
            let tokens = source.tokens(config, true)?;
            let scores = scores::scores(&tokens, &merges).ok_or_else(|| {
                source.unsupported("its merges are not those of a SentencePiece model, whose scores GGUF keeps")
            })?;
            add("model", Value::String("llama".to_owned()));
            add("pre", Value::String("default".to_owned()));
            add("scores", Value::F32s(scores));
            add("add_space_prefix", Value::Bool(add_space_prefix));
            tokens
        }
    };
    add("token_type", Value::I32s(tokens.iter().map(|token| token.kind.number()).collect()));
    add("tokens", Value::Strings(tokens.into_iter().map(|token| token.text).collect()));
    keys.extend(special(tokenizer, config, &source)?);
    if let Some(template) = tokenizer.template() {
        keys.push(("tokenizer.chat_template".to_owned(), Value::String(template.source().to_owned())));
    }
    Ok(keys)
}

/// How text becomes what is merged.
enum Cut {
    /// Into words of bytes.
    Bytes(PreTokenizer),
    /// Not at all: a space becomes a character of its own.
    SentencePiece { add_space_prefix: bool },
}

/// A `tokenizer.json`, of a tokenizer that was read from it.
struct Source {
    json: Json,
    place: String,
}

impl Source {
    fn cut(&self) -> Result<Cut> {
        let (model, pre, normalizer) =
            (&self.json["model"], steps(&self.json["pre_tokenizer"]), steps(&self.json["normalizer"]));
        if model["type"] != "BPE" {
            return Err(self.unsupported(&format!("it is of type {}; GGUF is written for BPE alone", model["type"])));
        }
        for key in ["continuing_subword_prefix", "end_of_word_suffix"] {
            if !model[key].as_str().unwrap_or_default().is_empty() {
                return Err(self.unsupported(&format!("its \"{key}\" has no form in GGUF")));
            }
        }
        let known = PreTokenizer::ALL.into_iter().find(|known| steps(&known.to_json()) == pre);
        if let Some(known) = known {
            // llama.cpp composes no characters, and knows by the name whether a whole word is looked up first.
            let composes = known == PreTokenizer::Qwen2 && normalizer == [json!({"type": "NFC"})];
            if !normalizer.is_empty() && !composes {
                return Err(
                    self.unsupported("it changes the text before it cuts it, in a way that GGUF has no form for")
                );
            }
            if model["ignore_merges"].as_bool().unwrap_or_default() != (known == PreTokenizer::Llama3) {
                return Err(self.unsupported(&format!(
                    "its \"ignore_merges\" is {}, but llama.cpp has it the other way round for {}",
                    model["ignore_merges"],
                    known.name()
                )));
            }
            return Ok(Cut::Bytes(known));
        }
        let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
        let prepend = json!({"type": "Prepend", "prepend": SPACE});
        match (normalizer.as_slice(), pre.as_slice()) {
            _ if model["byte_fallback"] != true => {}
            ([one, other], []) if *one == prepend && *other == replace => {
                return Ok(Cut::SentencePiece { add_space_prefix: true });
            }
            ([one], []) if *one == replace => return Ok(Cut::SentencePiece { add_space_prefix: false }),
            ([], [metaspace])
                if metaspace["type"] == "Metaspace"
                    && metaspace["replacement"] == SPACE
                    && metaspace["split"] == false =>
            {
                return Ok(Cut::SentencePiece { add_space_prefix: metaspace["prepend_scheme"] != "never" });
            }
            _ => {}
        }
        Err(self.unsupported(&format!(
            "it cuts text in a way that is none of those retort can name in GGUF: {}, or SentencePiece's",
            PreTokenizer::names()
        )))
    }

    /// One for each row of the embedding, in the order of their ids.
    fn tokens(&self, config: &Config, sentence_piece: bool) -> Result<Vec<Token>> {
        let mut tokens = vec![None; config.vocab_size.unsigned_abs() as usize];
        let mut set = |id: Option<u64>, text: Option<&str>, kind: TokenKind| -> Result<()> {
            let place = id.and_then(|id| tokens.get_mut(usize::try_from(id).ok()?));
            let (Some(place), Some(text)) = (place, text.filter(|text| !text.is_empty())) else {
                return Err(self.malformed("a token has no text, or an id beyond the vocabulary"));
            };
            *place = Some(Token { text: text.to_owned(), kind });
            Ok(())
        };
        let unknown = &self.json["model"]["unk_token"];
        for (text, id) in self.json["model"]["vocab"].as_object().into_iter().flatten() {
            let kind = match text.as_str() {
                text if sentence_piece && is_byte(text) => TokenKind::Byte,
                text if sentence_piece && unknown == text => TokenKind::Unknown,
                _ => TokenKind::Normal,
            };
            set(id.as_u64(), Some(text), kind)?;
        }
        for added in self.json["added_tokens"].as_array().into_iter().flatten() {
            let kind = match added["special"].as_bool().unwrap_or_default() {
                _ if sentence_piece && added["content"] == *unknown => TokenKind::Unknown,
                true => TokenKind::Control,
                false => TokenKind::UserDefined,
            };
            set(added["id"].as_u64(), added["content"].as_str(), kind)?;
        }
        let tokens: Vec<Token> =
            tokens.into_iter().enumerate().map(|(id, token)| token.unwrap_or_else(|| Token::padding(id))).collect();
        let mut seen = HashSet::with_capacity(tokens.len());
        if let Some(token) = tokens.iter().find(|token| !seen.insert(token.text.as_str())) {
            return Err(self.malformed(&format!("two ids have the text {:?}", token.text)));
        }
        Ok(tokens)
    }

    fn merges(&self) -> Result<Vec<(String, String)>> {
        let read = |merge: &Json| {
            let [left, right] = merge.as_array()?.as_slice() else { return None };
            Some((left.as_str()?.to_owned(), right.as_str()?.to_owned()))
        };
        let merges = self.json["model"]["merges"].as_array().into_iter().flatten();
        merges
            .map(|merge| read(merge).ok_or_else(|| self.malformed(&format!("the merge {merge} is no pair of tokens"))))
            .collect()
    }

    /// A merge as GGUF has it.
    fn line(&self, left: &str, right: &str) -> Result<String> {
        if left.contains(' ') || right.contains(' ') {
            return Err(self.malformed(&format!("the merge of {left:?} and {right:?} holds a bare space")));
        }
        Ok(format!("{left} {right}"))
    }

    fn malformed(&self, what: &str) -> Error {
        Error::new(Code::ModelMalformed, format!("{}: {what}", self.place))
    }

    fn unsupported(&self, what: &str) -> Error {
        Error::new(Code::ModelUnsupported, format!("{}: {what}", self.place))
    }
}

/// Ids of the special tokens, and whether texts get the first and the last of them.
fn special(tokenizer: &Tokenizer, config: &Config, source: &Source) -> Result<Vec<(String, Value)>> {
    let mut ends: Vec<u32> = tokenizer.special_id("eos_token").into_iter().collect();
    ends.extend(config.eos_token_ids.iter().filter(|id| Some(**id) != ends.first().copied()).collect::<Vec<_>>());
    let is_end_of_message = |id: &u32| tokenizer.decode(&[*id], false).is_ok_and(|text| text.contains("eom"));
    let (bos, eos) = (tokenizer.special_id("bos_token").or(config.bos_token_id), ends.first().copied());
    let others = ends.get(1..).unwrap_or_default();
    let ids = [
        ("bos", bos),
        ("eos", eos),
        // GGUF has room for one more end of a turn, and one of a message.
        ("eot", others.iter().copied().find(|id| !is_end_of_message(id))),
        ("eom", others.iter().copied().find(is_end_of_message)),
        ("unknown", tokenizer.special_id("unk_token")),
        ("padding", tokenizer.special_id("pad_token").or(config.pad_token_id)),
    ];
    let mut keys = Vec::new();
    for (role, id) in ids {
        let Some(id) = id else { continue };
        if i64::from(id) >= config.vocab_size {
            return Err(source.malformed(&format!("the {role} token is {id}, beyond the vocabulary")));
        }
        keys.push((format!("tokenizer.ggml.{role}_token_id"), Value::U32(id)));
    }
    let (bare, full) = (tokenizer.encode("a", false)?, tokenizer.encode("a", true)?);
    let as_with = |first: bool, last: bool| {
        let around = |wanted: bool, id: Option<u32>| id.filter(|_| wanted);
        let expected: Vec<u32> =
            around(first, bos).into_iter().chain(bare.iter().copied()).chain(around(last, eos)).collect();
        expected == full
    };
    let found = [(false, false), (true, false), (false, true), (true, true)]
        .into_iter()
        .find(|(first, last)| as_with(*first, *last));
    let Some((first, last)) = found else {
        return Err(
            source.unsupported("it puts more around a text than the bos and the eos token, which GGUF has no form for")
        );
    };
    keys.push(("tokenizer.ggml.add_bos_token".to_owned(), Value::Bool(first)));
    keys.push(("tokenizer.ggml.add_eos_token".to_owned(), Value::Bool(last)));
    Ok(keys)
}

/// The steps of a pre-tokenizer or a normalizer, sequences opened and what changes no token left out.
fn steps(json: &Json) -> Vec<Json> {
    let inner = match json["type"].as_str() {
        Some("Sequence") => json.get("pretokenizers").or(json.get("normalizers")).and_then(Json::as_array),
        Some(_) => {
            let mut step = json.clone();
            if let Some(fields) = step.as_object_mut() {
                fields.remove("trim_offsets");
            }
            return vec![step];
        }
        None => None,
    };
    inner.into_iter().flatten().flat_map(steps).collect()
}

/// `<0x00>` to `<0xFF>`.
fn is_byte(text: &str) -> bool {
    let hex = text.strip_prefix("<0x").and_then(|text| text.strip_suffix('>'));
    hex.is_some_and(|hex| hex.len() == 2 && u8::from_str_radix(hex, 16).is_ok())
}
