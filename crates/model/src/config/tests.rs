use retort_core::Code;
use serde_json::json;

use super::*;

fn sound() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 512, "eos_token_id": 2
    })
}

fn read(value: &Value) -> Result<Config> {
    Config::from_json(&"config.json", value)
}

fn with(name: &str, value: Value) -> Value {
    let mut config = sound();
    config[name] = value;
    config
}

#[test]
fn a_sound_config_is_read() {
    let config = read(&sound()).unwrap();
    assert_eq!((config.head_dim, config.num_key_value_heads, config.rope_theta), (16, 2, 500_000.0));
    assert_eq!(config.eos_token_ids, [2]);
    // Embedding and head 2 x 16384; a layer 64 + (4096 + 2048 + 2048 + 4096) + 3 x 8192 + 64; norm 64.
    assert_eq!(config.parameters(), 2 * 16_384 + 2 * (64 + 12_288 + 24_576 + 64) + 64);
}

#[test]
fn what_is_written_reads_back() {
    let scaling = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128
    });
    let qwen = json!({
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
        "num_attention_heads": 4, "vocab_size": 256, "tie_word_embeddings": true, "eos_token_id": [3, 4],
        "sliding_window": 32, "use_sliding_window": false
    });
    let mut mistral = with("architectures", json!(["MistralForCausalLM"]));
    mistral["sliding_window"] = json!(100);
    for value in [sound(), with("rope_scaling", scaling), with("attention_bias", json!(true)), qwen, mistral] {
        let config = read(&value).unwrap();
        assert_eq!(read(&config.to_json()).unwrap(), config);
    }
}

#[test]
fn both_spellings_of_rope_are_read() {
    let mut new = sound();
    new.as_object_mut().unwrap().remove("rope_theta");
    new["rope_parameters"] = json!({ "rope_type": "default", "rope_theta": 500000.0 });
    assert_eq!(read(&new).unwrap(), read(&sound()).unwrap());
}

#[test]
fn nonsense_is_named() {
    let cases = [
        ("num_attention_heads", json!(0), "no multiple of \"num_attention_heads\", 0"),
        ("num_attention_heads", json!(-4), "no multiple of \"num_attention_heads\", -4"),
        ("num_attention_heads", json!(3), "no multiple of \"num_attention_heads\", 3"),
        ("num_key_value_heads", json!(0), "\"num_key_value_heads\" is 0; it must be 1 to 4"),
        ("num_key_value_heads", json!(3), "no multiple of \"num_key_value_heads\", 3"),
        ("hidden_size", json!(1_u64 << 40), "\"hidden_size\" is 1099511627776; it must be 1 to 131072"),
        ("hidden_size", json!("64"), "\"hidden_size\" is \"64\"; it must be a whole number"),
        ("hidden_size", Value::Null, "lacks \"hidden_size\""),
        ("vocab_size", json!(9_000_000_000_000_000_000_u64), "\"vocab_size\" is 9000000000000000000"),
        ("vocab_size", json!(1.5), "\"vocab_size\" is 1.5; it must be a whole number"),
        ("num_hidden_layers", json!(1_000_000), "\"num_hidden_layers\" is 1000000"),
        ("head_dim", json!(15), "\"head_dim\" is 15; rotary positions need an even one"),
        ("rms_norm_eps", json!(0), "\"rms_norm_eps\" is 0; it must be a number above 0"),
        ("rope_theta", json!(-1), "\"rope_theta\" is -1; it must be a number above 0"),
        ("rope_scaling", json!([]), "\"rope_scaling\" must be an object"),
        (
            "rope_scaling",
            json!({ "type": "yarn" }),
            "rope scaling \"yarn\" is not supported; supported are default, llama3",
        ),
        ("rope_scaling", json!({ "rope_type": "llama3" }), "llama3 rope scaling lacks \"factor\""),
        ("eos_token_id", json!("</s>"), "\"eos_token_id\" is \"</s>\"; it must be a token id or a list of them"),
        ("eos_token_id", json!(-3), "\"eos_token_id\" is -3; it must be a token id"),
        ("eos_token_id", json!([1, "a"]), "\"eos_token_id\" is \"a\"; it must be a token id"),
        ("eos_token_id", json!(1_000_000_000_000_u64), "\"eos_token_id\" is 1000000000000; it must be a token id"),
        ("eos_token_id", json!(256), "\"eos_token_id\" is 256, but the vocabulary has 256 tokens"),
        ("rms_norm_eps", json!("x"), "\"rms_norm_eps\" is \"x\"; it must be a number"),
        ("max_position_embeddings", json!(0), "\"max_position_embeddings\" is 0; it must be 1 to"),
        ("hidden_act", json!("gelu"), "\"hidden_act\" is \"gelu\"; only \"silu\" is supported"),
        ("quantization_config", json!({ "quant_method": "gptq" }), "the weights are quantised (\"gptq\")"),
        ("attention_bias", json!("yes"), "\"attention_bias\" is \"yes\"; it must be true or false"),
        ("tie_word_embeddings", json!(1), "\"tie_word_embeddings\" is 1; it must be true or false"),
        (
            "architectures",
            json!(["GPT2LMHeadModel"]),
            "architecture \"GPT2LMHeadModel\" is not supported; supported are LlamaForCausalLM, Qwen2ForCausalLM, \
             MistralForCausalLM",
        ),
        ("architectures", json!("LlamaForCausalLM"), "\"architectures\" must be a list of names"),
    ];
    for (name, value, expect) in cases {
        let error = read(&with(name, value)).unwrap_err().to_string();
        assert!(error.starts_with("config.json: ") && error.contains(expect), "{name}: {error}");
    }
    assert!(read(&json!([])).unwrap_err().to_string().contains("must be a JSON object"));
}

#[test]
fn end_tokens_of_both_files_count() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), sound().to_string()).unwrap();
    std::fs::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": [2, 7]}"#).unwrap();
    assert_eq!(Config::from_dir(dir.path()).unwrap().eos_token_ids, [2, 7]);
    std::fs::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": 300}"#).unwrap();
    let error = Config::from_dir(dir.path()).unwrap_err().to_string();
    assert!(error.contains("generation_config.json: \"eos_token_id\" is 300"), "{error}");
}

#[test]
fn a_missing_or_broken_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    assert_eq!(Config::from_dir(dir.path()).unwrap_err().code, Code::FileNotFound);
    std::fs::write(&path, "{\"hidden_size\": 64,").unwrap();
    let error = Config::from_dir(dir.path()).unwrap_err().to_string();
    assert!(error.contains("config.json: EOF while parsing"), "{error}");
    std::fs::File::create(&path).unwrap().set_len(1 << 30).unwrap();
    let error = Config::from_dir(dir.path()).unwrap_err().to_string();
    assert!(error.contains("config.json: is larger than 4194304 bytes"), "{error}");
}
