//! Reading `config.json` field by field, so that an error names the field.

use std::fmt::Display;

use retort_core::{Error, Result};
use serde_json::{Map, Value};

use super::{Architecture, Config, Llama3Scaling};
use crate::file::{malformed, unsupported};

/// Reads what [`Config::check`] then checks.
pub(super) fn config(place: &dyn Display, value: &Value) -> Result<Config> {
    let fields = Fields::new(place, value)?;
    let architecture = architecture(&fields)?;
    refuse_variants(&fields)?;

    let hidden_size = fields.required("hidden_size")?;
    let num_attention_heads = fields.required("num_attention_heads")?;
    let head_dim = match fields.integer("head_dim")? {
        Some(head_dim) => head_dim,
        None if num_attention_heads > 0 && hidden_size % num_attention_heads == 0 => hidden_size / num_attention_heads,
        None => {
            return Err(fields.wrong(format!(
                "\"hidden_size\", {hidden_size}, is no multiple of \"num_attention_heads\", {num_attention_heads}, \
                 and there is no \"head_dim\""
            )));
        }
    };
    let attention_bias = fields.flag("attention_bias")?.unwrap_or(false);
    let max_position_embeddings = fields.integer("max_position_embeddings")?.unwrap_or(match architecture {
        Architecture::Llama => 2048,
        Architecture::Qwen2 => 32_768,
        Architecture::Mistral => 131_072,
    });
    let (rope_theta, rope_scaling) = rope(&fields, max_position_embeddings)?;
    Ok(Config {
        architecture,
        hidden_size,
        intermediate_size: fields.required("intermediate_size")?,
        num_hidden_layers: fields.required("num_hidden_layers")?,
        num_attention_heads,
        num_key_value_heads: fields.integer("num_key_value_heads")?.unwrap_or(num_attention_heads),
        head_dim,
        vocab_size: fields.required("vocab_size")?,
        rms_norm_eps: fields.number("rms_norm_eps")?.unwrap_or(1e-6),
        rope_theta,
        rope_scaling,
        max_position_embeddings,
        tie_word_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(false),
        qkv_bias: architecture == Architecture::Qwen2 || (architecture == Architecture::Llama && attention_bias),
        output_bias: architecture == Architecture::Llama && attention_bias,
        mlp_bias: architecture == Architecture::Llama && fields.flag("mlp_bias")?.unwrap_or(false),
        sliding_window: sliding_window(&fields, architecture)?,
        initializer_range: fields.number("initializer_range")?.unwrap_or(0.02),
        bos_token_id: fields.ids("bos_token_id")?.first().copied(),
        eos_token_ids: fields.ids("eos_token_id")?,
        pad_token_id: fields.ids("pad_token_id")?.first().copied(),
    })
}

fn architecture(fields: &Fields) -> Result<Architecture> {
    let class = match fields.get("architectures") {
        Some(Value::Array(names)) => names.first().and_then(Value::as_str),
        None => None,
        Some(_) => return Err(fields.wrong("\"architectures\" must be a list of names")),
    };
    let model_type = fields.get("model_type").and_then(Value::as_str);
    let found = Architecture::ALL.into_iter().find(|known| match (class, model_type) {
        (Some(class), _) => class == known.class_name(),
        (None, Some(model_type)) => model_type == known.model_type(),
        (None, None) => false,
    });
    found.ok_or_else(|| {
        let supported: Vec<_> = Architecture::ALL.iter().map(|known| known.class_name()).collect();
        let named = class.or(model_type).map_or("no architecture is named".to_owned(), |name| {
            let shown: String = name.chars().take(80).collect();
            format!("architecture {shown:?} is not supported")
        });
        unsupported(fields.place, format!("{named}; supported are {}", supported.join(", ")))
    })
}

/// Refuses what would change the numbers and is not computed here.
fn refuse_variants(fields: &Fields) -> Result<()> {
    if let Some(activation) = fields.get("hidden_act")
        && activation.as_str() != Some("silu")
    {
        return Err(unsupported(fields.place, format!("\"hidden_act\" is {activation}; only \"silu\" is supported")));
    }
    if let Some(quantization) = fields.get("quantization_config") {
        let method = quantization.get("quant_method").unwrap_or(&Value::Null);
        // Bytes with a scale a row: what the weights are is told by their files.
        if method.as_str() == Some("fbgemm_fp8") {
            return Ok(());
        }
        return Err(unsupported(
            fields.place,
            format!(
                "the weights are quantised ({method}); supported is \"fbgemm_fp8\"; else import the unquantised model or its GGUF"
            ),
        ));
    }
    Ok(())
}

fn rope(fields: &Fields, max_position_embeddings: i64) -> Result<(f64, Option<Llama3Scaling>)> {
    let theta = fields.number("rope_theta")?;
    let parameters = fields.get("rope_scaling").or_else(|| fields.get("rope_parameters"));
    let Some(parameters) = parameters else {
        return Ok((theta.unwrap_or(10_000.0), None));
    };
    let inner =
        Fields::new(fields.place, parameters).map_err(|_| fields.wrong("\"rope_scaling\" must be an object"))?;
    let theta = inner.number("rope_theta")?.or(theta).unwrap_or(10_000.0);
    let partial = inner.number("partial_rotary_factor")?.or(fields.number("partial_rotary_factor")?);
    if partial.is_some_and(|partial| partial != 1.0) {
        return Err(unsupported(fields.place, "\"partial_rotary_factor\" other than 1 is not supported"));
    }
    let kind = inner.get("rope_type").or_else(|| inner.get("type"));
    let scaling = match kind.map(|kind| kind.as_str().unwrap_or_default()) {
        None | Some("default") => None,
        Some("llama3") => {
            let number = |name: &str| {
                inner.number(name)?.ok_or_else(|| fields.wrong(format!("llama3 rope scaling lacks \"{name}\"")))
            };
            Some(Llama3Scaling {
                factor: number("factor")?,
                low_freq_factor: number("low_freq_factor")?,
                high_freq_factor: number("high_freq_factor")?,
                original_max_position_embeddings: inner
                    .integer("original_max_position_embeddings")?
                    .unwrap_or(max_position_embeddings),
            })
        }
        Some(other) => {
            let shown: String = other.chars().take(80).collect();
            return Err(unsupported(
                fields.place,
                format!("rope scaling {shown:?} is not supported; supported are default, llama3"),
            ));
        }
    };
    Ok((theta, scaling))
}

fn sliding_window(fields: &Fields, architecture: Architecture) -> Result<Option<i64>> {
    match architecture {
        Architecture::Llama => Ok(None),
        // An absent window means this one; models without a window say null.
        Architecture::Mistral if !fields.has("sliding_window") => Ok(Some(4096)),
        Architecture::Mistral => fields.integer("sliding_window"),
        Architecture::Qwen2 if fields.flag("use_sliding_window")?.unwrap_or(false) => {
            Err(unsupported(fields.place, "\"use_sliding_window\" of Qwen2 is not supported"))
        }
        Architecture::Qwen2 => Ok(None),
    }
}

/// The fields of one JSON object; null counts as absent.
pub(super) struct Fields<'a> {
    place: &'a dyn Display,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub(super) fn new(place: &'a dyn Display, value: &'a Value) -> Result<Self> {
        let map = value.as_object().ok_or_else(|| malformed(place, "must be a JSON object"))?;
        Ok(Self { place, map })
    }

    /// Token ids given as one number or as a list.
    pub(super) fn ids(&self, name: &str) -> Result<Vec<u32>> {
        let id = |value: &Value| {
            value
                .as_u64()
                .and_then(|id| u32::try_from(id).ok())
                .ok_or_else(|| self.not("a token id or a list of them", name, value))
        };
        match self.get(name) {
            None => Ok(Vec::new()),
            Some(Value::Array(ids)) => ids.iter().map(id).collect(),
            // Some exporters write -1 for "none".
            Some(value) if value.as_i64() == Some(-1) => Ok(Vec::new()),
            Some(value) => Ok(vec![id(value)?]),
        }
    }

    fn has(&self, name: &str) -> bool {
        self.map.contains_key(name)
    }

    fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    fn required(&self, name: &str) -> Result<i64> {
        self.integer(name)?.ok_or_else(|| self.wrong(format!("lacks \"{name}\"")))
    }

    fn integer(&self, name: &str) -> Result<Option<i64>> {
        let convert = |value: &Value| value.as_i64().ok_or_else(|| self.not("a whole number", name, value));
        self.get(name).map(convert).transpose()
    }

    fn number(&self, name: &str) -> Result<Option<f64>> {
        let convert = |value: &Value| value.as_f64().ok_or_else(|| self.not("a number", name, value));
        self.get(name).map(convert).transpose()
    }

    fn flag(&self, name: &str) -> Result<Option<bool>> {
        let convert = |value: &Value| value.as_bool().ok_or_else(|| self.not("true or false", name, value));
        self.get(name).map(convert).transpose()
    }

    fn not(&self, wanted: &str, name: &str, value: &Value) -> Error {
        let shown: String = value.to_string().chars().take(80).collect();
        self.wrong(format!("\"{name}\" is {shown}; it must be {wanted}"))
    }

    fn wrong(&self, reason: impl Display) -> Error {
        malformed(self.place, reason)
    }
}
