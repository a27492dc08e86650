//! Embedded tokenizers, seen through the `tokenizers` library that reads what was written.

use tokenizers::Tokenizer;

use crate::Bench;
use crate::models::llama;
use crate::writer::{Value, Writer};

fn tokenizer(change: impl FnOnce(&mut Writer)) -> Tokenizer {
    let bench = Bench::new();
    let mut model = llama();
    change(&mut model);
    bench.import(&model.bytes()).unwrap();
    Tokenizer::from_file(bench.out().join("tokenizer.json")).unwrap()
}

fn pieces(tokenizer: &Tokenizer, text: &str) -> Vec<String> {
    tokenizer.encode(text, true).unwrap().get_tokens().to_vec()
}

fn with_pre(pre: &str) -> Tokenizer {
    tokenizer(|model| _ = model.set("tokenizer.ggml.pre", Value::String(pre.into())))
}

#[test]
fn smollm_splits_every_digit() {
    let tokenizer = with_pre("smollm");
    assert_eq!(pieces(&tokenizer, "hello w1234"), ["hello", "Ġw", "1", "2", "3", "4"]);
    assert_eq!(pieces(&tokenizer, "b  c\n\n"), ["b", "Ġ", "Ġ", "c", "ĊĊ"]);
    assert_eq!(pieces(&tokenizer, "é"), ["Ã©"]);
    assert_eq!(tokenizer.decode(tokenizer.encode("é ≠ 🙂\t", false).unwrap().get_ids(), false).unwrap(), "é ≠ 🙂\t");
}

#[test]
fn gpt2_keeps_digits_together_and_llama3_takes_three() {
    for name in ["gpt-2", "default"] {
        assert_eq!(pieces(&with_pre(name), "1234"), ["123", "4"]);
        assert_eq!(pieces(&with_pre(name), "5123"), ["5", "123"]);
    }
    let llama3 = with_pre("llama-bpe");
    assert_eq!(pieces(&llama3, "1234"), ["123", "4"]);
    assert_eq!(pieces(&llama3, "5123"), ["5", "12", "3"]);
    // A line's end goes with the mark before it: one piece, which no token is.
    assert_eq!(pieces(&llama3, "!\n\n"), ["!", "ĊĊ"]);
    assert_eq!(pieces(&llama3, "he'LL"), ["he", "'", "L", "L"]);
}

#[test]
fn llama3_takes_a_whole_piece_before_it_merges() {
    let change = |pre: &'static str| {
        move |model: &mut Writer| {
            model.set("tokenizer.ggml.pre", Value::String(pre.into()));
            // A token that no merge makes.
            let Some((_, Value::Strings(tokens))) =
                model.keys.iter_mut().find(|(key, _)| key == "tokenizer.ggml.tokens")
            else {
                panic!("no tokens")
            };
            *tokens.iter_mut().find(|token| *token == "Ã©").unwrap() = "wxyz".into();
            let merges = ["h e", "l l", "he ll", "hell o", "Ġ w"].map(str::to_owned).to_vec();
            model.set("tokenizer.ggml.merges", Value::Strings(merges));
        }
    };
    assert_eq!(pieces(&tokenizer(change("llama-bpe")), "wxyz"), ["wxyz"]);
    assert_eq!(pieces(&tokenizer(change("gpt-2")), "wxyz"), ["w", "x", "y", "z"]);
}

#[test]
fn qwen2_composes_characters() {
    let tokenizer = with_pre("qwen2");
    assert_eq!(pieces(&tokenizer, "e\u{301}12"), ["Ã©", "1", "2"]);
}

#[test]
fn control_tokens_are_found_in_the_text() {
    let tokenizer = with_pre("smollm");
    let encoded = tokenizer.encode("<|im_start|>hello<|im_end|>", false).unwrap();
    assert_eq!(encoded.get_ids()[0], 1);
    assert_eq!(encoded.get_ids()[2], 2);
    assert_eq!(tokenizer.decode(encoded.get_ids(), true).unwrap(), "hello");
    assert_eq!(tokenizer.get_vocab_size(true), 269);
}

#[test]
fn bos_and_eos_are_added_where_the_file_says_so() {
    let tokenizer = tokenizer(|model| {
        model.set("tokenizer.ggml.add_bos_token", Value::Bool(true));
        model.set("tokenizer.ggml.add_eos_token", Value::Bool(true));
    });
    assert_eq!(pieces(&tokenizer, "he"), ["<|im_start|>", "he", "<|im_end|>"]);
    assert_eq!(tokenizer.encode("he", false).unwrap().get_tokens(), ["he"]);
}

/// A SentencePiece vocabulary: unknown, two control tokens, the bytes, then scored pieces.
fn sentence_piece(model: &mut Writer) {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    let mut kinds = vec![2, 3, 3];
    tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    kinds.extend(std::iter::repeat_n(6, 256));
    let pieces = ["▁a", "ab", "▁ab", "bc", "abc", "a", "b", "c", "▁", "<keep>"];
    tokens.extend(pieces.map(str::to_owned));
    kinds.extend([1; 9]);
    kinds.push(4);
    let scores: Vec<f32> = (0..tokens.len()).map(|id| if id < 259 { 0.0 } else { 258.0 - id as f32 }).collect();
    model
        .set("tokenizer.ggml.model", Value::String("llama".into()))
        .set("tokenizer.ggml.tokens", Value::Strings(tokens))
        .set("tokenizer.ggml.token_type", Value::I32s(kinds))
        .set("tokenizer.ggml.scores", Value::F32s(scores))
        .remove("tokenizer.ggml.pre")
        .remove("tokenizer.ggml.merges")
        .remove("tokenizer.ggml.add_bos_token");
}

#[test]
fn sentence_piece_merges_the_best_score_first() {
    let tokenizer = tokenizer(sentence_piece);
    assert_eq!(pieces(&tokenizer, "ab abc"), ["<s>", "▁ab", "▁ab", "c"]);
    assert_eq!(pieces(&tokenizer, "cabc"), ["<s>", "▁", "c", "abc"]);
    assert_eq!(pieces(&tokenizer, "é"), ["<s>", "▁", "<0xC3>", "<0xA9>"]);
    assert_eq!(pieces(&tokenizer, "a<keep>b"), ["<s>", "▁a", "<keep>", "▁", "b"]);
    let ids = tokenizer.encode("  ab\né", true).unwrap().get_ids().to_vec();
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "  ab\né");
}

#[test]
fn sentence_piece_without_a_space_in_front() {
    let tokenizer = tokenizer(|model| {
        sentence_piece(model);
        model.set("tokenizer.ggml.add_space_prefix", Value::Bool(false));
    });
    assert_eq!(pieces(&tokenizer, "ab ab"), ["<s>", "ab", "▁ab"]);
}
