//! SmolLM2-135M-Instruct as this project imports it, against transformers: logits, greedy answers,
//! token ids, rendered chats. So a fault of the import shows here as well.

#![allow(clippy::unwrap_used)]

use std::{ops::ControlFlow, path::PathBuf};

use retort_llama::{ChatMessage, GenerateOptions, Model, TextStream, Tokenizer, generate};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

const TOLERANCE: f64 = 1e-4;

/// The folder of the imported model. Its absence is a failure: a check that skips checks nothing.
fn model_dir() -> PathBuf {
    let env = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let cache = || env("RETORT_CACHE").unwrap_or_else(|| env("HOME").unwrap_or_default().join(".cache/retort"));
    let models = || env("RETORT_MODELS").unwrap_or_else(|| cache().join("models"));
    let dir = env("RETORT_TEST_MODEL").unwrap_or_else(|| models().join("smollm2-135m-instruct"));
    assert!(
        dir.join("config.json").exists(),
        "{} holds no model: `make test` imports it; or set RETORT_TEST_MODEL to a folder of SmolLM2-135M-Instruct",
        dir.display()
    );
    dir
}

fn golden() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/parity/golden/smollm2.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn logits_are_those_of_transformers() {
    let model = Model::load(&model_dir(), Device::Cpu, Kind::Float).unwrap();
    let mut worst = 0.0_f64;
    for text in golden()["texts"].as_array().unwrap() {
        let ids = integers(&text["ids"]);
        let logits_tv = tch::no_grad(|| {
            let hidden_bth = model.hidden(&Tensor::from_slice(&ids).unsqueeze(0)).unwrap();
            model.head(&hidden_bth).unwrap().squeeze_dim(0)
        });
        let (max_t, argmax_t) = logits_tv.max_dim(-1, false);
        assert_eq!(Vec::<i64>::try_from(&argmax_t).unwrap(), integers(&text["argmax"]), "{}", text["text"]);
        for (at, expected) in text["max"].as_array().unwrap().iter().enumerate() {
            worst = worst.max((max_t.double_value(&[at as i64]) - expected.as_f64().unwrap()).abs());
        }
        let sample = integers(&text["sample_ids"]);
        for (position, expected) in integers(&text["positions"]).iter().zip(text["sample_logits"].as_array().unwrap()) {
            for (id, expected) in sample.iter().zip(expected.as_array().unwrap()) {
                let logit = logits_tv.double_value(&[*position, *id]);
                worst = worst.max((logit - expected.as_f64().unwrap()).abs());
            }
        }
    }
    println!("SmolLM2-135M-Instruct: largest difference of a logit from transformers {worst:.2e}");
    assert!(worst <= TOLERANCE, "{worst}");
}

#[test]
fn answers_are_those_of_transformers() {
    let dir = model_dir();
    let model = Model::load(&dir, Device::Cpu, Kind::Float).unwrap();
    let tokenizer = Tokenizer::from_dir(&dir).unwrap();
    for chat in golden()["chats"].as_array().unwrap() {
        let messages: Vec<_> = chat["messages"]
            .as_array()
            .unwrap()
            .iter()
            .map(|message| ChatMessage::new(message["role"].as_str().unwrap(), message["content"].as_str().unwrap()))
            .collect();
        assert_eq!(tokenizer.render_chat(&messages, true).unwrap(), chat["rendered"].as_str().unwrap());
        let prompt = tokenizer.encode_chat(&messages, true).unwrap();
        assert_eq!(widened(&prompt), integers(&chat["ids"]));
        let mut stream = TextStream::new(&tokenizer);
        let mut told = String::new();
        let answer = generate(&model, &prompt, &GenerateOptions::greedy(&model, 24), &mut |token| {
            told.push_str(&stream.push(token).unwrap());
            ControlFlow::Continue(())
        })
        .unwrap();
        assert_eq!(widened(&answer), integers(&chat["greedy"]), "{}", chat["text"]);
        told.push_str(&stream.finish().unwrap());
        assert_eq!(told, chat["text"].as_str().unwrap());
    }
}

#[test]
fn token_ids_are_those_of_transformers() {
    let tokenizer = Tokenizer::from_dir(&model_dir()).unwrap();
    for case in golden()["tokens"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(widened(&ids), integers(&case["ids"]), "{text:?}");
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), case["decoded"].as_str().unwrap());

        let mut stream = TextStream::new(&tokenizer);
        let mut told: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        told.push_str(&stream.finish().unwrap());
        assert_eq!(told, tokenizer.decode(&ids, true).unwrap(), "streamed {text:?}");
    }
}

fn widened(ids: &[u32]) -> Vec<i64> {
    ids.iter().map(|&id| i64::from(id)).collect()
}

fn integers(value: &Value) -> Vec<i64> {
    value.as_array().unwrap().iter().map(|number| number.as_i64().unwrap()).collect()
}
