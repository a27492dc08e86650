//! Random weights in the structure of Llama 3.1 405B, in as many files.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufWriter, Write as _},
    path::Path,
};

use retort_llama::Config;
use serde_json::{Map, json};

pub const FILES: usize = 191;
/// The real one's are 16,384 and 53,248.
pub const HIDDEN: i64 = 256;
pub const INNER: i64 = 832;

pub struct Written {
    pub tensors: usize,
    pub parameters: u64,
    /// Of the tensors.
    pub bytes: u64,
}

/// Writes config, tokenizer (SmolLM2's, whose vocabulary is smaller), 191 bf16 files and their index.
pub fn write(folder: &Path) -> Written {
    fs::create_dir_all(folder).expect("a folder");
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "bfloat16",
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 126, "num_attention_heads": 128,
        "num_key_value_heads": 8, "head_dim": 8, "vocab_size": 128_256, "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "tie_word_embeddings": false, "bos_token_id": 1,
        "eos_token_id": [2], "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    });
    fs::write(folder.join("config.json"), config.to_string()).expect("the config");
    for entry in fs::read_dir(retort_tests::teacher::smollm2()).expect("the demo's teacher") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.starts_with("tokenizer") || name.starts_with("chat_template") || name.starts_with("special_tokens") {
            fs::copy(&path, folder.join(name)).expect("copied");
        }
    }
    let tensors = Config::from_dir(folder).expect("a config").tensors();
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let mut map = BTreeMap::new();
    let (mut parameters, mut bytes) = (0, 0);
    for file in 0..FILES {
        let name = format!("model-{:05}-of-{FILES:05}.safetensors", file + 1);
        let share = &tensors[tensors.len() * file / FILES..tensors.len() * (file + 1) / FILES];
        let mut header = Map::new();
        let mut end = 0;
        for (tensor, shape) in share {
            let numbers: i64 = shape.iter().product();
            header.insert(
                tensor.clone(),
                json!({ "dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2 * numbers] }),
            );
            end += 2 * numbers;
            map.insert(tensor.clone(), name.clone());
        }
        let header = json!(header).to_string().into_bytes();
        let mut out = BufWriter::new(fs::File::create(folder.join(&name)).expect("a file"));
        out.write_all(&(header.len() as u64).to_le_bytes()).and_then(|()| out.write_all(&header)).expect("written");
        for (tensor, shape) in share {
            let numbers = shape.iter().product::<i64>();
            let norm = tensor.ends_with("norm.weight");
            for _ in 0..numbers {
                let number = if norm { 1.0 } else { 0.06 * uniform(&mut seed) };
                // bf16 is the upper half of an f32.
                let upper = (number.to_bits() >> 16) as u16;
                out.write_all(&upper.to_le_bytes()).expect("written");
            }
            parameters += numbers as u64;
            bytes += 2 * numbers as u64;
        }
        out.flush().expect("written");
    }
    let index = json!({ "metadata": { "total_size": bytes }, "weight_map": map });
    fs::write(folder.join("model.safetensors.index.json"), index.to_string()).expect("the index");
    Written { tensors: tensors.len(), parameters, bytes }
}

/// In [-1, 1), by Marsaglia's xorshift.
fn uniform(seed: &mut u64) -> f32 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    (*seed >> 40) as f32 / (1 << 23) as f32 - 1.0
}
