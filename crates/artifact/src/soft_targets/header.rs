//! What a shard's numbers mean, kept in the file's own key-value metadata.

use std::{collections::BTreeMap, fmt::Display, str::FromStr};

use retort_core::{
    Code, Error, Result,
    spec::{MAX_DRAWS, MAX_HEAD},
};
use serde::{Deserialize, Serialize};

use super::quantise;

/// Version of the format that this build writes, and the newest it reads.
pub const SCHEMA_VERSION: u32 = 1;

/// Longest value of one metadata key, bytes.
const MAX_VALUE: usize = 16 << 10;

/// Stored as `retort.{field}`, numbers in decimal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    pub schema_version: u32,
    pub job: String,
    pub shard: u32,
    /// Fencing number of the attempt that wrote the file.
    pub epoch: u64,
    /// `train` or `held_out`.
    pub split: String,
    /// Engine that computed the distributions.
    pub engine: String,
    pub engine_version: String,
    /// Arithmetic of the teacher: `f32` or `bf16`.
    pub dtype: String,
    pub teacher_sha256: String,
    pub tokenizer_sha256: String,
    pub chat_template_sha256: String,
    pub vocab_size: u32,
    /// Most likely tokens kept exactly at each position.
    pub head: u32,
    /// Draws from the rest at each position; 0 keeps none.
    pub draws: u32,
    /// Always 1: distributions are raw, whatever temperature the text was sampled at.
    pub capture_temperature: f32,
    pub seed: u64,
    pub prompt_set_sha256: String,
    /// `generate` or `score`.
    pub mode: String,
    /// How the text was sampled, as JSON.
    pub sampling_json: String,
    /// How a log-probability became a byte; this build writes and reads [`super::QUANTISER`].
    pub quantiser: String,
}

impl Header {
    /// Whether this build can write a shard of this header; the field at fault is named.
    pub(super) fn check(&self) -> Result<(), String> {
        if self.schema_version != SCHEMA_VERSION {
            return Err(format!("schema_version is {}, this build writes {SCHEMA_VERSION}", self.schema_version));
        }
        if self.vocab_size == 0 {
            return Err("vocab_size is 0".to_owned());
        }
        if self.head == 0 || self.head > MAX_HEAD {
            return Err(format!("head is {}; it must lie between 1 and {MAX_HEAD}", self.head));
        }
        if self.draws > MAX_DRAWS {
            return Err(format!("draws is {}; it must lie between 0 and {MAX_DRAWS}", self.draws));
        }
        if self.capture_temperature != 1.0 {
            return Err(format!("capture_temperature is {}; only 1 is stored", self.capture_temperature));
        }
        if self.split != "train" && self.split != "held_out" {
            return Err(format!("split is {:?}; it must be train or held_out", shown(&self.split)));
        }
        if self.quantiser != quantise::NAME {
            return Err(format!("quantiser is {:?}; only {:?} is known", shown(&self.quantiser), quantise::NAME));
        }
        match self.pairs().iter().find(|(_, value)| value.len() > MAX_VALUE) {
            Some((key, value)) => Err(format!("{key} takes {} bytes, at most {MAX_VALUE} fit", value.len())),
            None => Ok(()),
        }
    }

    /// Largest number of entries one position can have.
    pub(super) fn max_support(&self) -> u64 {
        u64::from(self.head.min(self.vocab_size)) + u64::from(self.draws)
    }

    /// Keys and values in the order they are written.
    pub(super) fn pairs(&self) -> Vec<(&'static str, String)> {
        vec![
            ("retort.schema_version", self.schema_version.to_string()),
            ("retort.job", self.job.clone()),
            ("retort.shard", self.shard.to_string()),
            ("retort.epoch", self.epoch.to_string()),
            ("retort.split", self.split.clone()),
            ("retort.engine", self.engine.clone()),
            ("retort.engine_version", self.engine_version.clone()),
            ("retort.dtype", self.dtype.clone()),
            ("retort.teacher_sha256", self.teacher_sha256.clone()),
            ("retort.tokenizer_sha256", self.tokenizer_sha256.clone()),
            ("retort.chat_template_sha256", self.chat_template_sha256.clone()),
            ("retort.vocab_size", self.vocab_size.to_string()),
            ("retort.head", self.head.to_string()),
            ("retort.draws", self.draws.to_string()),
            ("retort.capture_temperature", self.capture_temperature.to_string()),
            ("retort.seed", self.seed.to_string()),
            ("retort.prompt_set_sha256", self.prompt_set_sha256.clone()),
            ("retort.mode", self.mode.clone()),
            ("retort.sampling_json", self.sampling_json.clone()),
            ("retort.quantiser", self.quantiser.clone()),
        ]
    }

    /// Reads a header back. A newer `schema_version` is told before anything else is looked at.
    pub(super) fn from_pairs(pairs: &BTreeMap<&str, &str>) -> Result<Self> {
        let schema_version: u32 = number(pairs, "retort.schema_version")?;
        if schema_version > SCHEMA_VERSION {
            return Err(Error::new(
                Code::ShardTooNew,
                format!(
                    "the shard has schema version {schema_version}, this build reads up to {SCHEMA_VERSION}; \
                     read it with a newer retort"
                ),
            ));
        }
        let header = Self {
            schema_version,
            job: text(pairs, "retort.job")?,
            shard: number(pairs, "retort.shard")?,
            epoch: number(pairs, "retort.epoch")?,
            split: text(pairs, "retort.split")?,
            engine: text(pairs, "retort.engine")?,
            engine_version: text(pairs, "retort.engine_version")?,
            dtype: text(pairs, "retort.dtype")?,
            teacher_sha256: text(pairs, "retort.teacher_sha256")?,
            tokenizer_sha256: text(pairs, "retort.tokenizer_sha256")?,
            chat_template_sha256: text(pairs, "retort.chat_template_sha256")?,
            vocab_size: number(pairs, "retort.vocab_size")?,
            head: number(pairs, "retort.head")?,
            draws: number(pairs, "retort.draws")?,
            capture_temperature: number(pairs, "retort.capture_temperature")?,
            seed: number(pairs, "retort.seed")?,
            prompt_set_sha256: text(pairs, "retort.prompt_set_sha256")?,
            mode: text(pairs, "retort.mode")?,
            sampling_json: text(pairs, "retort.sampling_json")?,
            quantiser: text(pairs, "retort.quantiser")?,
        };
        header.check().map_err(corrupt)?;
        Ok(header)
    }
}

fn text(pairs: &BTreeMap<&str, &str>, key: &str) -> Result<String> {
    let value = pairs.get(key).ok_or_else(|| corrupt(format!("its metadata lacks {key}")))?;
    Ok((*value).to_owned())
}

fn number<T: FromStr>(pairs: &BTreeMap<&str, &str>, key: &str) -> Result<T>
where
    T::Err: Display,
{
    let value = pairs.get(key).ok_or_else(|| corrupt(format!("its metadata lacks {key}")))?;
    value.parse().map_err(|error| corrupt(format!("{key} is {:?}: {error}", shown(value))))
}

fn shown(value: &str) -> String {
    value.chars().take(80).collect()
}

fn corrupt(why: String) -> Error {
    Error::new(Code::ShardCorrupt, format!("the shard is corrupt: {why}"))
}
