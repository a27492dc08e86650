//! What is refused: with its code, the words that say why, and nothing left behind.

use std::fs;

use retort_core::{Code, Error, spec::GgufType};
use retort_export::{Gguf, check};
use retort_import::gguf::PreTokenizer;
use retort_model::Config;
use safetensors::Dtype;
use serde_json::json;

use crate::models::{Bench, tokenizer};

fn refused(bench: &Bench, kind: GgufType, code: Code, says: &str) {
    let before = bench.names();
    let error = bench.export(kind).unwrap_err();
    assert_eq!(error.code, code, "{}", error.message);
    assert!(error.message.contains(says), "{says:?} in {:?}", error.message);
    assert_eq!(bench.names(), before, "something was left behind");
}

#[test]
fn weights_that_are_damaged() {
    let bench = Bench::new();
    let tensor = "model.layers.1.self_attn.k_proj.weight";
    for value in [f32::NAN, f32::INFINITY] {
        bench.weights(Dtype::F32, |name, values| {
            if name == tensor {
                values[77] = value;
            }
        });
        for kind in GgufType::ALL {
            refused(&bench, kind, Code::ModelMalformed, &format!("\"{tensor}\" holds a value that is not finite"));
        }
    }
    let path = bench.model().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    for length in [0, 7, 100, bytes.len() - 1] {
        fs::write(&path, &bytes[..length]).unwrap();
        refused(&bench, GgufType::F16, Code::WeightsTruncated, "download it again");
    }
    fs::remove_file(&path).unwrap();
    refused(&bench, GgufType::F16, Code::FileNotFound, "model.safetensors");
}

#[test]
fn weights_that_a_type_cannot_hold() {
    let bench = Bench::new();
    bench.weights(Dtype::BF16, |name, values| {
        if name == "lm_head.weight" {
            values[5] = 1e20;
        }
    });
    for kind in [GgufType::F16, GgufType::Q8_0] {
        refused(&bench, kind, Code::ModelUnsupported, "tensor \"lm_head.weight\" holds 9.97");
    }
    bench.export(GgufType::Bf16).unwrap();
}

#[test]
fn configurations_that_contradict_the_weights_or_have_no_words() {
    let changed = |key: &str, value: serde_json::Value, code: Code, says: &str| {
        let bench = Bench::new();
        bench.set("config.json", key, value);
        refused(&bench, GgufType::Q8_0, code, says);
    };
    changed("architectures", json!(["GemmaForCausalLM"]), Code::ModelUnsupported, "GemmaForCausalLM");
    changed("hidden_size", json!(1u64 << 40), Code::ModelMalformed, "hidden_size");
    changed(
        "num_hidden_layers",
        json!(1000),
        Code::ModelMalformed,
        "lacks tensor \"model.layers.2.input_layernorm.weight\"",
    );
    changed("vocab_size", json!(300), Code::ModelMalformed, "has shape [270, 32]");
    changed("vocab_size", json!(16_000_000), Code::ModelMalformed, "15999734 rows of the embedding have no token");
    changed("num_hidden_layers", json!(1), Code::ModelUnsupported, "leaving it out would change the model");
    changed("mlp_bias", json!(true), Code::ModelUnsupported, "feed-forward projections have a bias");

    let bench = Bench::new();
    bench.set("config.json", "architectures", json!(["Qwen2ForCausalLM"]));
    bench.set(
        "config.json",
        "rope_scaling",
        json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}),
    );
    refused(&bench, GgufType::F16, Code::ModelUnsupported, "has no form in GGUF");
    let config = Config::from_dir(&bench.model()).unwrap();
    assert_eq!(check(&config, &bench.model()).unwrap_err().code, Code::ModelUnsupported);
}

#[test]
fn tokenizers_that_gguf_has_no_words_for() {
    let changed = |change: &dyn Fn(&mut serde_json::Value), says: &str| {
        let bench = Bench::new();
        let mut json = tokenizer(&PreTokenizer::Llama3.to_json());
        json["model"]["ignore_merges"] = json!(true);
        change(&mut json);
        bench.write("tokenizer.json", &json);
        refused(&bench, GgufType::Q8_0, Code::ModelUnsupported, says);
    };
    let names = "none of those retort can name in GGUF: gpt-2, llama-bpe, qwen2, smollm, or SentencePiece's";
    changed(&|json| json["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = json!(r"\d{1,2}|\D+"), names);
    changed(&|json| json["pre_tokenizer"] = json!(null), names);
    changed(&|json| json["normalizer"] = json!({"type": "Lowercase"}), "changes the text before it cuts it");
    changed(&|json| json["model"]["ignore_merges"] = json!(false), "the other way round for llama-bpe");
    changed(
        &|json| json["model"] = json!({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}),
        "GGUF is written for BPE alone",
    );
    changed(
        &|json| {
            json["post_processor"] = json!({
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
            });
        },
        "more around a text than the bos and the eos token",
    );

    let bench = Bench::new();
    fs::remove_file(bench.model().join("tokenizer.json")).unwrap();
    refused(&bench, GgufType::Q8_0, Code::FileNotFound, "tokenizer.json");
}

#[test]
fn a_file_that_is_there_stays_and_a_stop_leaves_nothing() {
    let bench = Bench::new();
    fs::write(bench.out(), "mine").unwrap();
    refused(&bench, GgufType::Q8_0, Code::ObjectExists, "--force");
    assert_eq!(fs::read(bench.out()).unwrap(), b"mine");

    let gguf = Gguf::plan(&bench.model(), "tiny", GgufType::Q8_0).unwrap();
    let mut calls = 0;
    let mut stop = |_| {
        calls += 1;
        if calls < 5 { Ok(()) } else { Err(Error::new(Code::JobCancelled, "enough")) }
    };
    assert_eq!(gguf.export(&bench.out(), true, &mut stop).unwrap_err().code, Code::JobCancelled);
    assert_eq!(bench.names(), ["tiny", "tiny.gguf"]);
    assert_eq!(fs::read(bench.out()).unwrap(), b"mine");
    // What a killed export left is cleared away by the next.
    fs::write(bench.folder.path().join(".retort-unfinished-abc"), "half").unwrap();
    gguf.export(&bench.out(), true, &mut |_| Ok(())).unwrap();
    assert_eq!(bench.names(), ["tiny", "tiny.gguf"]);
    assert_eq!(fs::metadata(bench.out()).unwrap().len(), gguf.bytes());
}

#[test]
fn a_full_disk_is_told() {
    let bench = Bench::new();
    let gguf = Gguf::plan(&bench.model(), "tiny", GgufType::Q8_0).unwrap();
    let mut full = fs::File::options().write(true).open("/dev/full").unwrap();
    let error = gguf.write(&mut full, &bench.out(), &mut |_| Ok(())).unwrap_err();
    assert_eq!(error.code, Code::DiskFull);
}
