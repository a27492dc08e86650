//! `config.json`: what shape the model has. Every number is checked before anything is sized by it.

use std::{f64::consts::TAU, path::Path};

use retort_core::Result;
use serde_json::{Map, Value, json};

use crate::file::{malformed, read_json, read_json_if_there};

mod pruned;
mod read;
#[cfg(test)]
mod tests;

/// A model's JSON files are a few kilobytes; more than this is not one.
const MAX_BYTES: u64 = 1 << 22;

/// The shape of a model. [`Config::validate`] holds for every one that [`Config::from_dir`] gives.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub architecture: Architecture,
    pub hidden_size: i64,
    /// Width inside the feed-forward block.
    pub intermediate_size: i64,
    pub num_hidden_layers: i64,
    pub num_attention_heads: i64,
    /// Divides `num_attention_heads`; smaller means grouped-query attention.
    pub num_key_value_heads: i64,
    /// Even; need not be `hidden_size / num_attention_heads`.
    pub head_dim: i64,
    /// Rows of the embedding; may exceed the tokenizer's.
    pub vocab_size: i64,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    pub rope_scaling: Option<Llama3Scaling>,
    pub max_position_embeddings: i64,
    /// The head is the embedding, transposed.
    pub tie_word_embeddings: bool,
    /// Bias on the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias on the attention's output projection.
    pub output_bias: bool,
    /// Bias on the three feed-forward projections.
    pub mlp_bias: bool,
    /// A position attends to itself and to this many less one before it.
    pub sliding_window: Option<i64>,
    /// Standard deviation of initial weights.
    pub initializer_range: f64,
    pub bos_token_id: Option<u32>,
    /// Any of these ends a completion; `generation_config.json` adds to those of `config.json`.
    pub eos_token_ids: Vec<u32>,
    pub pad_token_id: Option<u32>,
}

/// The names under which `config.json` announces a graph that this crate computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    Llama,
    Qwen2,
    Mistral,
}

/// Stretches RoPE's long wavelengths, as Llama 3.1 does ("The Llama 3 Herd of Models", 2024).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Llama3Scaling {
    pub factor: f64,
    pub low_freq_factor: f64,
    pub high_freq_factor: f64,
    pub original_max_position_embeddings: i64,
}

impl Llama3Scaling {
    /// What each of `pairs` rotary frequencies, the fastest first, is divided by.
    pub fn divisors(&self, rope_theta: f64, pairs: usize) -> Vec<f64> {
        let context = self.original_max_position_embeddings as f64;
        let divisor = |pair: usize| {
            let wavelength = TAU * rope_theta.powf(pair as f64 / pairs as f64);
            if wavelength < context / self.high_freq_factor {
                1.0
            } else if wavelength > context / self.low_freq_factor {
                self.factor
            } else {
                let share =
                    (context / wavelength - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor);
                1.0 / ((1.0 - share) / self.factor + share)
            }
        };
        (0..pairs).map(divisor).collect()
    }
}

impl Architecture {
    pub const ALL: [Architecture; 3] = [Self::Llama, Self::Qwen2, Self::Mistral];

    /// As `architectures` says it, such as `LlamaForCausalLM`.
    pub fn class_name(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Mistral => "MistralForCausalLM",
        }
    }

    /// As `model_type` says it.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Mistral => "mistral",
        }
    }
}

impl Config {
    /// Reads `config.json` of a Hugging Face folder, and the end tokens of its
    /// `generation_config.json` where there is one.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let mut config = Self::from_json(&path.display(), &read_json(&path, MAX_BYTES)?)?;
        let path = dir.join("generation_config.json");
        config.add_end_tokens(&path.display(), &read_json_if_there(&path, MAX_BYTES)?)?;
        Ok(config)
    }

    /// Adds the end tokens of a `generation_config.json`, which errors call `place`; null has none.
    pub fn add_end_tokens(&mut self, place: &dyn std::fmt::Display, generation: &Value) -> Result<()> {
        if generation.is_null() {
            return Ok(());
        }
        for id in read::Fields::new(place, generation)?.ids("eos_token_id")? {
            if !self.eos_token_ids.contains(&id) {
                self.eos_token_ids.push(id);
            }
        }
        self.check_end_tokens(place)
    }

    /// Reads the content of a `config.json`; errors call it `place`.
    pub fn from_json(place: &dyn std::fmt::Display, value: &Value) -> Result<Self> {
        let config = read::config(place, value)?;
        config.check(place)?;
        Ok(config)
    }

    /// Refuses sizes that no Llama has, so that a wrong digit is not an allocation.
    pub fn validate(&self) -> Result<()> {
        self.check(&"model config")
    }

    /// A `config.json` that transformers 4 and 5 load. The dtype is the caller's to add.
    pub fn to_json(&self) -> Value {
        let mut rope = Map::new();
        let scaling = self.rope_scaling.map(|scaling| {
            json!({
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position_embeddings,
            })
        });
        match &scaling {
            Some(Value::Object(fields)) => rope.extend(fields.clone()),
            _ => {
                rope.insert("rope_type".into(), json!("default"));
            }
        }
        rope.insert("rope_theta".into(), json!(self.rope_theta));
        let eos = match self.eos_token_ids.as_slice() {
            [] => Value::Null,
            [id] => json!(id),
            ids => json!(ids),
        };
        let mut value = json!({
            "architectures": [self.architecture.class_name()],
            "model_type": self.architecture.model_type(),
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "rms_norm_eps": self.rms_norm_eps,
            // Both spellings: transformers 5 reads rope_parameters, older readers the two others.
            "rope_parameters": rope,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "initializer_range": self.initializer_range,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos,
            "pad_token_id": self.pad_token_id,
            "use_cache": true,
        });
        match self.architecture {
            Architecture::Llama => {
                value["attention_bias"] = json!(self.qkv_bias);
                value["mlp_bias"] = json!(self.mlp_bias);
            }
            Architecture::Qwen2 => value["use_sliding_window"] = json!(false),
            Architecture::Mistral => value["sliding_window"] = json!(self.sliding_window),
        }
        value
    }

    /// Every tensor of a model of this shape, by its name in Hugging Face checkpoints: embedding,
    /// layers, last norm, head. A weight is `[outputs, inputs]`.
    pub fn tensors(&self) -> Vec<(String, Vec<i64>)> {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let queries = self.num_attention_heads * self.head_dim;
        let keys = self.num_key_value_heads * self.head_dim;
        let mut table = vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab_size, hidden])];
        for layer in 0..self.num_hidden_layers {
            let mut add = |name: &str, shape: Vec<i64>| table.push((format!("model.layers.{layer}.{name}"), shape));
            let projections = [
                ("self_attn.q_proj", queries, hidden, self.qkv_bias),
                ("self_attn.k_proj", keys, hidden, self.qkv_bias),
                ("self_attn.v_proj", keys, hidden, self.qkv_bias),
                ("self_attn.o_proj", hidden, queries, self.output_bias),
                ("mlp.gate_proj", inner, hidden, self.mlp_bias),
                ("mlp.up_proj", inner, hidden, self.mlp_bias),
                ("mlp.down_proj", hidden, inner, self.mlp_bias),
            ];
            add("input_layernorm.weight", vec![hidden]);
            for (name, outputs, inputs, bias) in projections {
                add(&format!("{name}.weight"), vec![outputs, inputs]);
                if bias {
                    add(&format!("{name}.bias"), vec![outputs]);
                }
            }
            add("post_attention_layernorm.weight", vec![hidden]);
        }
        table.push(("model.norm.weight".to_owned(), vec![hidden]));
        if !self.tie_word_embeddings {
            table.push(("lm_head.weight".to_owned(), vec![self.vocab_size, hidden]));
        }
        table
    }

    /// Numbers in the model; a tied head counts once.
    pub fn parameters(&self) -> u64 {
        self.tensors().iter().map(|(_, shape)| shape.iter().map(|&size| size.unsigned_abs()).product::<u64>()).sum()
    }

    fn check(&self, place: &dyn std::fmt::Display) -> Result<()> {
        let within = |name: &str, value: i64, most: i64| {
            if (1..=most).contains(&value) {
                Ok(())
            } else {
                Err(malformed(place, format!("\"{name}\" is {value}; it must be 1 to {most}")))
            }
        };
        within("hidden_size", self.hidden_size, 1 << 17)?;
        within("intermediate_size", self.intermediate_size, 1 << 20)?;
        within("num_hidden_layers", self.num_hidden_layers, 1 << 10)?;
        within("num_attention_heads", self.num_attention_heads, 1 << 10)?;
        within("num_key_value_heads", self.num_key_value_heads, self.num_attention_heads)?;
        within("head_dim", self.head_dim, 1 << 12)?;
        within("vocab_size", self.vocab_size, 1 << 24)?;
        within("max_position_embeddings", self.max_position_embeddings, 1 << 27)?;
        if let Some(window) = self.sliding_window {
            within("sliding_window", window, 1 << 27)?;
        }
        if self.num_attention_heads % self.num_key_value_heads != 0 {
            return Err(malformed(
                place,
                format!(
                    "\"num_attention_heads\" is {}, no multiple of \"num_key_value_heads\", {}",
                    self.num_attention_heads, self.num_key_value_heads
                ),
            ));
        }
        if self.head_dim % 2 != 0 {
            return Err(malformed(
                place,
                format!("\"head_dim\" is {}; rotary positions need an even one", self.head_dim),
            ));
        }
        self.check_end_tokens(place)?;
        let positive = |name: &str, value: f64| {
            if value.is_finite() && value > 0.0 {
                Ok(())
            } else {
                Err(malformed(place, format!("\"{name}\" is {value}; it must be a number above 0")))
            }
        };
        positive("rms_norm_eps", self.rms_norm_eps)?;
        positive("rope_theta", self.rope_theta)?;
        if !(self.initializer_range.is_finite() && self.initializer_range >= 0.0) {
            return Err(malformed(place, "\"initializer_range\" must be a number of at least 0"));
        }
        if let Some(scaling) = &self.rope_scaling {
            positive("factor", scaling.factor)?;
            positive("low_freq_factor", scaling.low_freq_factor)?;
            within("original_max_position_embeddings", scaling.original_max_position_embeddings, 1 << 27)?;
            if !(scaling.high_freq_factor.is_finite() && scaling.high_freq_factor > scaling.low_freq_factor) {
                return Err(malformed(
                    place,
                    format!(
                        "\"high_freq_factor\" is {}; it must be above \"low_freq_factor\", {}",
                        scaling.high_freq_factor, scaling.low_freq_factor
                    ),
                ));
            }
        }
        Ok(())
    }

    /// A model never writes a token that its vocabulary lacks, so its answers would not end there.
    fn check_end_tokens(&self, place: &dyn std::fmt::Display) -> Result<()> {
        let has = |id: u32| i64::from(id) < self.vocab_size;
        match self.eos_token_ids.iter().find(|id| !has(**id)) {
            None => Ok(()),
            Some(id) => Err(malformed(
                place,
                format!("\"eos_token_id\" is {id}, but the vocabulary has {} tokens", self.vocab_size),
            )),
        }
    }
}
