//! What a student is trained to make small.

use std::fmt;

use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, MapAccess, SeqAccess, Visitor},
    ser::SerializeMap as _,
};

use super::{JobSpec, validate::within};
use crate::Result;

/// The most that a term weighs.
const MAX_WEIGHT: f64 = 1e6;

/// A weighted sum of distances between teacher and student at each target, and of the label's
/// cross-entropy. What is left out weighs nothing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Loss {
    /// KL(teacher || student).
    #[serde(default, skip_serializing_if = "Weight::is_zero")]
    pub forward_kl: Weight,
    /// KL(student || teacher).
    #[serde(default, skip_serializing_if = "Weight::is_zero")]
    pub reverse_kl: Weight,
    /// `b KL(t || m) + (1 - b) KL(q || m)` of teacher t and student q, `m = b t + (1 - b) q`: the generalised
    /// Jensen-Shannon divergence (Agarwal et al., "On-Policy Distillation of Language Models", 2024).
    #[serde(default, skip_serializing_if = "Weight::is_zero")]
    pub jensen_shannon: Weight,
    /// `KL(t || a t + (1 - a) q)` (Ko et al., "DistiLLM", 2024).
    #[serde(default, skip_serializing_if = "Weight::is_zero")]
    pub skew_forward_kl: Weight,
    /// `KL(q || a q + (1 - a) t)` (the same).
    #[serde(default, skip_serializing_if = "Weight::is_zero")]
    pub skew_reverse_kl: Weight,
    /// Half the sum of absolute differences (Wen et al., "f-Divergence Minimization for Sequence-Level
    /// Knowledge Distillation", 2023).
    #[serde(default, skip_serializing_if = "Weight::is_zero")]
    pub total_variation: Weight,
    /// Mean squared difference of logits over the exact entries, both sides centred on them (Kim et al.,
    /// "Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge Distillation", 2021).
    #[serde(default, skip_serializing_if = "Weight::is_zero")]
    pub logit_mse: Weight,
    /// Cross-entropy on the completion's own tokens, at temperature 1.
    #[serde(default, skip_serializing_if = "Weight::is_zero")]
    pub label_ce: Weight,
    /// `b` of `jensen_shannon`.
    #[serde(default = "half", skip_serializing_if = "is_half")]
    pub jensen_shannon_beta: f64,
    /// `a` of the skewed divergences.
    #[serde(default = "tenth", skip_serializing_if = "is_tenth")]
    pub skew_alpha: f64,
    /// Of both sides' softmax, but for `label_ce`; the loss is multiplied by its square, which keeps the size
    /// of gradients (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015).
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub temperature: f64,
}

/// A weight that goes from one value to another in a straight line over the first part of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Weight {
    pub from: f64,
    pub to: f64,
    /// Share of the steps after which it is `to`.
    pub until: f64,
}

impl Default for Loss {
    /// Forward KL alone.
    fn default() -> Self {
        Self {
            forward_kl: Weight::constant(1.0),
            reverse_kl: Weight::default(),
            jensen_shannon: Weight::default(),
            skew_forward_kl: Weight::default(),
            skew_reverse_kl: Weight::default(),
            total_variation: Weight::default(),
            logit_mse: Weight::default(),
            label_ce: Weight::default(),
            jensen_shannon_beta: half(),
            skew_alpha: tenth(),
            temperature: one(),
        }
    }
}

impl Loss {
    /// Every term with its key in a spec.
    pub fn terms(&self) -> [(&'static str, Weight); 8] {
        [
            ("forward_kl", self.forward_kl),
            ("reverse_kl", self.reverse_kl),
            ("jensen_shannon", self.jensen_shannon),
            ("skew_forward_kl", self.skew_forward_kl),
            ("skew_reverse_kl", self.skew_reverse_kl),
            ("total_variation", self.total_variation),
            ("logit_mse", self.logit_mse),
            ("label_ce", self.label_ce),
        ]
    }

    /// Whether some term needs the teacher's exact probability of tokens, as codecs with a head keep them.
    /// Forward KL and the label's cross-entropy do with samples.
    pub fn needs_exact_entries(&self) -> bool {
        self.terms().iter().any(|(key, weight)| !matches!(*key, "forward_kl" | "label_ce") && !weight.is_zero())
    }

    /// Whether some term compares the two at the loss's temperature, as all but the label's cross-entropy do.
    pub(super) fn goes_by_temperature(&self) -> bool {
        self.terms().iter().any(|(key, weight)| *key != "label_ce" && !weight.is_zero())
    }

    pub(super) fn check(&self) -> Result<()> {
        for (key, weight) in self.terms() {
            for (part, value) in [("from", weight.from), ("to", weight.to)] {
                within(&format!("train.loss.{key}.{part}"), value, 0.0, MAX_WEIGHT)?;
            }
            within(&format!("train.loss.{key}.until"), weight.until, 0.0, 1.0)?;
        }
        within("train.loss.jensen_shannon_beta", self.jensen_shannon_beta, 0.001, 0.999)?;
        within("train.loss.skew_alpha", self.skew_alpha, 0.001, 0.999)?;
        within("train.loss.temperature", self.temperature, 0.05, 20.0)
    }
}

impl JobSpec {
    /// The loss's temperature, where it is not 1, and which it is of those that the shards keep sums for.
    pub fn loss_temperature(&self) -> Option<(usize, f64)> {
        let temperature = self.train.loss.temperature;
        let index = self.teacher.soft_targets.temperatures.iter().position(|&kept| kept == temperature)?;
        Some((index, temperature))
    }
}

impl Weight {
    pub fn constant(value: f64) -> Self {
        Self { from: value, to: value, until: 0.0 }
    }

    pub fn is_zero(&self) -> bool {
        self.from == 0.0 && self.to == 0.0
    }

    /// Of the step with this index, of so many.
    pub fn at(&self, step: u32, steps: u32) -> f64 {
        let ramp = self.until * f64::from(steps);
        if f64::from(step) >= ramp {
            return self.to;
        }
        self.from + (self.to - self.from) * f64::from(step) / ramp
    }
}

/// As a number where it is constant, else as `{from, to, until}`.
impl Serialize for Weight {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.from == self.to {
            return serializer.serialize_f64(self.to);
        }
        let mut map = serializer.serialize_map(Some(3))?;
        map.serialize_entry("from", &self.from)?;
        map.serialize_entry("to", &self.to)?;
        map.serialize_entry("until", &self.until)?;
        map.end()
    }
}

impl<'de> Deserialize<'de> for Weight {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NumberOrRamp)
    }
}

struct NumberOrRamp;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Ramp {
    from: f64,
    to: f64,
    #[serde(default = "one")]
    until: f64,
}

impl<'de> Visitor<'de> for NumberOrRamp {
    type Value = Weight;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a number, or {from, to, until}")
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Weight, E> {
        if value.is_finite() { Ok(Weight::constant(value)) } else { Err(neither()) }
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Weight, E> {
        Ok(Weight::constant(value as f64))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Weight, E> {
        Ok(Weight::constant(value as f64))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Weight, A::Error> {
        let Ramp { from, to, until } = Ramp::deserialize(de::value::MapAccessDeserializer::new(map))?;
        Ok(Weight { from, to, until })
    }

    fn visit_bool<E: de::Error>(self, _: bool) -> Result<Weight, E> {
        Err(neither())
    }

    fn visit_str<E: de::Error>(self, _: &str) -> Result<Weight, E> {
        Err(neither())
    }

    fn visit_unit<E: de::Error>(self) -> Result<Weight, E> {
        Err(neither())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, _: A) -> Result<Weight, A::Error> {
        Err(neither())
    }
}

/// Which key it is said of, the reader of the text knows.
fn neither<E: de::Error>() -> E {
    E::custom(format!("it must be a number from 0 to {MAX_WEIGHT}, or {{from, to, until}}"))
}

fn half() -> f64 {
    0.5
}

fn tenth() -> f64 {
    0.1
}

fn one() -> f64 {
    1.0
}

fn is_half(value: &f64) -> bool {
    *value == half()
}

fn is_tenth(value: &f64) -> bool {
    *value == tenth()
}

fn is_one(value: &f64) -> bool {
    *value == one()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Loss {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn a_loss_survives_its_json() {
        for json in [
            r#"{"forward_kl":1.0}"#,
            r#"{"reverse_kl":0.5,"label_ce":{"from":0.5,"to":0.0,"until":0.25},"temperature":2.0}"#,
            r#"{"jensen_shannon":1.0,"jensen_shannon_beta":0.9}"#,
        ] {
            assert_eq!(serde_json::to_string(&read(json)).unwrap(), json);
        }
        assert_eq!(read(r#"{"forward_kl": 1}"#), Loss::default());
        assert_eq!(read(r#"{"label_ce": 1}"#).forward_kl, Weight::default());
        assert_eq!(read(r#"{"label_ce": {"from": 1, "to": 0}}"#).label_ce.until, 1.0);
        for wrong in [r#"{"forward_kl": "much"}"#, r#"{"kl": 1}"#, r#"{"label_ce": {"from": 1}}"#] {
            assert!(serde_json::from_str::<Loss>(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn weights_go_in_a_straight_line() {
        let weight = Weight { from: 1.0, to: 0.0, until: 0.5 };
        let at = |step| weight.at(step, 8);
        assert_eq!([at(0), at(1), at(2), at(3), at(4), at(7)], [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]);
        assert_eq!(Weight::constant(0.3).at(0, 0), 0.3);
        assert_eq!(Weight { until: 0.0, ..weight }.at(0, 8), 0.0);
    }

    #[test]
    fn what_cannot_be_is_named() {
        let message = |json: &str| read(json).check().unwrap_err().message;
        assert_eq!(
            message(r#"{"reverse_kl": -1}"#),
            "train.loss.reverse_kl.from is -1; it must lie between 0 and 1000000"
        );
        assert!(message(r#"{"label_ce": 1, "skew_alpha": 1}"#).contains("train.loss.skew_alpha"));
        assert!(message(r#"{"label_ce": 1, "temperature": 0}"#).contains("train.loss.temperature"));
        assert!(message(r#"{"label_ce": {"from": 1, "to": 0, "until": 2}}"#).contains("label_ce.until"));
        read(r#"{"label_ce": 1}"#).check().unwrap();
    }

    #[test]
    fn samples_are_enough_for_what_is_linear_in_the_teacher() {
        assert!(!Loss::default().needs_exact_entries());
        assert!(!read(r#"{"forward_kl": 0.9, "label_ce": 0.1}"#).needs_exact_entries());
        assert!(read(r#"{"forward_kl": 0.9, "total_variation": 0.1}"#).needs_exact_entries());
    }
}
