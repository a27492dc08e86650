//! A model folder's shape and tokenizer, read without libtorch. Workers read the folder again and
//! more strictly; here the point is to refuse early what cannot work.

use std::{
    fs::File,
    io::Read as _,
    path::{Path, PathBuf},
};

use retort_core::{Code, Error, Result};
use serde_json::{Map, Value};
use tokenizers::Tokenizer;

use super::paths;

/// Largest `config.json` and `tokenizer.json` read, bytes.
const MAX_CONFIG_BYTES: u64 = 4 << 20;
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;
/// Largest size that a config may name: no product of a few of them overflows a u64's estimates.
const MAX_SIZE: u64 = 1 << 24;

const ARCHITECTURES: [(&str, &str); 3] =
    [("LlamaForCausalLM", "llama"), ("Qwen2ForCausalLM", "qwen2"), ("MistralForCausalLM", "mistral")];

/// What planning and admission need of `config.json`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    pub hidden_size: u64,
    pub intermediate_size: u64,
    pub num_hidden_layers: u64,
    pub num_attention_heads: u64,
    pub num_key_value_heads: u64,
    pub head_dim: u64,
    pub vocab_size: u64,
    pub max_position_embeddings: u64,
    pub tie_word_embeddings: bool,
    /// Bias on the query, key and value projections.
    pub qkv_bias: bool,
}

impl Shape {
    /// Numbers in the model; a tied head counts once.
    pub fn parameters(&self) -> u64 {
        let queries = self.num_attention_heads * self.head_dim;
        let keys = self.num_key_value_heads * self.head_dim;
        let bias = if self.qkv_bias { queries + 2 * keys } else { 0 };
        let attention = self.hidden_size.saturating_mul(2 * queries + 2 * keys).saturating_add(bias);
        let mlp = self.hidden_size.saturating_mul(self.intermediate_size).saturating_mul(3);
        let layer = attention.saturating_add(mlp).saturating_add(2 * self.hidden_size);
        let embedding = self.vocab_size.saturating_mul(self.hidden_size);
        let heads = if self.tie_word_embeddings { embedding } else { embedding.saturating_mul(2) };
        layer.saturating_mul(self.num_hidden_layers).saturating_add(heads).saturating_add(self.hidden_size)
    }
}

/// A Hugging Face folder.
pub struct Folder {
    path: PathBuf,
    pub shape: Shape,
    tokenizer: Option<Tokenizer>,
}

impl Folder {
    /// Reads `config.json` and, where there is one, `tokenizer.json`. `field` is the spec's name for it.
    pub fn open(field: &str, text: &str) -> Result<Self> {
        let path = paths::local(field, text)?;
        if !path.is_dir() {
            return Err(Error::new(
                Code::FileNotFound,
                format!("{field}: {} is no folder; `retort model import` makes one from a GGUF file", path.display()),
            ));
        }
        let config = path.join("config.json");
        let shape = shape(&config, &read(&config, MAX_CONFIG_BYTES)?)?;
        let tokenizer = path.join("tokenizer.json");
        let tokenizer = if tokenizer.exists() { Some(read_tokenizer(&tokenizer, &shape)?) } else { None };
        Ok(Self { path, shape, tokenizer })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `file-not-found` for a teacher without one: it could not read a prompt.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.as_ref().ok_or_else(|| {
            Error::new(
                Code::FileNotFound,
                format!(
                    "{}: no such file; the teacher cannot read text without it",
                    self.path.join("tokenizer.json").display()
                ),
            )
        })
    }

    /// `tokenizer-mismatch` when both folders have a tokenizer and these differ in a token.
    pub fn require_same_tokens(&self, other: &Folder) -> Result<()> {
        let (Some(mine), Some(others)) = (&self.tokenizer, &other.tokenizer) else { return Ok(()) };
        let (mine, others) = (mine.get_vocab(true), others.get_vocab(true));
        let differing =
            mine.iter().filter(|(token, id)| others.get(*token) != Some(*id)).map(|(token, id)| (*id, token)).min();
        let Some((id, token)) = differing else { return Ok(()) };
        let shown: String = token.chars().take(40).collect();
        Err(Error::new(
            Code::TokenizerMismatch,
            format!(
                "the student {} calls token {id} {shown:?}, the teacher {} does not; both need the same tokenizer",
                self.path.display(),
                other.path.display()
            ),
        ))
    }
}

fn read(path: &Path, max_bytes: u64) -> Result<Vec<u8>> {
    let failed = |error| Error::io(path, error);
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(failed)?;
    file.take(max_bytes + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > max_bytes {
        return Err(malformed(path, &format!("it takes more than {max_bytes} bytes")));
    }
    Ok(bytes)
}

fn read_tokenizer(path: &Path, shape: &Shape) -> Result<Tokenizer> {
    let bytes = read(path, MAX_TOKENIZER_BYTES)?;
    let tokenizer =
        Tokenizer::from_bytes(&bytes).map_err(|error| malformed(path, &format!("it is no tokenizer: {error}")))?;
    let highest = tokenizer.get_vocab(true).into_values().max().map_or(0, u64::from);
    if highest >= shape.vocab_size {
        return Err(Error::new(
            Code::VocabularyMismatch,
            format!(
                "{}: its highest token is {highest}, but config.json beside it says a vocabulary of {} tokens",
                path.display(),
                shape.vocab_size
            ),
        ));
    }
    Ok(tokenizer)
}

fn shape(path: &Path, text: &[u8]) -> Result<Shape> {
    let value: Value = serde_json::from_slice(text).map_err(|error| malformed(path, &error.to_string()))?;
    let Value::Object(config) = value else { return Err(malformed(path, "it is no JSON object")) };
    let fields = Fields { path, config: &config };
    let (class, model_type) = architecture(&fields)?;
    if let Some(method) = fields.get("quantization_config") {
        let method = method.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
        return Err(unsupported(
            path,
            &format!("the weights are quantised ({method}); import the unquantised model or its GGUF"),
        ));
    }
    let hidden_size = fields.size("hidden_size", None)?;
    let num_attention_heads = fields.size("num_attention_heads", None)?;
    let head_dim = fields.size("head_dim", Some(hidden_size / num_attention_heads))?;
    let num_key_value_heads = fields.size("num_key_value_heads", Some(num_attention_heads))?;
    if !num_attention_heads.is_multiple_of(num_key_value_heads) {
        return Err(malformed(
            path,
            &format!(
                "num_key_value_heads ({num_key_value_heads}) does not divide num_attention_heads ({num_attention_heads})"
            ),
        ));
    }
    let positions = match model_type {
        "qwen2" => 32_768,
        "mistral" => 131_072,
        _ => 2048,
    };
    Ok(Shape {
        hidden_size,
        intermediate_size: fields.size("intermediate_size", None)?,
        num_hidden_layers: fields.size("num_hidden_layers", None)?,
        num_attention_heads,
        num_key_value_heads,
        head_dim,
        vocab_size: fields.size("vocab_size", None)?,
        max_position_embeddings: fields.bounded("max_position_embeddings", Some(positions), 1 << 27)?,
        tie_word_embeddings: fields.flag("tie_word_embeddings"),
        qkv_bias: class == "Qwen2ForCausalLM" || (class == "LlamaForCausalLM" && fields.flag("attention_bias")),
    })
}

fn architecture(fields: &Fields<'_>) -> Result<(&'static str, &'static str)> {
    let class = fields.get("architectures").and_then(|names| names.get(0)).and_then(Value::as_str);
    let model_type = fields.get("model_type").and_then(Value::as_str);
    let known = ARCHITECTURES.into_iter().find(|(known_class, known_type)| match (class, model_type) {
        (Some(class), _) => class == *known_class,
        (None, Some(model_type)) => model_type == *known_type,
        (None, None) => false,
    });
    known.ok_or_else(|| {
        let named: String = class.or(model_type).unwrap_or("none").chars().take(80).collect();
        let supported: Vec<_> = ARCHITECTURES.iter().map(|(class, _)| *class).collect();
        unsupported(fields.path, &format!("its architecture is {named}; supported are {}", supported.join(", ")))
    })
}

struct Fields<'a> {
    path: &'a Path,
    config: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// Null counts as absent.
    fn get(&self, name: &str) -> Option<&'a Value> {
        self.config.get(name).filter(|value| !value.is_null())
    }

    fn flag(&self, name: &str) -> bool {
        self.get(name).and_then(Value::as_bool).unwrap_or(false)
    }

    fn size(&self, name: &str, default: Option<u64>) -> Result<u64> {
        self.bounded(name, default, MAX_SIZE)
    }

    fn bounded(&self, name: &str, default: Option<u64>, max: u64) -> Result<u64> {
        let value = match self.get(name) {
            Some(value) => value
                .as_u64()
                .ok_or_else(|| malformed(self.path, &format!("{name} is {value}; it must be a whole number")))?,
            None => default.ok_or_else(|| malformed(self.path, &format!("{name} is missing")))?,
        };
        if (1..=max).contains(&value) {
            Ok(value)
        } else {
            Err(malformed(self.path, &format!("{name} is {value}; it must lie between 1 and {max}")))
        }
    }
}

fn malformed(path: &Path, what: &str) -> Error {
    Error::new(Code::ModelMalformed, format!("{}: {what}", path.display()))
}

fn unsupported(path: &Path, what: &str) -> Error {
    Error::new(Code::ModelUnsupported, format!("{}: {what}", path.display()))
}
