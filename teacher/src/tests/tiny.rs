//! A teacher small enough for a test: random weights, a vocabulary of words, chatml.

use std::path::Path;

use retort_llama::{Config, Model};
use serde_json::json;
use tch::{Device, Kind};

pub(crate) const VOCAB: u32 = 300;
pub(crate) const CONTEXT: u32 = 96;

/// Writes the model's folder. About one token in seven ends a completion, so that rows of a batch
/// finish at different steps.
pub(crate) fn write(dir: &Path, seed: u64) {
    let ends: Vec<u32> = std::iter::once(2).chain((10..VOCAB).step_by(7)).collect();
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCAB, "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true, "initializer_range": 0.25,
        "bos_token_id": 1, "eos_token_id": ends,
    });
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let config = Config::from_dir(dir).unwrap();
    Model::init(config, Device::Cpu, Kind::Float, seed).unwrap().save(dir, Kind::Float).unwrap();

    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false,
               "rstrip": false, "normalized": false})
    };
    let mut vocab: Vec<String> =
        ["<unk>", "<|im_start|>", "<|im_end|>", "system", "user", "assistant"].map(str::to_owned).into();
    vocab.extend((vocab.len()..VOCAB as usize).map(|id| format!("w{id}")));
    let vocab: serde_json::Map<_, _> = vocab.into_iter().enumerate().map(|(id, word)| (word, id.into())).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "decoder": null, "pre_tokenizer": {"type": "WhitespaceSplit"},
        "added_tokens": [special(0, "<unk>"), special(1, "<|im_start|>"), special(2, "<|im_end|>")],
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    });
    std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let template = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|> \n{% endfor %}\
                    {% if add_generation_prompt %}<|im_start|>assistant {% endif %}";
    let about = json!({"chat_template": template, "eos_token": "<|im_end|>", "bos_token": "<|im_start|>"});
    std::fs::write(dir.join("tokenizer_config.json"), about.to_string()).unwrap();
}
