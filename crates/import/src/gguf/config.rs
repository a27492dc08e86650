//! `config.json` and `generation_config.json` from a GGUF file's metadata.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use retort_core::{Code, Error, Result};
use retort_model::{Architecture, Llama3Scaling};
use serde_json::{Map, Value, json};

use super::metadata::Metadata;
use super::names::ROPE_FREQS;
use super::quant::Kind;
use super::reader::Gguf;
use super::vocabulary::Vocabulary;
use crate::layout::Layout;
use crate::weights::Dtype;

/// Of every published model with this scaling.
const LOW_FREQ_FACTOR: f64 = 1.0;
const HIGH_FREQ_FACTOR: f64 = 4.0;

/// The model's shape; the vocabulary is as large as the embedding, padding included.
pub(crate) fn layout(gguf: &Gguf, tokens: u64) -> Result<Layout> {
    let metadata = &gguf.metadata;
    let architecture = metadata.required("general.architecture", metadata.string("general.architecture"))?;
    let family = match architecture {
        "llama" if metadata.contains("llama.attention.sliding_window") => Architecture::Mistral,
        "llama" => Architecture::Llama,
        "qwen2" => Architecture::Qwen2,
        other => {
            return Err(metadata
                .unsupported(format!("the architecture is {other}; retort reads llama (with Mistral) and qwen2")));
        }
    };
    refuse_unsupported(metadata, architecture)?;
    let key = |name: &str| format!("{architecture}.{name}");
    let number = |name: &str| metadata.required(&key(name), metadata.unsigned(&key(name)));
    let (hidden, heads) = (number("embedding_length")?, number("attention.head_count")?);
    let head_dim = match metadata.unsigned(&key("attention.key_length"))? {
        Some(head_dim) => head_dim,
        None => hidden.checked_div(heads).unwrap_or(0),
    };
    let Some(embedding) = gguf.tensors.get("token_embd.weight") else {
        return Err(metadata.malformed("tensor \"token_embd.weight\" is missing"));
    };
    let vocab = embedding.shape[0];
    if tokens > vocab {
        return Err(metadata.malformed(format!("{tokens} tokens do not fit an embedding of {vocab} rows")));
    }
    let layout = Layout {
        architecture: family,
        hidden,
        intermediate: number("feed_forward_length")?,
        layers: number("block_count")?,
        heads,
        kv_heads: metadata.unsigned(&key("attention.head_count_kv"))?.unwrap_or(heads),
        head_dim,
        vocab,
        tied: !gguf.tensors.contains_key("output.weight"),
        qkv_bias: family == Architecture::Qwen2 || gguf.tensors.contains_key("blk.0.attn_q.bias"),
        output_bias: family != Architecture::Qwen2 && gguf.tensors.contains_key("blk.0.attn_output.bias"),
    };
    if layout.qkv_bias != layout.output_bias && family != Architecture::Qwen2 {
        return Err(metadata.unsupported("only some attention projections have a bias, which no llama model has"));
    }
    layout.check(Code::GgufMalformed, metadata.place())?;
    for name in ["attention.value_length", "rope.dimension_count"] {
        if let Some(other) = metadata.unsigned(&key(name))?
            && other != head_dim
        {
            return Err(metadata.unsupported(format!(
                "{} is {other}, but a head has {head_dim} values; retort needs them equal",
                key(name)
            )));
        }
    }
    Ok(layout)
}

/// GGUF keeps Llama 3.1's scaling as one divisor a frequency; this finds the parameters that give
/// just these divisors.
pub(crate) fn rope_scaling(gguf: &Gguf, file: &File, path: &Path, layout: &Layout) -> Result<Option<Llama3Scaling>> {
    let metadata = &gguf.metadata;
    let Some(tensor) = gguf.tensors.get(ROPE_FREQS) else { return Ok(None) };
    if tensor.kind != Kind::F32 || tensor.shape != [layout.head_dim / 2] {
        return Err(metadata.malformed(format!(
            "tensor \"{ROPE_FREQS}\" must hold {} values of F32, but has shape {:?} of {}",
            layout.head_dim / 2,
            tensor.shape,
            tensor.kind.name()
        )));
    }
    let mut bytes = vec![0; tensor.bytes as usize];
    file.read_exact_at(&mut bytes, tensor.offset).map_err(|error| Error::io(path, error))?;
    let mut divisors = Vec::new();
    Kind::F32.dequantise(&bytes, &mut divisors);
    if divisors.iter().all(|divisor| *divisor == 1.0) {
        return Ok(None);
    }
    let theta = rope_theta(metadata, layout.architecture)?;
    // The lowest frequency is divided by the whole factor. Only the context's ratio to the two
    // frequency factors matters, and those are the same in every published model.
    let factor = f64::from(divisors.iter().copied().fold(1.0, f32::max));
    (10..=24)
        .map(|bits| Llama3Scaling {
            factor,
            low_freq_factor: LOW_FREQ_FACTOR,
            high_freq_factor: HIGH_FREQ_FACTOR,
            original_max_position_embeddings: 1 << bits,
        })
        .find(|scaling| gives(scaling, &divisors, theta))
        .map(Some)
        .ok_or_else(|| {
            metadata.unsupported(format!(
                "tensor \"{ROPE_FREQS}\" scales rotary frequencies in a way that is not Llama 3's, which is the only one retort computes"
            ))
        })
}

/// Whether a scaling has just these divisors.
fn gives(scaling: &Llama3Scaling, divisors: &[f32], theta: f64) -> bool {
    let wanted = scaling.divisors(theta, divisors.len());
    divisors.iter().zip(wanted).all(|(divisor, wanted)| (f64::from(*divisor) - wanted).abs() <= 1e-4 * wanted)
}

pub(crate) fn config(
    metadata: &Metadata,
    layout: &Layout,
    vocabulary: &Vocabulary,
    scaling: Option<Llama3Scaling>,
    dtype: Dtype,
) -> Result<Value> {
    let architecture = if layout.architecture == Architecture::Qwen2 { "qwen2" } else { "llama" };
    let key = |name: &str| format!("{architecture}.{name}");
    let epsilon_key = key("attention.layer_norm_rms_epsilon");
    let epsilon = metadata.required(&epsilon_key, metadata.float(&epsilon_key))?;
    if epsilon <= 0.0 {
        return Err(metadata.malformed(format!("{epsilon_key} is {epsilon}, not above 0")));
    }
    let context_key = key("context_length");
    let context = metadata.required(&context_key, metadata.unsigned(&context_key))?;
    if context == 0 {
        return Err(metadata.malformed(format!("{context_key} is 0, not above 0")));
    }
    let mut config = json!({
        "architectures": [layout.architecture.class_name()],
        "model_type": layout.architecture.model_type(),
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": layout.hidden,
        "initializer_range": 0.02,
        "intermediate_size": layout.intermediate,
        "max_position_embeddings": context,
        "num_attention_heads": layout.heads,
        "num_hidden_layers": layout.layers,
        "num_key_value_heads": layout.kv_heads,
        "rms_norm_eps": epsilon,
        "rope_scaling": scaling.map(|scaling| json!({
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        })),
        "rope_theta": rope_theta(metadata, layout.architecture)?,
        "tie_word_embeddings": layout.tied,
        "torch_dtype": dtype.torch_name(),
        "use_cache": true,
        "vocab_size": layout.vocab,
    });
    let object = object(&mut config)?;
    match layout.architecture {
        Architecture::Llama => {
            object.insert("attention_bias".into(), json!(layout.qkv_bias));
            object.insert("mlp_bias".into(), json!(false));
            object.insert("head_dim".into(), json!(layout.head_dim));
        }
        Architecture::Mistral => {
            object.insert("head_dim".into(), json!(layout.head_dim));
            let window = metadata.unsigned(&key("attention.sliding_window"))?.filter(|window| *window > 0);
            object.insert("sliding_window".into(), json!(window));
        }
        Architecture::Qwen2 => {
            if layout.head_dim * layout.heads != layout.hidden {
                return Err(metadata.unsupported(format!(
                    "{} heads of {} values do not make the hidden size {}, as qwen2 needs",
                    layout.heads, layout.head_dim, layout.hidden
                )));
            }
            object.insert("use_sliding_window".into(), json!(false));
        }
    }
    special_ids(object, vocabulary);
    Ok(config)
}

pub(crate) fn generation_config(vocabulary: &Vocabulary) -> Value {
    let mut object = Map::new();
    special_ids(&mut object, vocabulary);
    Value::Object(object)
}

fn special_ids(object: &mut Map<String, Value>, vocabulary: &Vocabulary) {
    if let Some(bos) = vocabulary.bos {
        object.insert("bos_token_id".into(), json!(bos));
    }
    match vocabulary.ends.as_slice() {
        [] => {}
        [end] => drop(object.insert("eos_token_id".into(), json!(end))),
        ends => drop(object.insert("eos_token_id".into(), json!(ends))),
    }
    if let Some(pad) = vocabulary.pad {
        object.insert("pad_token_id".into(), json!(pad));
    }
}

fn object(value: &mut Value) -> Result<&mut Map<String, Value>> {
    value.as_object_mut().ok_or_else(|| Error::internal("a configuration is not an object"))
}

fn rope_theta(metadata: &Metadata, family: Architecture) -> Result<f64> {
    let key = if family == Architecture::Qwen2 { "qwen2.rope.freq_base" } else { "llama.rope.freq_base" };
    let theta = metadata.float(key)?.unwrap_or(10_000.0);
    if theta < 1.0 { Err(metadata.malformed(format!("{key} is {theta}, below 1"))) } else { Ok(theta) }
}

fn refuse_unsupported(metadata: &Metadata, architecture: &str) -> Result<()> {
    let key = |name: &str| format!("{architecture}.{name}");
    if let Some(parts) = metadata.unsigned("split.count")?.filter(|parts| *parts > 1) {
        return Err(metadata.unsupported(format!(
            "the model is split over {parts} files; merge them first with llama.cpp's gguf-split --merge"
        )));
    }
    if let Some(experts) = metadata.unsigned(&key("expert_count"))?.filter(|experts| *experts > 0) {
        return Err(metadata.unsupported(format!("the model mixes {experts} experts; retort reads dense models")));
    }
    if let Some(kind) = metadata.string(&key("rope.scaling.type"))?.filter(|kind| *kind != "none") {
        return Err(
            metadata.unsupported(format!("rotary scaling is of type {kind}; retort computes none and llama3's"))
        );
    }
    if let Some(scale) = metadata.float(&key("rope.scale_linear"))?.filter(|scale| *scale != 1.0) {
        return Err(
            metadata.unsupported(format!("rotary positions are scaled by {scale}, which retort does not compute"))
        );
    }
    if metadata.string("general.type")?.is_some_and(|kind| kind != "model") {
        return Err(Error::new(
            Code::ModelUnsupported,
            format!(
                "{}: the file is not a whole model but another kind of GGUF file, such as an adapter",
                metadata.place()
            ),
        ));
    }
    Ok(())
}
