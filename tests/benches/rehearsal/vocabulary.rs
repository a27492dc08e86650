//! 128,000 made-up words and 256 special tokens, with the ids that matter where Llama 3.1 has them.

use std::{fs, path::Path};

use serde_json::{Map, Value, json};

use crate::Failure;

pub const SIZE: u32 = 128_256;
const WORDS: u32 = 128_000;
pub const BEGIN: u32 = 128_000;
pub const ENDS: [u32; 3] = [128_001, 128_008, 128_009];
/// Names of the special tokens that the template writes or a completion ends with.
const NAMED: [(u32, &str); 6] = [
    (BEGIN, "<|begin_of_text|>"),
    (128_001, "<|end_of_text|>"),
    (128_006, "<|start_header_id|>"),
    (128_007, "<|end_header_id|>"),
    (128_008, "<|eom_id|>"),
    (128_009, "<|eot_id|>"),
];
const TEMPLATE: &str = "<|begin_of_text|>{% for message in messages %}\
    <|start_header_id|> {{ message.role }} <|end_header_id|> {{ message.content }} <|eot_id|>{% endfor %}\
    {% if add_generation_prompt %}<|start_header_id|> assistant <|end_header_id|> {% endif %}";

/// Writes tokenizer and chat template.
pub fn write(folder: &Path) -> Result<(), Failure> {
    let special = (WORDS..SIZE).map(|id| (id, name(id)));
    let words = (0..WORDS).map(|id| (id, word(id)));
    let vocabulary: Map<String, Value> = words.chain(special.clone()).map(|(id, word)| (word, id.into())).collect();
    assert_eq!(vocabulary.len(), SIZE as usize, "no two words are the same");
    let added: Vec<Value> = special
        .map(|(id, content)| {
            json!({ "id": id, "content": content, "special": true, "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false })
        })
        .collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "decoder": null, "pre_tokenizer": { "type": "WhitespaceSplit" }, "added_tokens": added,
        "model": { "type": "WordLevel", "vocab": vocabulary, "unk_token": word(0) },
    });
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string())?;
    let about = json!({ "chat_template": TEMPLATE, "bos_token": name(BEGIN), "eos_token": "<|eot_id|>" });
    fs::write(folder.join("tokenizer_config.json"), about.to_string())?;
    Ok(())
}

/// Words that are not special: what is unknown, the roles, then three syllables each.
pub fn word(id: u32) -> String {
    const ROLES: [&str; 4] = ["?", "system", "user", "assistant"];
    if let Some(role) = ROLES.get(id as usize) {
        return (*role).to_owned();
    }
    let syllable = |digit: u32| {
        let (consonant, vowel) = (digit as usize / 3, digit as usize % 3);
        [&"bcdfghjklmnprstvz"[consonant..=consonant], &"aio"[vowel..=vowel]].concat()
    };
    [id / (51 * 51), id / 51 % 51, id % 51].map(syllable).concat()
}

fn name(id: u32) -> String {
    let named = NAMED.iter().find(|(of, _)| *of == id);
    named.map_or_else(|| format!("<|reserved_special_token_{}|>", id - WORDS), |(_, name)| (*name).to_owned())
}
