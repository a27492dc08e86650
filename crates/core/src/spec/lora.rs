//! Low-rank adapters of a student (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021).

use serde::{Deserialize, Deserializer, Serialize};

use super::validate::{count, invalid, within};
use crate::{Error, Result};

/// Highest rank of an adapter.
pub(super) const MAX_RANK: u32 = 1024;

/// Beside a frozen projection `W x` stands `alpha / rank * B A x`; `A` and `B` alone train.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Lora {
    /// Rows of `A`, columns of `B`.
    pub rank: u32,
    pub alpha: f64,
    /// Projections of each layer that have an adapter.
    #[serde(deserialize_with = "all_or_these")]
    pub targets: Vec<LoraTarget>,
    /// Share of an adapter's inputs that are zero in a training step.
    pub dropout: f64,
    pub base: LoraBase,
}

/// A projection of a decoder layer, by its name in Hugging Face's layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoraTarget {
    QProj,
    KProj,
    VProj,
    OProj,
    GateProj,
    UpProj,
    DownProj,
}

/// How the frozen weights of the projections are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoraBase {
    /// As the student computes.
    #[default]
    Model,
    /// In signed bytes with a scale a row, widened for each product, as Dettmers et al., "QLoRA" (2023), do in
    /// four bits.
    Int8,
}

impl LoraTarget {
    pub const ALL: [Self; 7] =
        [Self::QProj, Self::KProj, Self::VProj, Self::OProj, Self::GateProj, Self::UpProj, Self::DownProj];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::QProj => "q_proj",
            Self::KProj => "k_proj",
            Self::VProj => "v_proj",
            Self::OProj => "o_proj",
            Self::GateProj => "gate_proj",
            Self::UpProj => "up_proj",
            Self::DownProj => "down_proj",
        }
    }
}

impl Default for Lora {
    fn default() -> Self {
        Self { rank: 16, alpha: 32.0, targets: LoraTarget::ALL.to_vec(), dropout: 0.0, base: LoraBase::default() }
    }
}

impl Lora {
    /// Bounds of each field.
    pub fn check(&self) -> Result<()> {
        count("student.lora.rank", self.rank, 1, MAX_RANK)?;
        within("student.lora.alpha", self.alpha, 1e-3, 1e6)?;
        within("student.lora.dropout", self.dropout, 0.0, 0.99)?;
        if self.targets.is_empty() {
            return Err(self.targets_are("is empty".to_owned()));
        }
        let twice = self.targets.iter().enumerate().find(|(at, target)| self.targets[..*at].contains(target));
        match twice {
            Some((_, target)) => Err(self.targets_are(format!("has {} twice", target.as_str()))),
            None => Ok(()),
        }
    }

    /// That the rank is no more than `hidden_size`: an adapter of more would be larger than what it adapts.
    pub fn check_width(&self, hidden_size: u64) -> Result<()> {
        if u64::from(self.rank) <= hidden_size {
            return Ok(());
        }
        Err(invalid(format!(
            "student.lora.rank is {}, more than the student's hidden_size of {hidden_size}; lower it",
            self.rank
        )))
    }

    fn targets_are(&self, wrong: String) -> Error {
        let known: Vec<&str> = LoraTarget::ALL.iter().map(|target| target.as_str()).collect();
        invalid(format!("student.lora.targets {wrong}; name some of {}, each once", known.join(", ")))
    }
}

/// A key without a value is as one that is not there.
fn all_or_these<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<LoraTarget>, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_else(|| LoraTarget::ALL.to_vec()))
}
