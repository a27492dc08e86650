//! Soft targets in the forms that other programs read without knowing a shard's: dense arrays for
//! numpy, and top-k lists in Parquet. Both are written as they come, a sequence at a time. The
//! forms are `docs/formats/exports.md`.

mod npz;
mod top_k;

pub use npz::{Dtype, NpzPlan, NpzWriter};
pub use top_k::TopKWriter;

use retort_core::{Code, Error, Result};

use super::Header;

/// Where exported distributions come from. One export has one origin: ids of two vocabularies, or
/// distributions of two teachers, do not belong in one array.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    pub vocab_size: u32,
    pub teacher_sha256: String,
    pub tokenizer_sha256: String,
    pub chat_template_sha256: String,
}

impl Origin {
    pub fn of(header: &Header) -> Self {
        Self {
            vocab_size: header.vocab_size,
            teacher_sha256: header.teacher_sha256.clone(),
            tokenizer_sha256: header.tokenizer_sha256.clone(),
            chat_template_sha256: header.chat_template_sha256.clone(),
        }
    }

    /// Errors: `TokenizerMismatch`, naming what differs, where `header` has another origin.
    pub fn check(&self, header: &Header) -> Result<()> {
        let other = Self::of(header);
        let differing = self.pairs().into_iter().zip(other.pairs()).find(|(mine, its)| mine != its);
        match differing {
            None => Ok(()),
            Some(((key, mine), (_, its))) => Err(Error::new(
                Code::TokenizerMismatch,
                format!(
                    "shard {} of job {:?} has {key} {}, those before it {}; export them apart",
                    header.shard,
                    shown(&header.job),
                    quoted(&its),
                    quoted(&mine)
                ),
            )),
        }
    }

    /// As the metadata of a shard has them.
    fn pairs(&self) -> [(&'static str, String); 4] {
        [
            ("retort.vocab_size", self.vocab_size.to_string()),
            ("retort.teacher_sha256", self.teacher_sha256.clone()),
            ("retort.tokenizer_sha256", self.tokenizer_sha256.clone()),
            ("retort.chat_template_sha256", self.chat_template_sha256.clone()),
        ]
    }
}

/// A number stays as it is.
fn quoted(value: &str) -> String {
    let value = shown(value);
    if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) { value } else { format!("{value:?}") }
}

fn shown(value: &str) -> String {
    value.chars().take(80).collect()
}
