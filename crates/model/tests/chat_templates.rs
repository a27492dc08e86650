//! Chat templates rendered here and by transformers, character by character.

#![allow(clippy::unwrap_used)]

use retort_model::{ChatMessage, ChatTemplate};
use serde_json::Value;
use time::macros::datetime;

#[test]
fn renderings_are_those_of_transformers() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/parity/golden/chat_templates.json");
    let golden: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    for case in golden.as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let special_tokens = case["special_tokens"]
            .as_object()
            .unwrap()
            .iter()
            .map(|(role, token)| (role.clone(), token.as_str().unwrap().to_owned()))
            .collect();
        let source = case["template"].as_str().unwrap();
        let template =
            ChatTemplate::compile(name, source, special_tokens, Some(datetime!(2024-07-05 09:03:07 UTC))).unwrap();
        for rendering in case["renderings"].as_array().unwrap() {
            let messages: Vec<_> = rendering["messages"]
                .as_array()
                .unwrap()
                .iter()
                .map(|turn| ChatMessage::new(turn["role"].as_str().unwrap(), turn["content"].as_str().unwrap()))
                .collect();
            let result = template.render(&messages, rendering["add_generation_prompt"].as_bool().unwrap());
            match rendering["error"].as_str() {
                Some(error) => assert_eq!(result.unwrap_err().to_string(), format!("chat template: {error}"), "{name}"),
                None => assert_eq!(result.unwrap(), rendering["rendered"].as_str().unwrap(), "{name}"),
            }
        }
    }
}
