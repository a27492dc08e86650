//! `tokenizer.json` and `tokenizer_config.json` from a GGUF file's embedded tokenizer.

use retort_core::{Error, Result};
use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};

use super::metadata::Metadata;
use super::pre_tokenizer::PreTokenizer;
use super::sentencepiece;
use super::vocabulary::{Model, Token, TokenKind, Vocabulary};

/// SentencePiece's mark for a space.
pub const SPACE: &str = "\u{2581}";

/// The whole `tokenizer.json`.
pub(crate) fn tokenizer(vocabulary: &Vocabulary, metadata: &Metadata) -> Result<Vec<u8>> {
    let merges: Vec<(&str, &str)> = match &vocabulary.model {
        Model::ByteLevel { merges, .. } => merges.iter().map(|(left, right)| (left.as_str(), right.as_str())).collect(),
        Model::SentencePiece { scores, .. } => sentencepiece::merges(&vocabulary.tokens, scores),
    };
    let is_byte_level = matches!(vocabulary.model, Model::ByteLevel { .. });
    let unknown = if is_byte_level { None } else { vocabulary.text(vocabulary.unknown) };
    if !is_byte_level && unknown.is_none() {
        return Err(metadata.malformed("the SentencePiece vocabulary has no unknown token"));
    }
    let file = File {
        version: "1.0",
        truncation: (),
        padding: (),
        added_tokens: added_tokens(vocabulary),
        normalizer: normalizer(&vocabulary.model),
        pre_tokenizer: pre_tokenizer(&vocabulary.model),
        post_processor: post_processor(vocabulary),
        decoder: decoder(&vocabulary.model),
        model: Bpe {
            r#type: "BPE",
            dropout: (),
            unk_token: unknown,
            continuing_subword_prefix: (),
            end_of_word_suffix: (),
            fuse_unk: !is_byte_level,
            byte_fallback: has_all_bytes(&vocabulary.tokens),
            // Llama 3 looks a whole piece up before it merges.
            ignore_merges: matches!(vocabulary.model, Model::ByteLevel { pre: PreTokenizer::Llama3, .. }),
            vocab: Vocab(&vocabulary.tokens),
            merges,
        },
    };
    serde_json::to_vec_pretty(&file)
        .map_err(|error| Error::internal(format!("the tokenizer cannot be written as JSON: {error}")))
}

/// Special tokens, chat template and the longest text.
pub(crate) fn tokenizer_config(vocabulary: &Vocabulary, metadata: &Metadata) -> Result<Value> {
    let mut object = Map::new();
    for (key, id) in [
        ("bos_token", vocabulary.bos),
        ("eos_token", vocabulary.eos),
        ("pad_token", vocabulary.pad),
        ("unk_token", vocabulary.unknown),
    ] {
        if let Some(text) = vocabulary.text(id) {
            object.insert(key.to_owned(), json!(text));
        }
    }
    let decoder: Map<String, Value> = added_tokens(vocabulary)
        .into_iter()
        .map(|token| {
            let id = token.id.to_string();
            let mut value = json!(token);
            if let Some(object) = value.as_object_mut() {
                object.remove("id");
            }
            (id, value)
        })
        .collect();
    object.insert("added_tokens_decoder".to_owned(), Value::Object(decoder));
    object.insert("add_bos_token".to_owned(), json!(vocabulary.add_bos));
    object.insert("add_eos_token".to_owned(), json!(vocabulary.add_eos));
    let add_prefix_space = matches!(vocabulary.model, Model::SentencePiece { add_space_prefix: true, .. });
    object.insert("add_prefix_space".to_owned(), json!(add_prefix_space));
    object.insert("clean_up_tokenization_spaces".to_owned(), json!(false));
    if let Some(template) = &vocabulary.chat_template {
        object.insert("chat_template".to_owned(), json!(template));
    }
    let architecture = metadata.string("general.architecture")?.unwrap_or_default();
    if let Some(context) = metadata.unsigned(&format!("{architecture}.context_length"))? {
        object.insert("model_max_length".to_owned(), json!(context));
    }
    // The class that takes tokenizer.json as it stands.
    object.insert("tokenizer_class".to_owned(), json!("PreTrainedTokenizerFast"));
    Ok(Value::Object(object))
}

#[derive(Serialize)]
struct File<'a> {
    version: &'a str,
    truncation: (),
    padding: (),
    added_tokens: Vec<AddedToken<'a>>,
    normalizer: Value,
    pre_tokenizer: Value,
    post_processor: Value,
    decoder: Value,
    model: Bpe<'a>,
}

#[derive(Serialize)]
struct AddedToken<'a> {
    id: u32,
    content: &'a str,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    normalized: bool,
    special: bool,
}

#[derive(Serialize)]
struct Bpe<'a> {
    r#type: &'a str,
    dropout: (),
    unk_token: Option<&'a str>,
    continuing_subword_prefix: (),
    end_of_word_suffix: (),
    fuse_unk: bool,
    byte_fallback: bool,
    ignore_merges: bool,
    vocab: Vocab<'a>,
    merges: Vec<(&'a str, &'a str)>,
}

/// An object from text to id, in the order of the ids.
struct Vocab<'a>(&'a [Token]);

impl Serialize for Vocab<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let is_padding = |id: usize, token: &Token| token.kind == TokenKind::Unused && *token == Token::padding(id);
        serializer.collect_map(
            self.0
                .iter()
                .enumerate()
                .filter(|(id, token)| !is_padding(*id, token))
                .map(|(id, token)| (token.text.as_str(), id)),
        )
    }
}

/// Tokens found in the text before anything else is done to it.
fn added_tokens(vocabulary: &Vocabulary) -> Vec<AddedToken<'_>> {
    let added = |(id, token): (usize, &'_ Token)| {
        let special = match token.kind {
            TokenKind::Control | TokenKind::Unknown => true,
            TokenKind::UserDefined => false,
            TokenKind::Normal | TokenKind::Unused | TokenKind::Byte => return None,
        };
        Some((id as u32, special))
    };
    vocabulary
        .tokens
        .iter()
        .enumerate()
        .filter_map(added)
        .map(|(id, special)| AddedToken {
            id,
            content: &vocabulary.tokens[id as usize].text,
            single_word: false,
            lstrip: false,
            rstrip: false,
            normalized: false,
            special,
        })
        .collect()
}

fn normalizer(model: &Model) -> Value {
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
    match model {
        Model::ByteLevel { pre: PreTokenizer::Qwen2, .. } => json!({"type": "NFC"}),
        Model::ByteLevel { .. } => Value::Null,
        Model::SentencePiece { add_space_prefix: false, .. } => replace,
        Model::SentencePiece { add_space_prefix: true, .. } => {
            json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]})
        }
    }
}

fn pre_tokenizer(model: &Model) -> Value {
    match model {
        Model::ByteLevel { pre, .. } => pre.to_json(),
        Model::SentencePiece { .. } => Value::Null,
    }
}

fn post_processor(vocabulary: &Vocabulary) -> Value {
    let offsets = match vocabulary.model {
        Model::ByteLevel { .. } => {
            Some(json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false}))
        }
        Model::SentencePiece { .. } => None,
    };
    let bos = vocabulary.bos.filter(|_| vocabulary.add_bos);
    let eos = vocabulary.eos.filter(|_| vocabulary.add_eos);
    let mut special = Map::new();
    for id in [bos, eos].into_iter().flatten() {
        let text = vocabulary.text(Some(id)).unwrap_or_default();
        special.insert(text.to_owned(), json!({"id": text, "ids": [id], "tokens": [text]}));
    }
    if special.is_empty() {
        return offsets.unwrap_or(Value::Null);
    }
    let around = |sequence: &str, type_id: u32| {
        let mark = |id: u32| json!({"SpecialToken": {"id": vocabulary.text(Some(id)), "type_id": type_id}});
        let mut parts: Vec<Value> = bos.map(mark).into_iter().collect();
        parts.push(json!({"Sequence": {"id": sequence, "type_id": type_id}}));
        parts.extend(eos.map(mark));
        parts
    };
    let pair = [around("A", 0), around("B", 1)].concat();
    let template =
        json!({"type": "TemplateProcessing", "single": around("A", 0), "pair": pair, "special_tokens": special});
    match offsets {
        Some(offsets) => json!({"type": "Sequence", "processors": [offsets, template]}),
        None => template,
    }
}

fn decoder(model: &Model) -> Value {
    let Model::SentencePiece { add_space_prefix, .. } = model else {
        return json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    };
    let mut steps = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if *add_space_prefix {
        steps.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    json!({"type": "Sequence", "decoders": steps})
}

fn has_all_bytes(tokens: &[Token]) -> bool {
    let mut found = [false; 256];
    for token in tokens.iter().filter(|token| token.kind == TokenKind::Byte) {
        let hex = token.text.strip_prefix("<0x").and_then(|text| text.strip_suffix('>'));
        if let Some(byte) = hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            found[usize::from(byte)] = true;
        }
    }
    found.iter().all(|found| *found)
}
