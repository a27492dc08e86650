//! What a GGUF file says of the model's shape, from `config.json`.

use std::path::Path;

use retort_core::{Code, Error, Result, spec::GgufType};
use retort_model::{Architecture, Config};

use crate::header::Value;

/// Of the block formats; 2 since 2023.
const QUANTIZATION_VERSION: u32 = 2;

/// Refuses what the architecture cannot say in GGUF; `folder` is the model's, for errors.
pub(crate) fn check(config: &Config, folder: &Path) -> Result<()> {
    let refuse = |what: &str| Err(Error::new(Code::ModelUnsupported, format!("{}: {what}", folder.display())));
    match config.architecture {
        _ if config.mlp_bias => refuse("the feed-forward projections have a bias, which retort does not export"),
        Architecture::Qwen2 if config.rope_scaling.is_some() => {
            refuse("a qwen2 with Llama 3's scaling of rotary frequencies has no form in GGUF")
        }
        Architecture::Qwen2 if config.head_dim * config.num_attention_heads != config.hidden_size => {
            refuse("the heads of a qwen2 must make its hidden size together to be exported")
        }
        _ => Ok(()),
    }
}

/// `general.*` and the architecture's own keys. Sizes of a [`Config`] fit 32 bits.
pub(crate) fn keys(config: &Config, name: &str, kind: GgufType) -> Vec<(String, Value)> {
    let architecture = name_of(config.architecture);
    let mut keys = Vec::new();
    let mut add = |key: &str, value: Value| keys.push((key.to_owned(), value));
    add("general.architecture", Value::String(architecture.to_owned()));
    add("general.type", Value::String("model".to_owned()));
    add("general.name", Value::String(name.to_owned()));
    add("general.quantization_version", Value::U32(QUANTIZATION_VERSION));
    add("general.file_type", Value::U32(file_type(kind)));

    let mut add = |key: &str, value: Value| keys.push((format!("{architecture}.{key}"), value));
    let size = |value: i64| Value::U32(u32::try_from(value).unwrap_or(u32::MAX));
    add("vocab_size", size(config.vocab_size));
    add("context_length", size(config.max_position_embeddings));
    add("embedding_length", size(config.hidden_size));
    add("block_count", size(config.num_hidden_layers));
    add("feed_forward_length", size(config.intermediate_size));
    add("attention.head_count", size(config.num_attention_heads));
    add("attention.head_count_kv", size(config.num_key_value_heads));
    add("attention.layer_norm_rms_epsilon", Value::F32(config.rms_norm_eps as f32));
    add("rope.freq_base", Value::F32(config.rope_theta as f32));
    if config.architecture != Architecture::Qwen2 {
        add("rope.dimension_count", size(config.head_dim));
    }
    if config.head_dim * config.num_attention_heads != config.hidden_size {
        add("attention.key_length", size(config.head_dim));
        add("attention.value_length", size(config.head_dim));
    }
    if let Some(window) = config.sliding_window {
        add("attention.sliding_window", size(window));
    }
    keys
}

/// llama.cpp computes Mistral as a llama.
fn name_of(architecture: Architecture) -> &'static str {
    match architecture {
        Architecture::Llama | Architecture::Mistral => "llama",
        Architecture::Qwen2 => "qwen2",
    }
}

/// llama.cpp's number of what most tensors are.
fn file_type(kind: GgufType) -> u32 {
    match kind {
        GgufType::F32 => 0,
        GgufType::F16 => 1,
        GgufType::Q8_0 => 7,
        GgufType::Bf16 => 32,
    }
}
