//! Tiny models to import: 2 layers, hidden size 32, 4 heads of 8 values that share 2 key-value heads.

use crate::writer::{BF16, F16, F32, Q4_0, Q8_0, Tensor, Value, Writer};

pub const HIDDEN: u64 = 32;
pub const INTERMEDIATE: u64 = 64;
pub const HEAD_DIM: u64 = 8;
pub const HEADS: u64 = 4;
pub const KV_HEADS: u64 = 2;

/// A byte-level vocabulary: three control tokens, the 256 bytes, then what a few merges make.
pub fn byte_level_tokens() -> (Vec<String>, Vec<i32>, Vec<String>) {
    let mut tokens: Vec<String> = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(str::to_owned).to_vec();
    tokens.extend((0..=255).map(|byte| byte_char(byte).to_string()));
    let merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "12 3", "Ã ©", "Ġ Ġ", "Ċ Ċ"].map(str::to_owned);
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    let kinds = (0..tokens.len()).map(|id| if id < 3 { 3 } else { 1 }).collect();
    (tokens, kinds, merges.to_vec())
}

/// The character that byte-level vocabularies write a byte as.
fn byte_char(byte: u8) -> char {
    let plain = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    if plain(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|byte| !plain(*byte)).count() as u32;
    char::from_u32(256 + before).unwrap()
}

/// A llama with a tied head, as llama.cpp would write it.
pub fn llama() -> Writer {
    let (tokens, kinds, merges) = byte_level_tokens();
    let vocab = tokens.len() as u64;
    let mut model = Writer { version: 3, keys: Vec::new(), tensors: Vec::new() };
    model
        .set("general.architecture", Value::String("llama".into()))
        .set("general.name", Value::String("tiny".into()))
        .set("llama.block_count", Value::U32(2))
        .set("llama.context_length", Value::U32(128))
        .set("llama.embedding_length", Value::U32(HIDDEN as u32))
        .set("llama.feed_forward_length", Value::U32(INTERMEDIATE as u32))
        .set("llama.attention.head_count", Value::U32(HEADS as u32))
        .set("llama.attention.head_count_kv", Value::U32(KV_HEADS as u32))
        .set("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5))
        .set("llama.rope.freq_base", Value::F32(100_000.0))
        .set("llama.rope.dimension_count", Value::U32(HEAD_DIM as u32))
        .set("tokenizer.ggml.model", Value::String("gpt2".into()))
        .set("tokenizer.ggml.pre", Value::String("smollm".into()))
        .set("tokenizer.ggml.tokens", Value::Strings(tokens))
        .set("tokenizer.ggml.token_type", Value::I32s(kinds))
        .set("tokenizer.ggml.merges", Value::Strings(merges))
        .set("tokenizer.ggml.bos_token_id", Value::U32(1))
        .set("tokenizer.ggml.eos_token_id", Value::U32(2))
        .set("tokenizer.ggml.padding_token_id", Value::U32(2))
        .set("tokenizer.ggml.unknown_token_id", Value::U32(0))
        .set("tokenizer.ggml.add_bos_token", Value::Bool(false))
        .set("tokenizer.chat_template", Value::String("{{ messages[0]['content'] }}".into()));
    let (q, kv) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
    let mut add = |name: &str, dims: &[u64], kind: u32| {
        let seed = model.tensors.len() as u64;
        model.tensors.push(values(name, dims, kind, seed));
    };
    add("token_embd.weight", &[HIDDEN, vocab], Q8_0);
    for layer in 0..2 {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        add(&name("attn_norm"), &[HIDDEN], F32);
        add(&name("attn_q"), &[HIDDEN, q], F32);
        add(&name("attn_k"), &[HIDDEN, kv], F32);
        add(&name("attn_v"), &[HIDDEN, kv], Q4_0);
        add(&name("attn_output"), &[q, HIDDEN], F16);
        add(&name("ffn_norm"), &[HIDDEN], F32);
        add(&name("ffn_gate"), &[HIDDEN, INTERMEDIATE], Q4_0);
        add(&name("ffn_up"), &[HIDDEN, INTERMEDIATE], BF16);
        add(&name("ffn_down"), &[INTERMEDIATE, HIDDEN], Q8_0);
    }
    add("output_norm.weight", &[HIDDEN], F32);
    model
}

/// The same model as a qwen2: biases, and rotary halves where Hugging Face has them.
pub fn qwen2() -> Writer {
    let mut model = llama();
    for (key, _) in &mut model.keys {
        *key = key.replace("llama.", "qwen2.");
    }
    model.set("general.architecture", Value::String("qwen2".into()));
    model.set("tokenizer.ggml.pre", Value::String("qwen2".into()));
    for layer in 0..2 {
        for (part, size) in
            [("attn_q", HEADS * HEAD_DIM), ("attn_k", KV_HEADS * HEAD_DIM), ("attn_v", KV_HEADS * HEAD_DIM)]
        {
            let counted: Vec<f32> = (0..size).map(|i| i as f32).collect();
            model.add_f32(&format!("blk.{layer}.{part}.bias"), &[size], &counted);
        }
    }
    model
}

fn values(name: &str, dims: &[u64], kind: u32, seed: u64) -> Tensor {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let count: u64 = dims.iter().product();
    let small = |bits: u64| (bits % 2001) as f32 / 1000.0 - 1.0;
    let bytes = match kind {
        F32 => (0..count).flat_map(|_| small(next()).to_le_bytes()).collect(),
        F16 => (0..count).flat_map(|_| half::f16::from_f32(small(next())).to_le_bytes()).collect(),
        BF16 => (0..count).flat_map(|_| half::bf16::from_f32(small(next())).to_le_bytes()).collect(),
        _ => {
            let quants = if kind == Q4_0 { 16 } else { 32 };
            let mut bytes = Vec::new();
            for _ in 0..count / 32 {
                bytes.extend(half::f16::from_f32(small(next()) / 100.0).to_le_bytes());
                bytes.extend((0..quants).map(|_| next() as u8));
            }
            bytes
        }
    };
    Tensor { name: name.to_owned(), dims: dims.to_vec(), kind, bytes }
}
