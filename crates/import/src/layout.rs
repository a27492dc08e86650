//! Which tensors a Llama-family model has, and their shapes, from its configuration.

use retort_core::{Code, Error, Result};
use retort_model::{Architecture, Config};

/// Beyond every model there is; keeps a hostile configuration from asking for endless names.
const MAX_LAYERS: u64 = 4096;
const MAX_DIM: u64 = 1 << 24;

/// The numbers that tensors' shapes follow from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) architecture: Architecture,
    pub(crate) hidden: u64,
    pub(crate) intermediate: u64,
    pub(crate) layers: u64,
    pub(crate) heads: u64,
    pub(crate) kv_heads: u64,
    pub(crate) head_dim: u64,
    pub(crate) vocab: u64,
    /// The head is the embedding, and no tensor of its own.
    pub(crate) tied: bool,
    /// Biases on the query, key and value projections.
    pub(crate) qkv_bias: bool,
    /// A bias on the attention's output projection.
    pub(crate) output_bias: bool,
}

/// A tensor's Hugging Face name and row-major shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Expected {
    pub(crate) name: String,
    pub(crate) shape: Vec<u64>,
}

impl Layout {
    /// Of a model that retort computes; `place` names its `config.json` in errors.
    pub(crate) fn from_config(config: &Config, place: &str) -> Result<Self> {
        if config.mlp_bias {
            return Err(Error::new(
                Code::ModelUnsupported,
                format!("{place}: \"mlp_bias\" is true, which retort does not import"),
            ));
        }
        Ok(Self {
            architecture: config.architecture,
            hidden: config.hidden_size.unsigned_abs(),
            intermediate: config.intermediate_size.unsigned_abs(),
            layers: config.num_hidden_layers.unsigned_abs(),
            heads: config.num_attention_heads.unsigned_abs(),
            kv_heads: config.num_key_value_heads.unsigned_abs(),
            head_dim: config.head_dim.unsigned_abs(),
            vocab: config.vocab_size.unsigned_abs(),
            tied: config.tie_word_embeddings,
            qkv_bias: config.qkv_bias,
            output_bias: config.output_bias,
        })
    }

    /// Every number in range, and fitting the others; else an error of `code`.
    pub(crate) fn check(&self, code: Code, place: &str) -> Result<()> {
        let refuse = |what: String| Err(Error::new(code, format!("{place}: {what}")));
        for (name, value, limit) in [
            ("hidden size", self.hidden, MAX_DIM),
            ("intermediate size", self.intermediate, MAX_DIM),
            ("number of layers", self.layers, MAX_LAYERS),
            ("number of attention heads", self.heads, MAX_DIM),
            ("number of key-value heads", self.kv_heads, MAX_DIM),
            ("head dimension", self.head_dim, MAX_DIM),
            ("vocabulary size", self.vocab, MAX_DIM),
        ] {
            if value == 0 || value > limit {
                return refuse(format!("the {name} is {value}, outside 1 to {limit}"));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return refuse(format!("{} attention heads do not share {} key-value heads", self.heads, self.kv_heads));
        }
        if !self.head_dim.is_multiple_of(2) {
            return refuse(format!("the head dimension {} is odd; rotary embeddings need pairs", self.head_dim));
        }
        if self.heads.max(self.kv_heads).saturating_mul(self.head_dim) > MAX_DIM {
            return refuse(format!("{} heads of {} values are beyond {MAX_DIM}", self.heads, self.head_dim));
        }
        Ok(())
    }

    /// Every tensor of the model, in the order of the layers.
    pub(crate) fn tensors(&self) -> Vec<Expected> {
        let (h, q, kv) = (self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut tensors = vec![Expected { name: "model.embed_tokens.weight".into(), shape: vec![self.vocab, h] }];
        for layer in 0..self.layers {
            let mut add = |part: &str, shape: &[u64]| {
                tensors.push(Expected { name: format!("model.layers.{layer}.{part}"), shape: shape.to_vec() });
            };
            add("input_layernorm.weight", &[h]);
            add("self_attn.q_proj.weight", &[q, h]);
            add("self_attn.k_proj.weight", &[kv, h]);
            add("self_attn.v_proj.weight", &[kv, h]);
            add("self_attn.o_proj.weight", &[h, q]);
            if self.qkv_bias {
                add("self_attn.q_proj.bias", &[q]);
                add("self_attn.k_proj.bias", &[kv]);
                add("self_attn.v_proj.bias", &[kv]);
            }
            if self.output_bias {
                add("self_attn.o_proj.bias", &[h]);
            }
            add("post_attention_layernorm.weight", &[h]);
            add("mlp.gate_proj.weight", &[self.intermediate, h]);
            add("mlp.up_proj.weight", &[self.intermediate, h]);
            add("mlp.down_proj.weight", &[h, self.intermediate]);
        }
        tensors.push(Expected { name: "model.norm.weight".into(), shape: vec![h] });
        if !self.tied {
            tensors.push(Expected { name: "lm_head.weight".into(), shape: vec![self.vocab, h] });
        }
        tensors
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn layout(config: &Value) -> Result<Layout> {
        Layout::from_config(&Config::from_json(&"config.json", config)?, "config.json")
    }

    fn config() -> Value {
        json!({"architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 16,
               "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 10})
    }

    #[test]
    fn shapes_follow_from_the_configuration() {
        let mut config = config();
        let sound = layout(&config).unwrap();
        assert_eq!((sound.head_dim, sound.tied), (2, false));
        let tensors = sound.tensors();
        assert_eq!(tensors.len(), 2 * 9 + 3);
        let key = tensors.iter().find(|tensor| tensor.name == "model.layers.1.self_attn.k_proj.weight").unwrap();
        assert_eq!(key.shape, [4, 8]);

        config["tie_word_embeddings"] = json!(true);
        config["attention_bias"] = json!(true);
        let names: Vec<String> = layout(&config).unwrap().tensors().into_iter().map(|tensor| tensor.name).collect();
        assert_eq!(names.len(), 2 * 13 + 2);
        assert!(names.contains(&"model.layers.0.self_attn.o_proj.bias".to_owned()));

        config["architectures"] = json!(["Qwen2ForCausalLM"]);
        assert_eq!(layout(&config).unwrap().tensors().len(), 2 * 12 + 2);
    }

    #[test]
    fn what_cannot_be_computed_is_refused() {
        let cases = [
            ("architectures", json!(["MixtralForCausalLM"]), Code::ModelUnsupported),
            ("quantization_config", json!({}), Code::ModelUnsupported),
            ("rope_scaling", json!({"rope_type": "yarn"}), Code::ModelUnsupported),
            ("rope_parameters", json!({"rope_type": "linear"}), Code::ModelUnsupported),
            ("hidden_act", json!("gelu"), Code::ModelUnsupported),
            ("mlp_bias", json!(true), Code::ModelUnsupported),
            ("hidden_size", json!("8"), Code::ModelMalformed),
            ("hidden_size", json!(0), Code::ModelMalformed),
            ("num_attention_heads", json!(0), Code::ModelMalformed),
            ("num_key_value_heads", json!(3), Code::ModelMalformed),
            ("num_hidden_layers", json!(4_000_000_000u64), Code::ModelMalformed),
            ("head_dim", json!(3), Code::ModelMalformed),
            ("head_dim", json!(u64::MAX - 1), Code::ModelMalformed),
        ];
        for (key, value, code) in cases {
            let mut config = config();
            config[key] = value;
            assert_eq!(layout(&config).unwrap_err().code, code, "{key}");
        }
    }
}
