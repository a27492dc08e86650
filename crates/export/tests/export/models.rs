//! Tiny Hugging Face folders: 2 layers, 4 heads of 8 values that share 2 key-value heads.

use std::{
    fs,
    path::{Path, PathBuf},
};

use half::{bf16, f16};
use retort_core::{Result, spec::GgufType};
use retort_export::Gguf;
use retort_import::gguf::PreTokenizer;
use retort_model::Config;
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

/// A folder with room for a model and what becomes of it.
pub struct Bench {
    pub folder: tempfile::TempDir,
}

impl Bench {
    /// With a llama in it.
    pub fn new() -> Self {
        let bench = Self { folder: tempfile::tempdir().unwrap() };
        fs::create_dir(bench.model()).unwrap();
        bench.write("config.json", &config());
        bench.write("tokenizer.json", &tokenizer(&PreTokenizer::SmolLm.to_json()));
        bench.write(
            "tokenizer_config.json",
            &json!({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>",
                    "pad_token": "<|im_end|>", "chat_template": "{{ messages[0]['content'] }}"}),
        );
        bench.weights(Dtype::F32, |_, _| {});
        bench
    }

    pub fn model(&self) -> PathBuf {
        self.folder.path().join("tiny")
    }

    pub fn out(&self) -> PathBuf {
        self.folder.path().join("tiny.gguf")
    }

    pub fn write(&self, name: &str, value: &Value) {
        fs::write(self.model().join(name), value.to_string()).unwrap();
    }

    pub fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&fs::read(self.model().join(name)).unwrap()).unwrap()
    }

    pub fn set(&self, name: &str, key: &str, value: Value) {
        let mut json = self.json(name);
        json[key] = value;
        self.write(name, &json);
    }

    /// Weights of the shapes that the configuration asks for, as `change` has them.
    pub fn weights(&self, dtype: Dtype, change: impl Fn(&str, &mut Vec<f32>)) {
        let config = Config::from_dir(&self.model()).unwrap();
        let mut seed = 1u32;
        let mut next = || {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = config
            .tensors()
            .into_iter()
            .map(|(name, shape)| {
                let shape: Vec<usize> = shape.into_iter().map(|size| size as usize).collect();
                let mut values: Vec<f32> = (0..shape.iter().product()).map(|_| next()).collect();
                change(&name, &mut values);
                let bytes = match dtype {
                    Dtype::F16 => values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect(),
                    Dtype::BF16 => values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect(),
                    _ => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
                };
                (name, shape, bytes)
            })
            .collect();
        let views =
            tensors.iter().map(|(name, shape, bytes)| (name, TensorView::new(dtype, shape.clone(), bytes).unwrap()));
        safetensors::serialize_to_file(views, None, &self.model().join("model.safetensors")).unwrap();
    }

    pub fn export(&self, kind: GgufType) -> Result<()> {
        Gguf::plan(&self.model(), "tiny", kind)?.export(&self.out(), false, &mut |_| Ok(()))
    }

    /// Exports, and imports what was exported.
    pub fn round_trip(&self, kind: GgufType) -> PathBuf {
        self.export(kind).unwrap();
        let back = self.folder.path().join(format!("back-{}", kind.name()));
        retort_import::import(&self.out(), &back, &mut |_| {}).unwrap();
        fs::remove_file(self.out()).unwrap();
        back
    }

    /// Everything beside the model, hidden files too.
    pub fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder.path()).unwrap();
        let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

pub fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 270, "rms_norm_eps": 1e-5, "rope_theta": 100_000.0,
        "max_position_embeddings": 128, "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": 2,
    })
}

/// Three special tokens, the 256 bytes, what a few merges make, and one token that is found in the text.
pub fn tokenizer(pre: &Value) -> Value {
    let mut bytes: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    bytes.sort_unstable();
    let merges = [["h", "e"], ["l", "l"], ["he", "ll"], ["hell", "o"], ["Ġ", "w"], ["1", "2"]];
    let mut tokens: Vec<String> = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(str::to_owned).to_vec();
    tokens.extend(bytes.into_iter().map(String::from));
    tokens.extend(merges.iter().map(|merge| merge.concat()));
    let vocab: serde_json::Map<String, Value> =
        tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    let added = |id: usize, content: &str, special: bool| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": special})
    };
    let mut found: Vec<Value> = (0..3).map(|id| added(id, &tokens[id], true)).collect();
    found.push(added(tokens.len(), "<tool>", false));
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": found, "normalizer": null,
        "pre_tokenizer": pre, "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": merges},
    })
}

/// Name, type and values of every tensor of a folder.
pub fn read(folder: &Path) -> Vec<(String, Dtype, Vec<f32>)> {
    let bytes = fs::read(folder.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Vec<_> = file
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let halves = || view.data().as_chunks::<2>().0.iter();
            let values = match view.dtype() {
                Dtype::F16 => halves().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
                Dtype::BF16 => halves().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
                _ => view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            };
            (name, view.dtype(), values)
        })
        .collect();
    tensors.sort_by(|one, other| one.0.cmp(&other.0));
    tensors
}
