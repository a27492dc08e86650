//! What a shard's numbers mean, kept in the file's own key-value metadata.

use std::{collections::BTreeMap, fmt::Display, str::FromStr};

use retort_core::{
    Code, Error, Result,
    spec::{Codec, Quantiser, SoftTargets},
};
use serde::{Deserialize, Serialize};

use super::{quantise, v1};

/// Version of the format that this build writes, and the newest it reads.
pub const SCHEMA_VERSION: u32 = 2;

/// Longest value of one metadata key, bytes.
const MAX_VALUE: usize = 16 << 10;
/// Largest vocabulary; reading takes four bytes for each token of it.
const MAX_VOCABULARY: u32 = 1 << 24;
/// Every distribution is raw, whatever temperature the text was sampled at.
const CAPTURE_TEMPERATURE: &str = "1";

/// Stored as `retort.{field}`, numbers in decimal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    pub schema_version: u32,
    pub job: String,
    pub shard: u32,
    /// Fencing number of the attempt that wrote the file.
    pub epoch: u64,
    /// Of everything that decides the content; empty in version 1.
    pub work_sha256: String,
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
    /// What is kept of a distribution, and how.
    pub soft_targets: SoftTargets,
    pub tail_logprobs: TailLogprobs,
    pub seed: u64,
    pub prompt_set_sha256: String,
    /// `generate` or `score`.
    pub mode: String,
    /// How the text was sampled, as JSON.
    pub sampling_json: String,
}

/// What is known of the log-probability of a sampled token. The gradient of a forward KL needs
/// none; its value does, and so does another temperature.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TailLogprobs {
    /// One byte each.
    Stored,
    /// The mean over the shard, weighted by target mass, nats: the shard's mean KL is right, a single
    /// position's is not. Writing computes it.
    Mean(f32),
}

impl Header {
    /// Whether this build can write a shard of this header; the field at fault is named.
    pub(super) fn check_written(&self) -> Result<(), String> {
        if self.schema_version != SCHEMA_VERSION {
            return Err(format!("schema_version is {}, this build writes {SCHEMA_VERSION}", self.schema_version));
        }
        self.check()
    }

    fn check(&self) -> Result<(), String> {
        if self.vocab_size == 0 || self.vocab_size > MAX_VOCABULARY {
            return Err(format!("vocab_size is {}; it must lie between 1 and {MAX_VOCABULARY}", self.vocab_size));
        }
        self.soft_targets.check().map_err(|error| error.message.replace("teacher.soft_targets.", "retort."))?;
        if !self.soft_targets.temperatures.is_empty() && self.tail_logprobs != TailLogprobs::Stored {
            return Err("temperatures other than 1 need the tail's log-probabilities".to_owned());
        }
        if let TailLogprobs::Mean(mean) = self.tail_logprobs
            && !(mean.is_finite() && mean <= 0.0)
        {
            return Err(format!("tail_logprobs is {mean}; a mean log-probability is finite and not above 0"));
        }
        if self.split != "train" && self.split != "held_out" {
            return Err(format!("split is {:?}; it must be train or held_out", shown(&self.split)));
        }
        match self.pairs().iter().find(|(_, value)| value.len() > MAX_VALUE) {
            Some((key, value)) => Err(format!("{key} takes {} bytes, at most {MAX_VALUE} fit", value.len())),
            None => Ok(()),
        }
    }

    /// Largest number of entries one position can have.
    pub(super) fn max_support(&self) -> u64 {
        let codec = self.soft_targets.codec;
        u64::from(codec.max_head(self.vocab_size)) + u64::from(codec.max_draws())
    }

    /// Keys and values in the order they are written.
    pub(super) fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut pairs = vec![
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
        ];
        let codec = self.soft_targets.codec;
        match codec {
            Codec::Full => {}
            Codec::TopK { head } | Codec::TopKTail { head } => pairs.push(("retort.head", head.to_string())),
            Codec::HeadDraws { head, draws } => {
                pairs.extend([("retort.head", head.to_string()), ("retort.draws", draws.to_string())]);
            }
            Codec::Threshold { threshold } => pairs.push(("retort.threshold", threshold.to_string())),
            Codec::Random { draws } => pairs.push(("retort.draws", draws.to_string())),
        }
        pairs.extend([
            ("retort.capture_temperature", CAPTURE_TEMPERATURE.to_owned()),
            ("retort.seed", self.seed.to_string()),
            ("retort.prompt_set_sha256", self.prompt_set_sha256.clone()),
            ("retort.mode", self.mode.clone()),
            ("retort.sampling_json", self.sampling_json.clone()),
        ]);
        if self.schema_version == 1 {
            pairs.push(("retort.quantiser", v1::QUANTISER.to_owned()));
            return pairs;
        }
        let temperatures: Vec<String> = self.soft_targets.temperatures.iter().map(f64::to_string).collect();
        pairs.extend([
            ("retort.quantiser", quantiser_name(self.soft_targets.quantiser).to_owned()),
            ("retort.codec", codec.name().to_owned()),
            ("retort.temperatures", temperatures.join(",")),
            (
                "retort.tail_logprobs",
                match self.tail_logprobs {
                    TailLogprobs::Stored => "stored".to_owned(),
                    TailLogprobs::Mean(mean) => mean.to_string(),
                },
            ),
            ("retort.work_sha256", self.work_sha256.clone()),
        ]);
        pairs
    }

    /// Reads a header back. A newer `schema_version` is told before anything else is looked at.
    pub(super) fn from_pairs(pairs: &BTreeMap<&str, &str>) -> Result<Self> {
        let schema_version: u32 = whole(pairs, "retort.schema_version")?;
        if schema_version > SCHEMA_VERSION {
            return Err(Error::new(
                Code::ShardTooNew,
                format!(
                    "the shard has schema version {schema_version}, this build reads up to {SCHEMA_VERSION}; \
                     read it with a newer retort"
                ),
            ));
        }
        let capture_temperature: f64 = number(pairs, "retort.capture_temperature")?;
        if capture_temperature != 1.0 {
            return Err(corrupt(format!("retort.capture_temperature is {capture_temperature}; only 1 is stored")));
        }
        let (soft_targets, tail_logprobs, work_sha256) = match schema_version {
            0 => return Err(corrupt("retort.schema_version is 0; the first is 1".to_owned())),
            1 => (first_soft_targets(pairs)?, TailLogprobs::Stored, String::new()),
            _ => (soft_targets(pairs)?, tail_logprobs(pairs)?, text(pairs, "retort.work_sha256")?),
        };
        let header = Self {
            schema_version,
            job: text(pairs, "retort.job")?,
            shard: whole(pairs, "retort.shard")?,
            epoch: whole(pairs, "retort.epoch")?,
            work_sha256,
            split: text(pairs, "retort.split")?,
            engine: text(pairs, "retort.engine")?,
            engine_version: text(pairs, "retort.engine_version")?,
            dtype: text(pairs, "retort.dtype")?,
            teacher_sha256: text(pairs, "retort.teacher_sha256")?,
            tokenizer_sha256: text(pairs, "retort.tokenizer_sha256")?,
            chat_template_sha256: text(pairs, "retort.chat_template_sha256")?,
            vocab_size: whole(pairs, "retort.vocab_size")?,
            soft_targets,
            tail_logprobs,
            seed: whole(pairs, "retort.seed")?,
            prompt_set_sha256: text(pairs, "retort.prompt_set_sha256")?,
            mode: text(pairs, "retort.mode")?,
            sampling_json: text(pairs, "retort.sampling_json")?,
        };
        header.check().map_err(corrupt)?;
        Ok(header)
    }
}

fn quantiser_name(quantiser: Quantiser) -> &'static str {
    match quantiser {
        Quantiser::U8 => quantise::NAME,
        Quantiser::F32 => quantise::NAME_F32,
    }
}

fn first_soft_targets(pairs: &BTreeMap<&str, &str>) -> Result<SoftTargets> {
    let quantiser = text(pairs, "retort.quantiser")?;
    if quantiser != v1::QUANTISER {
        return Err(corrupt(format!("quantiser is {:?}; version 1 has {:?}", shown(&quantiser), v1::QUANTISER)));
    }
    let codec = Codec::HeadDraws { head: whole(pairs, "retort.head")?, draws: whole(pairs, "retort.draws")? };
    Ok(SoftTargets::of(codec))
}

fn soft_targets(pairs: &BTreeMap<&str, &str>) -> Result<SoftTargets> {
    let codec = match text(pairs, "retort.codec")?.as_str() {
        "full" => Codec::Full,
        "top_k" => Codec::TopK { head: whole(pairs, "retort.head")? },
        "top_k_tail" => Codec::TopKTail { head: whole(pairs, "retort.head")? },
        "head_draws" => Codec::HeadDraws { head: whole(pairs, "retort.head")?, draws: whole(pairs, "retort.draws")? },
        "threshold" => Codec::Threshold { threshold: number(pairs, "retort.threshold")? },
        "random" => Codec::Random { draws: whole(pairs, "retort.draws")? },
        other => return Err(corrupt(format!("codec is {:?}, which is not known", shown(other)))),
    };
    let quantiser = match text(pairs, "retort.quantiser")?.as_str() {
        quantise::NAME => Quantiser::U8,
        quantise::NAME_F32 => Quantiser::F32,
        other => return Err(corrupt(format!("quantiser is {:?}, which is not known", shown(other)))),
    };
    let temperatures = text(pairs, "retort.temperatures")?;
    let temperatures = temperatures.split(',').filter(|part| !part.is_empty()).map(|part| {
        let value = part.parse::<f64>();
        value.map_err(|error| corrupt(format!("retort.temperatures has {:?}: {error}", shown(part))))
    });
    Ok(SoftTargets { codec, quantiser, temperatures: temperatures.collect::<Result<_>>()? })
}

fn tail_logprobs(pairs: &BTreeMap<&str, &str>) -> Result<TailLogprobs> {
    if text(pairs, "retort.tail_logprobs")? == "stored" {
        return Ok(TailLogprobs::Stored);
    }
    number(pairs, "retort.tail_logprobs").map(TailLogprobs::Mean)
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

/// Rust's own reading takes a sign, too.
fn whole<T: FromStr>(pairs: &BTreeMap<&str, &str>, key: &str) -> Result<T>
where
    T::Err: Display,
{
    match pairs.get(key) {
        Some(value) if value.starts_with('+') => {
            Err(corrupt(format!("{key} is {:?}: it must be digits only", shown(value))))
        }
        _ => number(pairs, key),
    }
}

fn shown(value: &str) -> String {
    value.chars().take(80).collect()
}

fn corrupt(why: String) -> Error {
    Error::new(Code::ShardCorrupt, format!("the shard is corrupt: {why}"))
}
