//! What a student keeps of its teacher: layers, and their width.

use std::fmt;

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{self, MapAccess, SeqAccess, Visitor},
};

use super::{
    is_default,
    validate::{count, divides, invalid},
};
use crate::Result;

const MAX_LAYERS: u32 = 1024;
const DEFAULT_CALIBRATION_ROWS: u32 = 32;

/// How a student is cut out of its teacher. A size that is not given stays; what is left out is left out of
/// JSON: a checkpoint knows its spec by the hash of that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prune {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<Layers>,
    /// Which layers, where `layers` is a number.
    #[serde(default, skip_serializing_if = "is_default")]
    pub choose: Choose,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hidden_size: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub intermediate_size: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_attention_heads: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_key_value_heads: Option<u32>,
    /// Training rows on which importance is measured, the first of the first shards.
    #[serde(default = "default_calibration_rows", skip_serializing_if = "is_default_calibration_rows")]
    pub calibration_rows: u32,
}

/// As a number, or as a list of indices from 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Layers {
    Count(u32),
    These(Vec<u32>),
}

/// What decides which layers stay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Choose {
    /// Seven tenths from the front, the others from the end.
    #[default]
    Ends,
    /// Evenly spaced, the first and the last among them.
    Even,
    /// Those that turn the hidden states most (Men et al., "ShortGPT", 2024).
    BlockInfluence,
}

impl Prune {
    /// This many layers, nothing else cut.
    pub fn to_layers(layers: u32) -> Self {
        Self { layers: Some(Layers::Count(layers)), ..Self::default() }
    }

    /// Whether something is chosen by what the teacher does to texts.
    pub fn needs_calibration(&self) -> bool {
        let by_influence = self.choose == Choose::BlockInfluence && matches!(self.layers, Some(Layers::Count(_)));
        by_influence || self.narrows()
    }

    fn narrows(&self) -> bool {
        let sizes = [self.hidden_size, self.intermediate_size, self.num_attention_heads, self.num_key_value_heads];
        sizes.iter().any(Option::is_some)
    }

    /// What goes together; the bounds of sizes are in `counts.rs`.
    pub(super) fn check(&self) -> Result<()> {
        const KEY: &str = "student.init.prune";
        match &self.layers {
            Some(Layers::Count(layers)) => count(&format!("{KEY}.layers"), *layers, 1, MAX_LAYERS)?,
            Some(Layers::These(layers)) => {
                count(&format!("the length of {KEY}.layers"), layers.len() as u32, 1, MAX_LAYERS)?;
                if let Some(pair) = layers.windows(2).find(|pair| pair[0] >= pair[1]) {
                    return Err(invalid(format!(
                        "{KEY}.layers has {} and then {}; name each layer once, in ascending order",
                        pair[0], pair[1]
                    )));
                }
            }
            None if !self.narrows() => {
                return Err(invalid(format!("{KEY} cuts nothing; give layers, or a size such as intermediate_size")));
            }
            None => {}
        }
        if self.choose != Choose::Ends && !matches!(self.layers, Some(Layers::Count(_))) {
            return Err(invalid(format!(
                "{KEY}.choose has nothing to choose; give {KEY}.layers as a number, or leave choose out"
            )));
        }
        if let (Some(heads), Some(key_value)) = (self.num_attention_heads, self.num_key_value_heads) {
            divides(KEY, "num_key_value_heads", key_value, "num_attention_heads", heads)?;
        }
        Ok(())
    }
}

impl Default for Prune {
    fn default() -> Self {
        Self {
            layers: None,
            choose: Choose::default(),
            hidden_size: None,
            intermediate_size: None,
            num_attention_heads: None,
            num_key_value_heads: None,
            calibration_rows: DEFAULT_CALIBRATION_ROWS,
        }
    }
}

impl<'de> Deserialize<'de> for Layers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NumberOrList)
    }
}

struct NumberOrList;

impl<'de> Visitor<'de> for NumberOrList {
    type Value = Layers;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a number of layers, or a list of their indices")
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Layers, E> {
        u32::try_from(value).map(Layers::Count).map_err(|_| neither(value))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Layers, E> {
        u32::try_from(value).map(Layers::Count).map_err(|_| neither(value))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Layers, E> {
        Err(neither(value))
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Layers, E> {
        Err(neither(value))
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Layers, E> {
        Err(neither(format!("{:?}", value.chars().take(80).collect::<String>())))
    }

    fn visit_map<A: MapAccess<'de>>(self, _: A) -> Result<Layers, A::Error> {
        Err(neither("a section of keys"))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Layers, A::Error> {
        let mut layers = Vec::new();
        while let Some(layer) = list.next_element()? {
            if layers.len() as u32 >= MAX_LAYERS {
                return Err(de::Error::invalid_length(layers.len() + 1, &"a list of at most 1024 layers"));
            }
            layers.push(layer);
        }
        Ok(Layers::These(layers))
    }
}

fn neither<E: de::Error>(value: impl fmt::Display) -> E {
    E::custom(format!(
        "student.init.prune.layers is {value}; it must be a number of layers, or a list of their indices as in [0, 1, 29]"
    ))
}

fn default_calibration_rows() -> u32 {
    DEFAULT_CALIBRATION_ROWS
}

fn is_default_calibration_rows(rows: &u32) -> bool {
    *rows == DEFAULT_CALIBRATION_ROWS
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        spec::{Init, JobSpec, parse_yaml},
        wire::{job_spec_from_proto, job_spec_to_proto},
    };

    fn parse(prune: &str) -> Result<JobSpec> {
        let yaml =
            format!("name: p\nprompts: {{path: /p}}\nteacher: {{model: /t}}\nstudent: {{init: {{prune: {prune}}}}}\n");
        parse_yaml("job.yaml", &yaml)
    }

    fn prune(text: &str) -> Prune {
        match parse(text).unwrap().student.init {
            Init::Prune(prune) => prune,
            other => panic!("{other:?}"),
        }
    }

    /// Checkpoints of before these keys know their spec by the hash of this.
    #[test]
    fn a_number_of_layers_alone_has_the_json_it_always_had() {
        let spec = parse("{layers: 8}").unwrap();
        assert_eq!(serde_json::to_string(&spec.student.init).unwrap(), r#"{"prune":{"layers":8}}"#);
        assert!(!prune("{layers: 8}").needs_calibration());
    }

    #[test]
    fn every_key_survives_json_and_the_wire() {
        for text in [
            "{layers: 8}",
            "{layers: [0, 2, 29]}",
            "{layers: 8, choose: even}",
            "{layers: 8, choose: block_influence, calibration_rows: 5}",
            "{hidden_size: 512}",
            "{layers: [1], hidden_size: 512, intermediate_size: 1024, num_attention_heads: 6, num_key_value_heads: 3}",
        ] {
            let spec = parse(text).unwrap();
            let json = serde_json::to_string(&spec).unwrap();
            assert_eq!(serde_json::from_str::<JobSpec>(&json).unwrap(), spec, "{text}");
            assert_eq!(job_spec_from_proto(job_spec_to_proto(&spec)).unwrap(), spec, "{text}");
        }
    }

    #[test]
    fn importance_is_measured_where_something_goes_by_it() {
        for (text, needed) in [
            ("{layers: 8, choose: even}", false),
            ("{layers: [3, 4]}", false),
            ("{layers: 8, choose: block_influence}", true),
            ("{num_attention_heads: 4}", true),
            ("{layers: [3, 4], intermediate_size: 16}", true),
        ] {
            assert_eq!(prune(text).needs_calibration(), needed, "{text}");
        }
    }
}
