//! What a job leaves beside the student's Hugging Face folder.

use std::fmt;

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{self, MapAccess, SeqAccess, Visitor, value::StrDeserializer},
};

use super::validate::invalid;
use crate::Result;

/// Files made from the checkpoint that is judged, beside its weights. None by default, and then left out of JSON: a
/// checkpoint knows its spec by the hash of that.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Export {
    /// One GGUF file of each type; a type alone is a list of one.
    #[serde(deserialize_with = "one_or_several")]
    pub gguf: Vec<GgufType>,
}

/// How a GGUF file stores matrices; vectors are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GgufType {
    F32,
    F16,
    Bf16,
    /// Blocks of 32 values of a byte with one f16 scale: 8.5 bits a value.
    Q8_0,
}

impl GgufType {
    pub const ALL: [Self; 4] = [Self::F32, Self::F16, Self::Bf16, Self::Q8_0];

    /// As GGML writes it, and as it stands in the name of a file.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q8_0 => "Q8_0",
        }
    }
}

impl Export {
    pub(super) fn check(&self) -> Result<()> {
        let repeats = |(i, kind): (usize, &GgufType)| self.gguf[..i].contains(kind);
        match self.gguf.iter().enumerate().find(|entry| repeats(*entry)) {
            Some((_, kind)) => Err(invalid(format!("export.gguf names {} twice", kind.name().to_lowercase()))),
            None => Ok(()),
        }
    }
}

fn one_or_several<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<GgufType>, D::Error> {
    deserializer.deserialize_any(TypeOrList)
}

struct TypeOrList;

impl<'de> Visitor<'de> for TypeOrList {
    type Value = Vec<GgufType>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a type of GGUF file, or a list of them")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Vec<GgufType>, E> {
        Ok(Vec::new())
    }

    fn visit_none<E: de::Error>(self) -> Result<Vec<GgufType>, E> {
        Ok(Vec::new())
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Vec<GgufType>, D::Error> {
        one_or_several(deserializer)
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Vec<GgufType>, E> {
        Err(neither(value))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Vec<GgufType>, E> {
        Err(neither(value))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Vec<GgufType>, E> {
        Err(neither(value))
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Vec<GgufType>, E> {
        Err(neither(value))
    }

    fn visit_map<A: MapAccess<'de>>(self, _: A) -> Result<Vec<GgufType>, A::Error> {
        Err(neither("a section of keys"))
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<Vec<GgufType>, E> {
        GgufType::deserialize(StrDeserializer::new(name)).map(|kind| vec![kind])
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<GgufType>, A::Error> {
        let mut kinds = Vec::new();
        while let Some(kind) = list.next_element()? {
            kinds.push(kind);
        }
        Ok(kinds)
    }
}

fn neither<E: de::Error>(value: impl fmt::Display) -> E {
    E::custom(format!("export.gguf is {value}; it must be one of f32, f16, bf16 and q8_0, or a list of them"))
}
