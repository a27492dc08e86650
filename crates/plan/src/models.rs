//! The teachers that are known by name: the values of their published `config.json`.

use retort_core::{Code, Error, Result};
use retort_model::Config;
use serde_json::{Value, json};

/// A known model: `llama-3.1-405b`.
#[derive(Clone, Copy, Debug)]
pub struct Model {
    pub name: &'static str,
    shape: Shape,
}

/// What differs between the Llamas.
#[derive(Clone, Copy, Debug)]
struct Shape {
    hidden: u32,
    inner: u32,
    layers: u32,
    heads: u32,
    kv_heads: u32,
    family: Family,
}

#[derive(Clone, Copy, Debug)]
enum Family {
    Llama2,
    Llama3,
    /// RoPE stretched by 8.
    Llama31,
    /// RoPE stretched by 32, and the head tied to the embedding.
    Llama32,
}

impl Model {
    pub const ALL: [Self; 10] = [
        known("llama-2-7b", Family::Llama2, [4_096, 11_008, 32, 32, 32]),
        known("llama-2-13b", Family::Llama2, [5_120, 13_824, 40, 40, 40]),
        known("llama-2-70b", Family::Llama2, [8_192, 28_672, 80, 64, 8]),
        known("llama-3-8b", Family::Llama3, [4_096, 14_336, 32, 32, 8]),
        known("llama-3-70b", Family::Llama3, [8_192, 28_672, 80, 64, 8]),
        known("llama-3.1-8b", Family::Llama31, [4_096, 14_336, 32, 32, 8]),
        known("llama-3.1-70b", Family::Llama31, [8_192, 28_672, 80, 64, 8]),
        known("llama-3.1-405b", Family::Llama31, [16_384, 53_248, 126, 128, 8]),
        known("llama-3.2-1b", Family::Llama32, [2_048, 8_192, 16, 32, 8]),
        known("llama-3.2-3b", Family::Llama32, [3_072, 8_192, 28, 24, 8]),
    ];

    /// The model of this name; `SpecInvalid` names those most like it.
    pub fn find(name: &str) -> Result<Self> {
        let wanted = name.to_lowercase();
        if let Some(model) = Self::ALL.into_iter().find(|model| model.name == wanted) {
            return Ok(model);
        }
        let mut near: Vec<_> =
            Self::ALL.iter().map(|model| (strsim::damerau_levenshtein(&wanted, model.name), model.name)).collect();
        near.sort();
        let near: Vec<_> = near.into_iter().take(3).map(|(_, name)| name).collect();
        let shown: String = name.chars().take(80).collect();
        Err(Error::new(
            Code::SpecInvalid,
            format!(
                "--teacher {shown:?} is neither a known teacher nor a folder or config.json; nearest are {}",
                near.join(", ")
            ),
        ))
    }

    pub fn config(&self) -> Result<Config> {
        Config::from_json(&self.name, &self.shape.config_json())
    }
}

const fn known(name: &'static str, family: Family, [hidden, inner, layers, heads, kv_heads]: [u32; 5]) -> Model {
    Model { name, shape: Shape { hidden, inner, layers, heads, kv_heads, family } }
}

impl Shape {
    fn config_json(self) -> Value {
        let (vocabulary, positions, theta) = match self.family {
            Family::Llama2 => (32_000, 4_096, 1e4),
            Family::Llama3 => (128_256, 8_192, 5e5),
            Family::Llama31 | Family::Llama32 => (128_256, 131_072, 5e5),
        };
        let stretch = match self.family {
            Family::Llama2 | Family::Llama3 => None,
            Family::Llama31 => Some(8.0),
            Family::Llama32 => Some(32.0),
        };
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": vocabulary,
            "max_position_embeddings": positions,
            "rms_norm_eps": 1e-5,
            "rope_theta": theta,
            "rope_scaling": stretch.map(|factor| json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8_192,
            })),
            "tie_word_embeddings": matches!(self.family, Family::Llama32),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_model_has_the_parameters_that_were_published() {
        let published = [
            ("llama-2-7b", 6_738_415_616),
            ("llama-2-13b", 13_015_864_320),
            ("llama-2-70b", 68_976_648_192),
            ("llama-3-8b", 8_030_261_248),
            ("llama-3-70b", 70_553_706_496),
            ("llama-3.1-8b", 8_030_261_248),
            ("llama-3.1-70b", 70_553_706_496),
            ("llama-3.1-405b", 405_853_388_800),
            ("llama-3.2-1b", 1_235_814_400),
            ("llama-3.2-3b", 3_212_749_824),
        ];
        assert_eq!(published.len(), Model::ALL.len());
        for (name, parameters) in published {
            assert_eq!(Model::find(name).unwrap().config().unwrap().parameters(), parameters, "{name}");
        }
    }

    #[test]
    fn a_wrong_name_is_told_the_nearest() {
        let error = Model::find("llama-3.1-450b").unwrap_err();
        assert_eq!(error.code, Code::SpecInvalid);
        assert!(error.message.ends_with("nearest are llama-3.1-405b, llama-3.1-70b, llama-3.1-8b"), "{error}");
        assert_eq!(Model::find("Llama-3.1-405B").unwrap().name, "llama-3.1-405b");
    }
}
