use serde_json::json;

use super::*;

/// A byte-level tokenizer with one special token and no merges, and its files.
pub(crate) fn write(dir: &Path) {
    let mut alphabet: Vec<char> = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let mut vocab: serde_json::Map<_, _> =
        alphabet.iter().enumerate().map(|(id, byte)| (byte.to_string(), json!(id + 1))).collect();
    vocab.insert("<s>".into(), json!(0));
    let byte_level = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    let tokenizer = json!({
        "version": "1.0",
        "truncation": { "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0 },
        "padding": null,
        "added_tokens": [{ "id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
                           "normalized": false, "special": true }],
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                   "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                   "vocab": vocab, "merges": [] }
    });
    fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let config = json!({
        "bos_token": { "content": "<s>" }, "eos_token": "absent",
        "chat_template": "{{ bos_token }}{{ messages[0].content }}{{ strftime_now('%Y') }}"
    });
    fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
}

#[test]
fn text_goes_there_and_back() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path());
    let mut tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!(tokenizer.vocab_size(), 257);
    assert_eq!((tokenizer.special_id("bos_token"), tokenizer.eos_id()), (Some(0), None));
    let text = "<s>na\u{ef}ve \u{1f600}";
    let ids = tokenizer.encode(text, true).unwrap();
    assert_eq!(ids[0], 0);
    assert_eq!(ids.len(), 12, "the file's truncation does not apply");
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), text[3..]);
    assert_eq!(tokenizer.decode(&[9999], true).unwrap(), "");

    tokenizer.pin_date(time::macros::datetime!(1999-12-31 0:00 UTC)).unwrap();
    let messages = [ChatMessage::new("user", "hi ")];
    assert_eq!(tokenizer.render_chat(&messages, true).unwrap(), "<s>hi 1999");
    assert_eq!(tokenizer.encode_chat(&messages, true).unwrap().len(), 8);
    assert_ne!(tokenizer.chat_template_sha256(), sha256_hex(b""));
}

#[test]
fn tokens_are_found_in_the_text_that_they_spell() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path());
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    let starts = |written: &str, text: &str| {
        let ids = tokenizer.encode(written, false).unwrap();
        tokenizer.starts_in(&ids, text).unwrap()
    };
    // Before it, in it (two bytes of one letter), and behind it.
    assert_eq!(starts("\na\u{e9}b<s>", "a\u{e9}b"), Some(vec![0, 0, 1, 1, 3, 4]));
    assert_eq!(starts("a<s>b", "a<s>b"), Some(vec![0, 1, 4]), "a control token that stands in it is part of it");
    // A chat template may trim it.
    assert_eq!(starts("ab<s>", "  ab\n"), Some(vec![2, 3, 4]));
    assert_eq!(starts("abc", "abd"), None);
    assert_eq!(starts("", "a"), None);
}

#[test]
fn the_text_files_copy() {
    let (dir, into) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write(dir.path());
    copy_text_files(dir.path(), &into.path().join("new")).unwrap();
    let (one, other) =
        (Tokenizer::from_dir(dir.path()).unwrap(), Tokenizer::from_dir(&into.path().join("new")).unwrap());
    assert_eq!(one.tokenizer_sha256(), other.tokenizer_sha256());
    assert_eq!(one.chat_template_sha256(), other.chat_template_sha256());
}

#[test]
fn faults_are_errors_that_name_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let error = || Tokenizer::from_dir(dir.path()).map(|_| ()).unwrap_err().to_string();
    assert!(error().contains("tokenizer.json: no such file"), "{}", error());
    for broken in ["", "{}", "[1]", r#"{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}"#] {
        fs::write(dir.path().join("tokenizer.json"), broken).unwrap();
        assert!(error().contains("tokenizer.json: is no tokenizer"), "{}", error());
    }
    write(dir.path());
    fs::write(dir.path().join("tokenizer_config.json"), "{").unwrap();
    assert!(error().contains("tokenizer_config.json: EOF"), "{}", error());
    fs::write(dir.path().join("tokenizer_config.json"), "{}").unwrap();
    let template = |text: &str| {
        fs::write(dir.path().join("chat_template.jinja"), text).unwrap();
        Tokenizer::from_dir(dir.path()).and_then(|tokenizer| tokenizer.probe_template())
    };
    for (broken, says) in [("{% if", "syntax error"), ("{{ messages[0].nothing.more }}", "undefined value")] {
        let error = template(broken).unwrap_err().to_string();
        assert!(error.contains("chat_template.jinja: the chat template does not work: "), "{error}");
        assert!(error.contains(says), "{error}");
    }
    template("{{ raise_exception('a system turn first') }}").unwrap();
    fs::remove_file(dir.path().join("chat_template.jinja")).unwrap();
    fs::remove_file(dir.path().join("tokenizer_config.json")).unwrap();
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    let error = tokenizer.render_chat(&[], true).unwrap_err().to_string();
    assert!(error.contains("put a chat_template.jinja beside it"), "{error}");
}

#[test]
fn a_control_token_in_a_message_is_one_token_as_with_transformers() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path());
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    let ids = tokenizer.encode_chat(&[ChatMessage::new("user", "a<s>")], true).unwrap();
    assert_eq!((ids[0], ids[2]), (0, 0), "the template's own, and the message's");
}

#[test]
fn a_token_beyond_the_models_vocabulary_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path());
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    tokenizer.require_fits(257).unwrap();
    let error = tokenizer.require_fits(256).unwrap_err();
    assert_eq!(error.code, Code::VocabularyMismatch);
    assert!(error.message.contains("its highest token is 256, but"), "{error}");
}
