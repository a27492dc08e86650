//! How byte-level tokenizers cut text before they merge, in GGUF's names and as `tokenizer.json` says it.

use serde_json::{Value, json};

/// GPT-4's cut as Llama 3 (digits by threes) and Qwen2 (digits one by one) use it.
const LLAMA3_CUT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_CUT: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// GGUF's `tokenizer.ggml.pre`, of those that are read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PreTokenizer {
    Gpt2,
    Llama3,
    Qwen2,
    SmolLm,
}

impl PreTokenizer {
    pub const ALL: [Self; 4] = [Self::Gpt2, Self::Llama3, Self::Qwen2, Self::SmolLm];

    /// As `tokenizer.ggml.pre` says it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gpt2 => "gpt-2",
            Self::Llama3 => "llama-bpe",
            Self::Qwen2 => "qwen2",
            Self::SmolLm => "smollm",
        }
    }

    pub(crate) fn from_name(name: &str) -> Option<Self> {
        match name {
            "llama3" | "llama-v3" => Some(Self::Llama3),
            _ => Self::ALL.into_iter().find(|pre| pre.name() == name),
        }
    }

    /// All names, for error messages.
    pub fn names() -> String {
        Self::ALL.map(Self::name).join(", ")
    }

    /// As `tokenizer.json` says it.
    pub fn to_json(self) -> Value {
        let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
        let cut = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        let steps = match self {
            Self::Gpt2 => return bytes(true),
            Self::SmolLm => [json!({"type": "Digits", "individual_digits": true}), bytes(true)],
            Self::Llama3 => [cut(LLAMA3_CUT), bytes(false)],
            Self::Qwen2 => [cut(QWEN2_CUT), bytes(false)],
        };
        json!({"type": "Sequence", "pretokenizers": steps})
    }
}
