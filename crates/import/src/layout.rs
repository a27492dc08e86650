//! Which tensors a Llama-family model has, and their shapes, from its configuration.

use retort_core::{Code, Error, Result};
use serde_json::Value;

/// Beyond every model there is; keeps a hostile configuration from asking for endless names.
const MAX_LAYERS: u64 = 4096;
const MAX_DIM: u64 = 1 << 24;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    Llama,
    Mistral,
    Qwen2,
}

impl Family {
    const ALL: [Family; 3] = [Family::Llama, Family::Mistral, Family::Qwen2];

    pub(crate) fn architecture(self) -> &'static str {
        match self {
            Family::Llama => "LlamaForCausalLM",
            Family::Mistral => "MistralForCausalLM",
            Family::Qwen2 => "Qwen2ForCausalLM",
        }
    }

    pub(crate) fn model_type(self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::Mistral => "mistral",
            Family::Qwen2 => "qwen2",
        }
    }
}

/// The numbers that tensors' shapes follow from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) family: Family,
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
    /// From a Hugging Face `config.json`; `place` names it in errors.
    pub(crate) fn from_config(config: &Value, place: &str) -> Result<Self> {
        let family = family(config, place)?;
        let number = |key: &str| {
            config.get(key).and_then(Value::as_u64).ok_or_else(|| {
                Error::new(Code::ModelMalformed, format!("{place}: \"{key}\" must be a whole number, and is not there"))
            })
        };
        let optional = |key: &str| match config.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(_) => number(key).map(Some),
        };
        let flag = |key: &str| config.get(key).and_then(Value::as_bool).unwrap_or(false);
        refuse_unsupported(config, place)?;
        let (hidden, heads) = (number("hidden_size")?, number("num_attention_heads")?);
        let head_dim = match optional("head_dim")? {
            Some(head_dim) => head_dim,
            None => hidden.checked_div(heads).unwrap_or(0),
        };
        let layout = Self {
            family,
            hidden,
            intermediate: number("intermediate_size")?,
            layers: number("num_hidden_layers")?,
            heads,
            kv_heads: optional("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
            vocab: number("vocab_size")?,
            tied: flag("tie_word_embeddings"),
            qkv_bias: family == Family::Qwen2 || (family == Family::Llama && flag("attention_bias")),
            output_bias: family == Family::Llama && flag("attention_bias"),
        };
        layout.check(Code::ModelMalformed, place)?;
        Ok(layout)
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

fn family(config: &Value, place: &str) -> Result<Family> {
    let named = config.pointer("/architectures/0").and_then(Value::as_str);
    let model_type = config.get("model_type").and_then(Value::as_str);
    let found = match named {
        Some(named) => Family::ALL.into_iter().find(|family| family.architecture() == named),
        None => Family::ALL.into_iter().find(|family| Some(family.model_type()) == model_type),
    };
    found.ok_or_else(|| {
        let said = named.or(model_type).unwrap_or("none");
        let known = Family::ALL.map(Family::architecture).join(", ");
        Error::new(Code::ModelUnsupported, format!("{place}: the architecture is {said}; retort reads {known}"))
    })
}

fn refuse_unsupported(config: &Value, place: &str) -> Result<()> {
    let refuse = |what: String| Err(Error::new(Code::ModelUnsupported, format!("{place}: {what}")));
    let present = |key: &str| config.get(key).is_some_and(|value| !value.is_null());
    if present("quantization_config") {
        return refuse("the weights are quantised (\"quantization_config\"); import the unquantised folder".into());
    }
    if config.get("mlp_bias").and_then(Value::as_bool) == Some(true) {
        return refuse("\"mlp_bias\" is true, which no Llama-family model of retort has".into());
    }
    if let Some(act) = config.get("hidden_act").and_then(Value::as_str)
        && act != "silu"
    {
        return refuse(format!("\"hidden_act\" is {act}; retort computes silu"));
    }
    for key in ["rope_scaling", "rope_parameters"] {
        let Some(rope) = config.get(key).and_then(Value::as_object) else { continue };
        let kind = rope.get("rope_type").or_else(|| rope.get("type")).and_then(Value::as_str).unwrap_or("default");
        if !matches!(kind, "default" | "llama3") {
            return refuse(format!("\"{key}\" is of type {kind}; retort computes default and llama3"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config() -> Value {
        json!({"architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 16,
               "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 10})
    }

    #[test]
    fn shapes_follow_from_the_configuration() {
        let mut config = config();
        let layout = Layout::from_config(&config, "config.json").unwrap();
        assert_eq!((layout.head_dim, layout.tied), (2, false));
        let tensors = layout.tensors();
        assert_eq!(tensors.len(), 2 * 9 + 3);
        let key = tensors.iter().find(|tensor| tensor.name == "model.layers.1.self_attn.k_proj.weight").unwrap();
        assert_eq!(key.shape, [4, 8]);

        config["tie_word_embeddings"] = json!(true);
        config["attention_bias"] = json!(true);
        let names: Vec<String> = Layout::from_config(&config, "config.json")
            .unwrap()
            .tensors()
            .into_iter()
            .map(|tensor| tensor.name)
            .collect();
        assert_eq!(names.len(), 2 * 13 + 2);
        assert!(names.contains(&"model.layers.0.self_attn.o_proj.bias".to_owned()));

        config["architectures"] = json!(["Qwen2ForCausalLM"]);
        assert_eq!(Layout::from_config(&config, "config.json").unwrap().tensors().len(), 2 * 12 + 2);
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
            assert_eq!(Layout::from_config(&config, "config.json").unwrap_err().code, code, "{key}");
        }
    }
}
