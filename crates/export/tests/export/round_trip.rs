//! What retort's importer, which reads llama.cpp's files, makes of an export.

use std::fs;

use retort_core::spec::GgufType;
use retort_export::{Gguf, file_name};
use retort_import::gguf::PreTokenizer;
use retort_model::{Architecture, ChatMessage, Config, Tokenizer};
use safetensors::Dtype;
use serde_json::json;

use crate::models::{Bench, read, tokenizer};

fn same_weights(bench: &Bench, kind: GgufType) {
    let back = bench.round_trip(kind);
    let (ours, theirs) = (read(&bench.model()), read(&back));
    let values = |tensors: &[(String, Dtype, Vec<f32>)]| -> Vec<(String, Vec<u32>)> {
        tensors.iter().map(|(name, _, v)| (name.clone(), v.iter().map(|v| v.to_bits()).collect())).collect()
    };
    assert_eq!(values(&ours), values(&theirs));
}

#[test]
fn a_llama_comes_back_bit_for_bit() {
    let bench = Bench::new();
    same_weights(&bench, GgufType::F32);
    let back = Config::from_dir(&bench.folder.path().join("back-F32")).unwrap();
    let config = Config::from_dir(&bench.model()).unwrap();
    assert_eq!(Config { pad_token_id: None, ..back }, config);
    // f16 and bf16 are widened and narrowed again, and lose nothing on the way.
    for (stored, kind) in [(Dtype::F16, GgufType::F16), (Dtype::BF16, GgufType::Bf16)] {
        let bench = Bench::new();
        bench.weights(stored, |name, values| {
            // Vectors come back as f32; these are the same in both.
            if name.contains("norm") {
                values.iter_mut().for_each(|value| *value = 0.5);
            }
        });
        same_weights(&bench, kind);
    }
}

#[test]
fn biases_of_a_llama_and_a_head_dimension_of_its_own_come_back() {
    let bench = Bench::new();
    bench.set("config.json", "attention_bias", json!(true));
    bench.set("config.json", "head_dim", json!(16));
    bench.set("config.json", "tie_word_embeddings", json!(true));
    bench.weights(Dtype::F32, |_, _| {});
    same_weights(&bench, GgufType::F32);
}

#[test]
fn a_qwen2_keeps_its_order_and_a_mistral_its_window() {
    let bench = Bench::new();
    bench.set("config.json", "architectures", json!(["Qwen2ForCausalLM"]));
    bench.set("config.json", "model_type", json!("qwen2"));
    bench.weights(Dtype::F32, |_, _| {});
    same_weights(&bench, GgufType::F32);
    let back = Config::from_dir(&bench.folder.path().join("back-F32")).unwrap();
    assert_eq!((back.architecture, back.qkv_bias), (Architecture::Qwen2, true));

    let bench = Bench::new();
    bench.set("config.json", "architectures", json!(["MistralForCausalLM"]));
    bench.set("config.json", "model_type", json!("mistral"));
    bench.set("config.json", "sliding_window", json!(64));
    same_weights(&bench, GgufType::F32);
    let back = Config::from_dir(&bench.folder.path().join("back-F32")).unwrap();
    assert_eq!((back.architecture, back.sliding_window), (Architecture::Mistral, Some(64)));
}

#[test]
fn llama3_scaling_comes_back() {
    let bench = Bench::new();
    bench.set("config.json", "head_dim", json!(64));
    bench.set(
        "config.json",
        "rope_scaling",
        json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}),
    );
    bench.weights(Dtype::F32, |_, _| {});
    let back = Config::from_dir(&bench.round_trip(GgufType::F16)).unwrap();
    assert_eq!(back.rope_scaling, Config::from_dir(&bench.model()).unwrap().rope_scaling);
}

#[test]
fn q8_0_stays_within_half_a_step_and_vectors_stay_exact() {
    let bench = Bench::new();
    let back = bench.round_trip(GgufType::Q8_0);
    for ((name, _, ours), (_, _, theirs)) in read(&bench.model()).iter().zip(&read(&back)) {
        if name.contains("norm") {
            assert_eq!(ours, theirs, "{name}");
            continue;
        }
        assert_ne!(ours, theirs, "{name}");
        for (ours, theirs) in ours.as_chunks::<32>().0.iter().zip(theirs.as_chunks::<32>().0) {
            let step = ours.iter().fold(0f32, |largest, value| largest.max(value.abs())) / 127.0;
            let off = ours.iter().zip(theirs).fold(0f32, |off, (a, b)| off.max((a - b).abs()));
            assert!(off <= 0.57 * step, "{name}: {off} of {step}");
        }
    }
}

#[test]
fn rows_that_blocks_do_not_fill_are_f16() {
    let bench = Bench::new();
    bench.set("config.json", "intermediate_size", json!(40));
    bench.weights(Dtype::F32, |_, _| {});
    for (name, dtype, _) in read(&bench.round_trip(GgufType::Q8_0)) {
        let expected = if name.contains("down_proj") { Dtype::F16 } else { Dtype::F32 };
        assert_eq!(dtype, expected, "{name}");
    }
}

#[test]
fn each_way_to_cut_text_comes_back() {
    for pre in PreTokenizer::ALL {
        let bench = Bench::new();
        let mut json = tokenizer(&pre.to_json());
        json["model"]["ignore_merges"] = json!(pre == PreTokenizer::Llama3);
        // Older files write merges as one text.
        json["model"]["merges"] = json!(["h e", "l l", "he ll", "hell o", "Ġ w", "1 2"]);
        bench.write("tokenizer.json", &json);
        let back = Tokenizer::from_dir(&bench.round_trip(GgufType::F16)).unwrap();
        let source = Tokenizer::from_dir(&bench.model()).unwrap();
        for text in ["hello world 12345", " <tool>\n\nhello<|im_end|>é日本 we'll", "a  b\tc\r\n"] {
            for special in [false, true] {
                assert_eq!(
                    back.encode(text, special).unwrap(),
                    source.encode(text, special).unwrap(),
                    "{pre:?} {text}"
                );
            }
        }
        let messages = [ChatMessage::new("user", "hello")];
        assert_eq!(back.render_chat(&messages, true).unwrap(), "hello");
        assert_eq!(
            (back.eos_id(), back.special_id("bos_token"), back.special_id("unk_token")),
            (Some(2), Some(1), Some(0))
        );
    }
}

#[test]
fn what_stands_around_a_text_and_every_end_come_back() {
    let bench = Bench::new();
    let mut json = tokenizer(&PreTokenizer::Llama3.to_json());
    json["model"]["ignore_merges"] = json!(true);
    json["post_processor"] = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    });
    bench.write("tokenizer.json", &json);
    bench.write("generation_config.json", &json!({"eos_token_id": [2, 0]}));
    let back = bench.round_trip(GgufType::F16);
    assert_eq!(Tokenizer::from_dir(&back).unwrap().encode("hello", true).unwrap()[0], 1);
    assert_eq!(Config::from_dir(&back).unwrap().eos_token_ids, [2, 0]);
}

/// Llama 2's kind: spaces are a character, bytes are tokens, merges follow from scores.
fn sentence_piece() -> serde_json::Value {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    tokens.extend((0..=255u8).map(|byte| format!("<0x{byte:02X}>")));
    tokens.extend(["▁h", "el", "lo", "▁hel", "▁hello", "▁", "h", "e", "l", "o"].map(str::to_owned));
    let mut json = tokenizer(&json!(null));
    json["model"]["vocab"] = tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    json["model"]["merges"] = json!([["▁", "h"], ["e", "l"], ["l", "o"], ["▁h", "el"], ["▁hel", "lo"]]);
    json["model"]["unk_token"] = json!("<unk>");
    json["model"]["byte_fallback"] = json!(true);
    json["model"]["fuse_unk"] = json!(true);
    json["normalizer"] = json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]});
    json["decoder"] = json!(null);
    let added = json["added_tokens"].as_array_mut().unwrap();
    added.truncate(3);
    for (id, token) in added.iter_mut().enumerate() {
        token["content"] = json!(tokens[id]);
    }
    json
}

#[test]
fn sentence_piece_comes_back() {
    let bench = Bench::new();
    bench.write("tokenizer.json", &sentence_piece());
    bench.write("tokenizer_config.json", &json!({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}));
    let back = bench.round_trip(GgufType::F16);
    let (back, source) = (Tokenizer::from_dir(&back).unwrap(), Tokenizer::from_dir(&bench.model()).unwrap());
    for text in ["hello", "hello hello</s>", "héllo  lo"] {
        assert_eq!(back.encode(text, false).unwrap(), source.encode(text, false).unwrap(), "{text}");
    }
    assert_eq!(back.to_json().unwrap()["model"]["merges"], source.to_json().unwrap()["model"]["merges"]);

    // As newer versions of transformers save the same.
    let mut metaspace = sentence_piece();
    metaspace["normalizer"] = json!(null);
    metaspace["pre_tokenizer"] =
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": false});
    bench.write("tokenizer.json", &metaspace);
    fs::remove_dir_all(bench.folder.path().join("back-F16")).unwrap();
    let back = Tokenizer::from_dir(&bench.round_trip(GgufType::F16)).unwrap();
    let source = Tokenizer::from_dir(&bench.model()).unwrap();
    assert_eq!(back.encode("hello hello", false).unwrap(), source.encode("hello hello", false).unwrap());
}

#[test]
fn the_same_folder_makes_the_same_bytes_as_many_as_were_said() {
    let bench = Bench::new();
    let gguf = Gguf::plan(&bench.model(), "tiny", GgufType::Q8_0).unwrap();
    let mut seen = Vec::new();
    let mut progress = |progress: retort_export::Progress| {
        assert_eq!(progress.total, gguf.bytes());
        seen.push(progress.done);
        Ok(())
    };
    gguf.export(&bench.out(), false, &mut progress).unwrap();
    assert!(seen.is_sorted() && seen.last() == Some(&gguf.bytes()));
    let first = fs::read(bench.out()).unwrap();
    assert_eq!(first.len() as u64, gguf.bytes());
    let mut second = Vec::new();
    gguf.write(&mut second, &bench.out(), &mut |_| Ok(())).unwrap();
    assert!(first == second);
    assert_eq!(file_name("tiny", GgufType::Q8_0), "tiny-Q8_0.gguf");
}
