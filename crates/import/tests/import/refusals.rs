//! GGUF files that must be refused, each with its code and a message that names the fault.

use retort_core::Code;

use crate::Bench;
use crate::models::{llama, qwen2};
use crate::writer::{Value, Writer};

fn refused(bytes: &[u8], code: Code, said: &str) {
    let bench = Bench::new();
    let error = bench.import(bytes).unwrap_err();
    assert_eq!(error.code, code, "{}", error.message);
    assert!(error.message.contains(said), "{:?} does not say {said:?}", error.message);
    assert_eq!(bench.names(), ["model.gguf"]);
}

fn changed(change: impl FnOnce(&mut Writer)) -> Vec<u8> {
    let mut model = llama();
    change(&mut model);
    model.bytes()
}

fn text(text: &str) -> Value {
    Value::String(text.to_owned())
}

#[test]
fn not_a_gguf_file() {
    refused(b"", Code::GgufMalformed, "is it a GGUF file?");
    refused(b"GGUX1234", Code::GgufMalformed, "is it a GGUF file?");
    refused(b"GGUF", Code::GgufTruncated, "has 4 bytes");
    let version = |number: u32| {
        let mut model = llama();
        model.version = number;
        model.bytes()
    };
    refused(&version(1), Code::ModelUnsupported, "version 1");
    refused(&version(4), Code::ModelUnsupported, "version 4");
    refused(&version(3u32.swap_bytes()), Code::ModelUnsupported, "big-endian");
    let bench = Bench::new();
    assert_eq!(bench.import_from(&bench.path("absent.gguf")).unwrap_err().code, Code::FileNotFound);
}

#[test]
fn a_file_cut_anywhere() {
    let whole = llama().bytes();
    let bench = Bench::new();
    for length in (0..whole.len()).step_by(97).chain([whole.len() - 1]) {
        let error = bench.import(&whole[..length]).unwrap_err();
        if length >= 4 {
            assert_eq!(error.code, Code::GgufTruncated, "{length}: {}", error.message);
            assert!(error.message.contains(&format!("the file has {length} bytes")), "{}", error.message);
        }
    }
    let error = bench.import(&whole[..whole.len() - 1]).unwrap_err();
    assert!(error.message.contains(&format!("need {}", whole.len())), "{}", error.message);
}

#[test]
fn counts_and_lengths_that_lie() {
    let whole = llama().bytes();
    let with = |at: usize, number: u64| {
        let mut bytes = whole.clone();
        bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
        bytes
    };
    refused(&with(8, u64::MAX), Code::GgufMalformed, "tensors, more than");
    refused(&with(8, 60_000), Code::GgufTruncated, "tensors");
    refused(&with(16, 1 << 40), Code::GgufMalformed, "metadata keys, more than");
    refused(&with(24, u64::MAX), Code::GgufMalformed, "a metadata key claims");
    refused(&with(24, 60_000), Code::GgufTruncated, "a metadata key");
    let tokens = whole.windows(21).position(|window| window == b"tokenizer.ggml.tokens").unwrap() + 21 + 8;
    refused(&with(tokens, 1 << 60), Code::GgufMalformed, "tokenizer.ggml.tokens");
    refused(&with(tokens, 1 << 23), Code::GgufTruncated, "tokenizer.ggml.tokens");
    let architecture = whole.windows(20).position(|window| window == b"general.architecture").unwrap();
    let mut bytes = whole.clone();
    bytes[architecture] = 0xff;
    refused(&bytes, Code::GgufMalformed, "UTF-8");
    bytes = whole.clone();
    bytes[architecture + 20] = 99;
    refused(&bytes, Code::GgufMalformed, "unknown type 99");
}

#[test]
fn tensors_that_do_not_fit() {
    let norm = "output_norm.weight";
    refused(&changed(|m| m.tensor(norm).dims = vec![31]), Code::GgufMalformed, "shape [31]");
    refused(&changed(|m| m.tensor(norm).dims = vec![]), Code::GgufMalformed, "0 dimensions");
    refused(&changed(|m| m.tensor(norm).dims = vec![1; 5]), Code::GgufMalformed, "5 dimensions");
    refused(&changed(|m| m.tensor(norm).dims = vec![0]), Code::GgufMalformed, "empty");
    refused(&changed(|m| m.tensor(norm).dims = vec![1 << 40, 1 << 40]), Code::GgufMalformed, "no size");
    refused(&changed(|m| m.tensor(norm).dims = vec![1 << 40]), Code::GgufTruncated, "its tensors need");
    refused(&changed(|m| m.tensor(norm).kind = 10), Code::ModelUnsupported, "Q2_K");
    refused(&changed(|m| m.tensor(norm).kind = 4), Code::GgufMalformed, "unknown type 4");
    refused(&changed(|m| m.tensor("blk.0.attn_v.weight").dims = vec![31, 16]), Code::GgufMalformed, "blocks of 32");
    refused(&changed(|m| _ = m.remove_tensor(norm)), Code::GgufMalformed, "\"output_norm.weight\" is missing");
    refused(&changed(|m| _ = m.remove_tensor("token_embd.weight")), Code::GgufMalformed, "\"token_embd.weight\"");
    refused(
        &changed(|m| _ = m.add_f32("blk.0.attn_q_norm.weight", &[8], &[1.0; 8])),
        Code::ModelUnsupported,
        "attn_q_norm",
    );
    refused(&changed(|m| _ = m.add_f32("blk.2.ffn_norm.weight", &[32], &[1.0; 32])), Code::ModelUnsupported, "blk.2");
    refused(
        &changed(|m| {
            let twice = m.tensor(norm).clone();
            m.tensors.push(twice);
        }),
        Code::GgufMalformed,
        "comes twice",
    );
    refused(
        &changed(|m| _ = m.add_f32("rope_freqs.weight", &[4], &[1.0, 3.0, 2.0, 7.0])),
        Code::ModelUnsupported,
        "not Llama 3's",
    );
    refused(&changed(|m| _ = m.add_f32("rope_freqs.weight", &[3], &[1.0; 3])), Code::GgufMalformed, "4 values");
    refused(
        &changed(|m| _ = m.add_f32("blk.0.attn_q.bias", &[32], &[1.0; 32])),
        Code::ModelUnsupported,
        "only some attention projections",
    );
}

#[test]
fn offsets_that_lie() {
    let whole = llama().bytes();
    let name = b"output_norm.weight";
    let offset = whole.windows(name.len()).position(|window| window == name).unwrap() + name.len() + 4 + 8 + 4;
    let with = |number: u64| {
        let mut bytes = whole.clone();
        bytes[offset..offset + 8].copy_from_slice(&number.to_le_bytes());
        bytes
    };
    refused(&with(1), Code::GgufMalformed, "multiple of 32");
    refused(&with(0), Code::GgufMalformed, "overlap");
    refused(&with(1 << 40), Code::GgufTruncated, "its tensors need");
    refused(&with(u64::MAX - 31), Code::GgufMalformed, "beyond any file");
    let odd = changed(|m| _ = m.set("general.alignment", Value::U32(33)));
    refused(&odd, Code::GgufMalformed, "power of two");
    let huge = changed(|m| _ = m.set("general.alignment", Value::U32(1 << 31)));
    refused(&huge, Code::GgufMalformed, "power of two");
}

#[test]
fn metadata_that_retort_cannot_follow() {
    let set = |key: &str, value: Value| changed(|m| _ = m.set(key, value));
    let missing = |key: &str| changed(|m| _ = m.remove(key));
    refused(&missing("general.architecture"), Code::GgufMalformed, "general.architecture");
    refused(&missing("llama.block_count"), Code::GgufMalformed, "llama.block_count");
    refused(&missing("llama.attention.layer_norm_rms_epsilon"), Code::GgufMalformed, "epsilon");
    refused(&set("general.architecture", text("gemma2")), Code::ModelUnsupported, "gemma2");
    refused(&set("general.architecture", Value::U32(1)), Code::GgufMalformed, "not a string");
    refused(&set("general.type", text("adapter")), Code::ModelUnsupported, "adapter");
    refused(&set("llama.context_length", Value::U32(0)), Code::GgufMalformed, "llama.context_length is 0");
    refused(
        &set("tokenizer.chat_template", text("{% if %}")),
        Code::ModelMalformed,
        "model.gguf: the chat template does not work: syntax error",
    );
    refused(&set("split.count", Value::U32(3)), Code::ModelUnsupported, "3 files");
    refused(&set("llama.expert_count", Value::U32(8)), Code::ModelUnsupported, "8 experts");
    refused(&set("llama.rope.scaling.type", text("yarn")), Code::ModelUnsupported, "yarn");
    refused(&set("llama.rope.dimension_count", Value::U32(4)), Code::ModelUnsupported, "dimension_count");
    refused(&set("llama.rope.freq_base", Value::F32(0.0)), Code::GgufMalformed, "freq_base");
    refused(&set("llama.rope.freq_base", Value::F32(f32::NAN)), Code::GgufMalformed, "finite");
    refused(&set("llama.block_count", Value::U32(u32::MAX)), Code::GgufMalformed, "layers");
    refused(&set("llama.block_count", Value::U64(u64::MAX)), Code::GgufMalformed, "layers");
    refused(&set("llama.attention.head_count", Value::U32(0)), Code::GgufMalformed, "heads");
    refused(&set("llama.attention.head_count", Value::I32s(vec![4, 4])), Code::GgufMalformed, "head_count");
    refused(&set("llama.attention.head_count_kv", Value::U32(3)), Code::GgufMalformed, "share");
    let mut narrow = qwen2();
    narrow.set("qwen2.attention.key_length", Value::U32(16)).set("qwen2.rope.dimension_count", Value::U32(16));
    refused(&narrow.bytes(), Code::GgufMalformed, "blk.0.attn_q.weight");
}

#[test]
fn tokenizers_that_retort_cannot_follow() {
    let set = |key: &str, value: Value| changed(|m| _ = m.set(&format!("tokenizer.ggml.{key}"), value));
    refused(&set("model", text("bert")), Code::ModelUnsupported, "bert");
    refused(&set("pre", text("tekken")), Code::ModelUnsupported, "tekken");
    refused(&set("model", text("llama")), Code::GgufMalformed, "tokenizer.ggml.scores");
    refused(&set("tokens", Value::Strings(vec![])), Code::GgufMalformed, "empty");
    refused(&set("tokens", Value::Strings(vec!["a".into(); 269])), Code::GgufMalformed, "both \"a\"");
    refused(&set("token_type", Value::I32s(vec![1])), Code::GgufMalformed, "types");
    refused(&set("token_type", Value::I32s(vec![9; 269])), Code::GgufMalformed, "unknown type 9");
    refused(&set("merges", Value::Strings(vec!["ab".into()])), Code::GgufMalformed, "\"ab\"");
    refused(&set("merges", Value::Strings(vec!["x y".into()])), Code::GgufMalformed, "\"xy\"");
    refused(&set("eos_token_id", Value::U32(269)), Code::GgufMalformed, "269");
    let many: Vec<String> = (0..400).map(|id| format!("t{id}")).collect();
    refused(
        &changed(|m| {
            m.set("tokenizer.ggml.tokens", Value::Strings(many));
            m.remove("tokenizer.ggml.token_type").set("tokenizer.ggml.merges", Value::Strings(vec![]));
        }),
        Code::GgufMalformed,
        "400 tokens",
    );
    refused(
        &changed(|m| {
            m.remove("tokenizer.ggml.bos_token_id").set("tokenizer.ggml.add_bos_token", Value::Bool(true));
        }),
        Code::GgufMalformed,
        "bos",
    );
}
