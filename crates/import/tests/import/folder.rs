use std::path::PathBuf;

use retort_core::Code;
use retort_import::Format;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use crate::models::llama;
use crate::{Bench, tensor};

/// A folder to import: the tiny llama, as an import of its GGUF file left it.
fn source(bench: &Bench) -> PathBuf {
    let first = Bench::new();
    first.import(&llama().bytes()).unwrap();
    let source = bench.path("source");
    std::fs::create_dir(&source).unwrap();
    for name in
        ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
    {
        std::fs::copy(first.out().join(name), source.join(name)).unwrap();
    }
    source
}

/// Rewrites the weights of `source` as files of the given tensors; `change` sees every tensor.
fn rewrite(source: &std::path::Path, shards: usize, change: impl Fn(&str, &mut Vec<usize>, &mut Vec<u8>) -> bool) {
    let bytes = std::fs::read(source.join("model.safetensors")).unwrap();
    std::fs::remove_file(source.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut parts: Vec<Vec<(String, Dtype, Vec<usize>, Vec<u8>)>> = vec![Vec::new(); shards];
    let mut map = serde_json::Map::new();
    for (i, (name, view)) in file.tensors().into_iter().enumerate() {
        let (mut shape, mut data) = (view.shape().to_vec(), view.data().to_vec());
        if !change(&name, &mut shape, &mut data) {
            continue;
        }
        let part = i % shards;
        map.insert(name.clone(), json!(format!("model-{part}.safetensors")));
        parts[part].push((name, view.dtype(), shape, data));
    }
    for (part, tensors) in parts.iter().enumerate() {
        let views = tensors
            .iter()
            .map(|(name, dtype, shape, data)| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
        let name = if shards == 1 { "model.safetensors".into() } else { format!("model-{part}.safetensors") };
        std::fs::write(source.join(name), safetensors::serialize(views, None).unwrap()).unwrap();
    }
    if shards > 1 {
        let index = json!({"metadata": {"total_size": 0}, "weight_map": map});
        std::fs::write(source.join("model.safetensors.index.json"), index.to_string()).unwrap();
    }
}

fn set(source: &std::path::Path, key: &str, value: Value) {
    let path = source.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config[key] = value;
    std::fs::write(path, config.to_string()).unwrap();
}

#[test]
fn a_folder_is_copied_and_a_second_import_writes_nothing() {
    let bench = Bench::new();
    let source = source(&bench);
    std::fs::write(source.join("chat_template.jinja"), "{{ messages }}").unwrap();
    std::fs::write(source.join("unrelated.bin"), "x").unwrap();
    let imported = bench.import_from(&source).unwrap();
    assert_eq!(imported.source_format, Format::HuggingFace { weight_files: 1 });
    assert_eq!(imported.tensors, 20);
    for name in ["config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json", "model.safetensors"]
    {
        assert_eq!(std::fs::read(bench.out().join(name)).unwrap(), std::fs::read(source.join(name)).unwrap(), "{name}");
    }
    assert!(!bench.out().join("unrelated.bin").exists());
    assert!(bench.import_from(&source).unwrap().unchanged);
    set(&source, "initializer_range", json!(0.01));
    assert_eq!(bench.import_from(&source).unwrap_err().code, Code::ObjectExists);
}

#[test]
fn shards_become_one_file() {
    let bench = Bench::new();
    let source = source(&bench);
    let whole = std::fs::read(source.join("model.safetensors")).unwrap();
    rewrite(&source, 3, |_, _, _| true);
    let imported = bench.import_from(&source).unwrap();
    assert_eq!(imported.source_format, Format::HuggingFace { weight_files: 3 });
    assert_eq!(std::fs::read(bench.out().join("model.safetensors")).unwrap(), whole);
}

#[test]
fn a_tied_head_saved_twice_is_left_out() {
    let bench = Bench::new();
    let source = source(&bench);
    set(&source, "tie_word_embeddings", json!(false));
    let error = bench.import_from(&source).unwrap_err();
    assert!(error.message.contains("lacks tensor \"lm_head.weight\""), "{}", error.message);

    let bytes = std::fs::read(source.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut views = file.tensors();
    views.push(("lm_head.weight".into(), file.tensor("model.embed_tokens.weight").unwrap()));
    std::fs::write(source.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    assert_eq!(bench.import_from(&source).unwrap().tensors, 21);
    std::fs::remove_dir_all(bench.out()).unwrap();
    set(&source, "tie_word_embeddings", json!(true));
    assert_eq!(bench.import_from(&source).unwrap().tensors, 20);
    assert_eq!(tensor(&bench.out(), "model.embed_tokens.weight").1, [269, 32]);
}

fn refused(damage: impl FnOnce(&std::path::Path), code: Code, said: &str) {
    let bench = Bench::new();
    let source = source(&bench);
    damage(&source);
    let error = bench.import_from(&source).unwrap_err();
    assert_eq!(error.code, code, "{}", error.message);
    assert!(error.message.contains(said), "{:?} does not say {said:?}", error.message);
    assert_eq!(bench.names(), ["source"]);
}

#[test]
fn what_is_missing_or_wrong_is_named() {
    let remove = |name: &'static str| move |source: &std::path::Path| std::fs::remove_file(source.join(name)).unwrap();
    refused(remove("config.json"), Code::FileNotFound, "no config.json");
    refused(remove("tokenizer.json"), Code::FileNotFound, "save_pretrained");
    refused(remove("model.safetensors"), Code::FileNotFound, "model.safetensors.index.json");
    refused(
        |source| {
            std::fs::remove_file(source.join("model.safetensors")).unwrap();
            std::fs::write(source.join("pytorch_model.bin"), "").unwrap();
        },
        Code::FileNotFound,
        "pickled",
    );
    refused(
        |source| {
            std::fs::remove_file(source.join("config.json")).unwrap();
            std::fs::write(source.join("model.gguf"), "").unwrap();
        },
        Code::FileNotFound,
        "name the file itself",
    );
    refused(|source| std::fs::write(source.join("config.json"), "{").unwrap(), Code::ModelMalformed, "config.json");
    refused(|source| set(source, "architectures", json!(["Phi3ForCausalLM"])), Code::ModelUnsupported, "Phi3");
    refused(|source| set(source, "hidden_size", json!(64)), Code::ModelMalformed, "config.json asks for");
    refused(
        |source| rewrite(source, 1, |name, _, _| name != "model.norm.weight"),
        Code::ModelMalformed,
        "lacks tensor \"model.norm.weight\"",
    );
    refused(|source| set(source, "num_hidden_layers", json!(1)), Code::ModelUnsupported, "model.layers.1");
    refused(
        |source| {
            let path = source.join("model.safetensors");
            let length = std::fs::metadata(&path).unwrap().len();
            std::fs::File::options().write(true).open(path).unwrap().set_len(length - 1).unwrap();
        },
        Code::WeightsTruncated,
        "the file ends at byte",
    );
    refused(
        |source| {
            rewrite(source, 2, |_, _, _| true);
            let path = source.join("model.safetensors.index.json");
            let text = std::fs::read_to_string(&path).unwrap().replace("model-1", "../model-1");
            std::fs::write(path, text).unwrap();
        },
        Code::ModelMalformed,
        "outside the folder",
    );
    refused(
        |source| {
            rewrite(source, 2, |_, _, _| true);
            std::fs::remove_file(source.join("model-1.safetensors")).unwrap();
        },
        Code::FileNotFound,
        "model-1.safetensors",
    );
    refused(
        |source| {
            rewrite(source, 2, |_, _, _| true);
            std::fs::copy(source.join("model-0.safetensors"), source.join("model-1.safetensors")).unwrap();
        },
        Code::ModelMalformed,
        "is not in ",
    );
}

/// What comes out of an import is read by workers; both read with the same code.
#[test]
fn what_no_worker_loads_is_refused() {
    for (key, value, said) in [
        ("rms_norm_eps", json!(0), "\"rms_norm_eps\" is 0"),
        ("rms_norm_eps", json!("x"), "\"rms_norm_eps\" is \"x\""),
        ("rope_theta", json!(-1), "\"rope_theta\" is -1"),
        ("rope_scaling", json!({"rope_type": "llama3"}), "llama3 rope scaling lacks \"factor\""),
        ("max_position_embeddings", json!(0), "\"max_position_embeddings\" is 0"),
        ("eos_token_id", json!(1_000_000_000_000u64), "\"eos_token_id\" is 1000000000000"),
        ("eos_token_id", json!(269), "\"eos_token_id\" is 269, but the vocabulary has 269 tokens"),
        ("eos_token_id", json!(-3), "\"eos_token_id\" is -3"),
        ("eos_token_id", json!([1, "a"]), "\"eos_token_id\" is \"a\""),
    ] {
        refused(|source| set(source, key, value), Code::ModelMalformed, &format!("config.json: {said}"));
    }
    let write = |name: &'static str, text: &'static str| {
        move |source: &std::path::Path| std::fs::write(source.join(name), text).unwrap()
    };
    refused(write("tokenizer.json", "{}"), Code::ModelMalformed, "tokenizer.json: is no tokenizer");
    let template = "chat_template.jinja: the chat template does not work: ";
    refused(write("chat_template.jinja", "{% endif %}"), Code::ModelMalformed, template);
    refused(write("chat_template.jinja", "{{ nothing.more.here }}"), Code::ModelMalformed, template);
    refused(|source| set(source, "vocab_size", json!(100)), Code::VocabularyMismatch, "its highest token is 268");
}
