//! A teacher small enough for a test: random weights in SmolLM2's vocabulary.

use std::path::{Path, PathBuf};

use retort_llama::{Config, Model};
use tch::{Device, Kind};

/// The imported SmolLM2-135M-Instruct, made by `make test` (and by the demo).
pub fn smollm2() -> PathBuf {
    let models = std::env::var_os("RETORT_MODELS").map(PathBuf::from).or_else(|| {
        let cache = std::env::var_os("RETORT_CACHE").map(PathBuf::from);
        let cache = cache.or_else(|| std::env::home_dir().map(|home| home.join(".cache").join("retort")))?;
        Some(cache.join("models"))
    });
    let folder = models.expect("a home folder").join("smollm2-135m-instruct");
    assert!(folder.join("config.json").exists(), "{} is not there: run `make test`", folder.display());
    folder
}

/// Writes a random Llama of 64 hidden units and `layers` layers with SmolLM2's tokenizer, 3 M parameters.
pub fn tiny(folder: &Path, layers: usize) {
    let source = smollm2();
    let text = std::fs::read_to_string(source.join("config.json")).expect("the config");
    let mut config: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    for (key, value) in [
        ("hidden_size", 64),
        ("intermediate_size", 128),
        ("num_attention_heads", 4),
        ("num_key_value_heads", 2),
        ("head_dim", 16),
        ("num_hidden_layers", layers),
    ] {
        config[key] = value.into();
    }
    std::fs::create_dir_all(folder).expect("a folder");
    std::fs::write(folder.join("config.json"), config.to_string()).expect("the config");
    let config = Config::from_dir(folder).expect("a config");
    let model = Model::init(config, Device::Cpu, Kind::Float, 11).expect("a model");
    model.save(folder, Kind::Float).expect("saved");
    for entry in std::fs::read_dir(&source).expect("a folder") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        if name.starts_with("tokenizer") || name.starts_with("chat_template") || name.starts_with("special_tokens") {
            std::fs::copy(&path, folder.join(name)).expect("copied");
        }
    }
}
