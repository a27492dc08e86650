//! How sparsely a teacher's distributions are stored.

use serde::{Deserialize, Serialize};

use super::{
    section,
    validate::{count, invalid, within},
};
use crate::Result;

/// Largest exact head of a soft target; only [`Codec::Full`] keeps more.
pub const MAX_HEAD: u32 = 1024;
/// Most draws of a soft target; a token's count is stored in one byte.
pub const MAX_DRAWS: u32 = 255;
/// Bounds of [`Codec::Threshold`].
pub const THRESHOLDS: (f64, f64) = (1.0 / MAX_HEAD as f64, 0.5);
/// Bounds of a temperature at which a student may use the soft targets.
pub const TEMPERATURES: (f64, f64) = (0.05, 20.0);
/// Most temperatures of one job.
pub const MAX_TEMPERATURES: usize = 8;

/// What held-out shards keep whatever a spec says: they are the measure that the student is judged by.
pub const HELD_OUT_CODEC: Codec = Codec::HeadDraws { head: 256, draws: 128 };

/// Threshold of a job that names none; `docs/fidelity.md` says why.
const DEFAULT_THRESHOLD: f64 = 0.025;
const DEFAULT_HEAD: u32 = 32;
const DEFAULT_DRAWS: u32 = 16;

/// What of a distribution *p* is kept at each position, and what is made of the rest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Codec {
    /// Every token: tens of kilobytes a position, for reference runs.
    Full,
    /// The `head` most likely tokens; the rest is lost, so a student learns too sharp a distribution.
    TopK { head: u32 },
    /// The `head` most likely tokens, and the rest's mass as one bucket.
    TopKTail { head: u32 },
    /// The `head` most likely tokens exactly, and `draws` systematic samples of the rest, which stand
    /// for its mass: unbiased.
    HeadDraws { head: u32, draws: u32 },
    /// Every token of at least `threshold` exactly, and of the rest one systematic sample for each
    /// `threshold` of its mass: unbiased, and of all unbiased samplings with so many entries the one
    /// with the least variance. Sure positions take few entries, unsure ones many.
    Threshold { threshold: f64 },
    /// `draws` independent samples of the whole, without a head: unbiased (Anshumann et al., "Sparse
    /// Logit Sampling: Accelerating Knowledge Distillation in LLMs", ACL 2025).
    Random { draws: u32 },
}

impl Codec {
    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::TopK { .. } => "top_k",
            Self::TopKTail { .. } => "top_k_tail",
            Self::HeadDraws { .. } => "head_draws",
            Self::Threshold { .. } => "threshold",
            Self::Random { .. } => "random",
        }
    }

    /// Most tokens that are kept exactly, over `vocab_size`.
    pub fn max_head(self, vocab_size: u32) -> u32 {
        let head = match self {
            Self::Full => vocab_size,
            Self::TopK { head } | Self::TopKTail { head } | Self::HeadDraws { head, .. } => head,
            Self::Threshold { threshold } => at_most(threshold),
            Self::Random { .. } => 0,
        };
        head.min(vocab_size)
    }

    /// Most samples of the rest.
    pub fn max_draws(self) -> u32 {
        match self {
            Self::Full | Self::TopK { .. } | Self::TopKTail { .. } => 0,
            Self::HeadDraws { draws, .. } | Self::Random { draws } => draws,
            Self::Threshold { threshold } => at_most(threshold),
        }
    }

    /// Whether the mass outside the head is kept as one bucket.
    pub fn has_bucket(self) -> bool {
        matches!(self, Self::TopKTail { .. })
    }

    /// The field that cannot be right, with its bounds.
    pub fn check(self) -> Result<()> {
        let head = |head| count("teacher.soft_targets.head", head, 1, MAX_HEAD);
        let draws = |draws, least| count("teacher.soft_targets.draws", draws, least, MAX_DRAWS);
        match self {
            Self::Full => Ok(()),
            Self::TopK { head: k } | Self::TopKTail { head: k } => head(k),
            Self::HeadDraws { head: k, draws: d } => head(k).and_then(|()| draws(d, 0)),
            Self::Threshold { threshold } => {
                within("teacher.soft_targets.threshold", threshold, THRESHOLDS.0, THRESHOLDS.1)
            }
            Self::Random { draws: d } => draws(d, 1),
        }
    }
}

/// How many tokens can have `threshold` or more each; rounding may let one more in.
fn at_most(threshold: f64) -> u32 {
    (1.0 / threshold * (1.0 + 1e-6)).floor().clamp(1.0, f64::from(MAX_HEAD)) as u32
}

/// How the log-probability of a head's token is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Quantiser {
    /// One byte, down from the position's largest.
    #[default]
    U8,
    /// As the teacher gave it.
    F32,
}

impl Quantiser {
    pub fn name(self) -> &'static str {
        match self {
            Self::U8 => "u8",
            Self::F32 => "f32",
        }
    }
}

/// How sparsely a teacher's distributions are stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Flat", into = "Flat")]
pub struct SoftTargets {
    pub codec: Codec,
    pub quantiser: Quantiser,
    /// Beside 1: temperatures at which a student may use the soft targets, rising.
    pub temperatures: Vec<f64>,
}

impl Default for SoftTargets {
    fn default() -> Self {
        Self::of(Codec::Threshold { threshold: DEFAULT_THRESHOLD })
    }
}

impl SoftTargets {
    /// With bytes for log-probabilities, for temperature 1.
    pub fn of(codec: Codec) -> Self {
        Self { codec, quantiser: Quantiser::U8, temperatures: Vec::new() }
    }

    /// The first field that cannot be right, named with its value and its bounds.
    pub fn check(&self) -> Result<()> {
        self.codec.check()?;
        if self.temperatures.len() > MAX_TEMPERATURES {
            let many = self.temperatures.len();
            return Err(invalid(format!(
                "teacher.soft_targets.temperatures has {many} values; at most {MAX_TEMPERATURES} are stored"
            )));
        }
        for &temperature in &self.temperatures {
            within("teacher.soft_targets.temperatures", temperature, TEMPERATURES.0, TEMPERATURES.1)?;
        }
        if !self.temperatures.is_sorted_by(|a, b| a < b) || self.temperatures.contains(&1.0) {
            return Err(invalid(format!(
                "teacher.soft_targets.temperatures is {:?}; they must rise, and 1 is always there",
                self.temperatures
            )));
        }
        Ok(())
    }
}

/// As a spec says it: one level of keys, of which a codec takes its own.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Flat {
    pub codec: Option<CodecName>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub draws: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threshold: Option<f64>,
    pub quantiser: Quantiser,
    #[serde(deserialize_with = "section", skip_serializing_if = "Vec::is_empty")]
    pub temperatures: Vec<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CodecName {
    Full,
    TopK,
    TopKTail,
    HeadDraws,
    Threshold,
    Random,
}

impl TryFrom<Flat> for SoftTargets {
    type Error = String;

    /// Without a `codec`, a head or draws mean `head_draws`, nothing means the default. A key that the
    /// codec does not take is refused by name.
    fn try_from(flat: Flat) -> Result<Self, String> {
        let Flat { codec, mut head, mut draws, mut threshold, quantiser, mut temperatures } = flat;
        let name = codec.unwrap_or(match (head, draws) {
            (None, None) => CodecName::Threshold,
            _ => CodecName::HeadDraws,
        });
        let mut head_or_default = || head.take().unwrap_or(DEFAULT_HEAD);
        let mut draws_or_default = || draws.take().unwrap_or(DEFAULT_DRAWS);
        let codec = match name {
            CodecName::Full => Codec::Full,
            CodecName::TopK => Codec::TopK { head: head_or_default() },
            CodecName::TopKTail => Codec::TopKTail { head: head_or_default() },
            CodecName::HeadDraws => Codec::HeadDraws { head: head_or_default(), draws: draws_or_default() },
            CodecName::Threshold => Codec::Threshold { threshold: threshold.take().unwrap_or(DEFAULT_THRESHOLD) },
            CodecName::Random => Codec::Random { draws: draws_or_default() },
        };
        let left = [("head", head.is_some()), ("draws", draws.is_some()), ("threshold", threshold.is_some())];
        if let Some((key, _)) = left.into_iter().find(|(_, left)| *left) {
            return Err(format!("teacher.soft_targets.{key} is nothing that the codec {} takes", codec.name()));
        }
        temperatures.retain(|&temperature| temperature != 1.0);
        Ok(Self { codec, quantiser, temperatures })
    }
}

impl From<SoftTargets> for Flat {
    fn from(soft_targets: SoftTargets) -> Self {
        let SoftTargets { codec, quantiser, temperatures } = soft_targets;
        let none = Self { quantiser, temperatures, ..Self::default() };
        match codec {
            Codec::Full => Self { codec: Some(CodecName::Full), ..none },
            Codec::TopK { head } => Self { codec: Some(CodecName::TopK), head: Some(head), ..none },
            Codec::TopKTail { head } => Self { codec: Some(CodecName::TopKTail), head: Some(head), ..none },
            Codec::HeadDraws { head, draws } => {
                Self { codec: Some(CodecName::HeadDraws), head: Some(head), draws: Some(draws), ..none }
            }
            Codec::Threshold { threshold } => {
                Self { codec: Some(CodecName::Threshold), threshold: Some(threshold), ..none }
            }
            Codec::Random { draws } => Self { codec: Some(CodecName::Random), draws: Some(draws), ..none },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<SoftTargets, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    #[test]
    fn every_codec_survives_its_flat_form() {
        for codec in [
            Codec::Full,
            Codec::TopK { head: 50 },
            Codec::TopKTail { head: 7 },
            Codec::HeadDraws { head: 32, draws: 16 },
            Codec::Threshold { threshold: 0.01 },
            Codec::Random { draws: 50 },
        ] {
            let written =
                SoftTargets { temperatures: vec![0.5, 2.0], quantiser: Quantiser::F32, ..SoftTargets::of(codec) };
            let json = serde_json::to_string(&written).unwrap();
            assert_eq!(read(&json).unwrap(), written, "{json}");
            written.check().unwrap();
        }
    }

    #[test]
    fn a_head_without_a_codec_is_what_it_was_before_codecs_had_names() {
        assert_eq!(read(r#"{"head": 12}"#).unwrap().codec, Codec::HeadDraws { head: 12, draws: 16 });
        assert_eq!(read("{}").unwrap(), SoftTargets::default());
        assert_eq!(read(r#"{"temperatures": [1, 2]}"#).unwrap().temperatures, [2.0]);
    }

    #[test]
    fn a_key_of_another_codec_is_refused() {
        let error = read(r#"{"codec": "top_k", "head": 5, "draws": 3}"#).unwrap_err();
        assert!(error.starts_with("teacher.soft_targets.draws is nothing that the codec top_k takes"), "{error}");
        assert!(read(r#"{"codec": "full", "head": 5}"#).is_err());
        assert!(read(r#"{"head": 5, "threshold": 0.1}"#).is_err());
    }

    #[test]
    fn what_is_out_of_bounds_is_named() {
        let check = |json: &str| read(json).unwrap().check().unwrap_err().message;
        assert_eq!(
            check(r#"{"codec": "threshold", "threshold": 0.6}"#),
            "teacher.soft_targets.threshold is 0.6; it must lie between 0.0009765625 and 0.5"
        );
        assert!(check(r#"{"codec": "random", "draws": 0}"#).contains("between 1 and 255"));
        assert!(check(r#"{"temperatures": [2, 0.5]}"#).contains("they must rise"));
        assert!(check(r#"{"temperatures": [1e9]}"#).contains("between 0.05 and 20"));
    }

    #[test]
    fn a_threshold_bounds_the_entries() {
        let of = |threshold| Codec::Threshold { threshold };
        assert_eq!((of(0.02).max_head(49_152), of(0.02).max_draws()), (50, 50));
        assert_eq!((of(0.3).max_head(49_152), of(0.5).max_head(1)), (3, 1));
    }
}
