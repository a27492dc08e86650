//! A GGUF file's keys and values, read by type.

use std::collections::BTreeMap;

use retort_core::{Code, Error, Result};

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Integer(i128),
    Float(f64),
    Bool(bool),
    String(String),
    Array(Array),
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Array {
    Integers(Vec<i64>),
    Floats(Vec<f64>),
    Strings(Vec<String>),
    /// Of a type that no key has which retort reads; its bytes are not kept.
    Opaque,
}

/// Every getter says `None` for an absent key and fails on one of another type.
#[derive(Debug)]
pub(crate) struct Metadata {
    values: BTreeMap<String, Value>,
    place: String,
}

impl Metadata {
    pub(crate) fn new(values: BTreeMap<String, Value>, place: &str) -> Self {
        Self { values, place: place.to_owned() }
    }

    /// The file, as errors name it.
    pub(crate) fn place(&self) -> &str {
        &self.place
    }

    pub(crate) fn contains(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    pub(crate) fn unsigned(&self, key: &str) -> Result<Option<u64>> {
        self.get(key, "a natural number", |value| match value {
            Value::Integer(number) => u64::try_from(*number).ok(),
            _ => None,
        })
    }

    pub(crate) fn float(&self, key: &str) -> Result<Option<f64>> {
        self.get(key, "a finite number", |value| match value {
            Value::Float(number) if number.is_finite() => Some(*number),
            _ => None,
        })
    }

    pub(crate) fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.get(key, "a boolean", |value| match value {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        })
    }

    pub(crate) fn string(&self, key: &str) -> Result<Option<&str>> {
        self.get(key, "a string", |value| match value {
            Value::String(text) => Some(text.as_str()),
            _ => None,
        })
    }

    pub(crate) fn strings(&self, key: &str) -> Result<Option<&[String]>> {
        self.get(key, "an array of strings", |value| match value {
            Value::Array(Array::Strings(strings)) => Some(strings.as_slice()),
            _ => None,
        })
    }

    pub(crate) fn integers(&self, key: &str) -> Result<Option<&[i64]>> {
        self.get(key, "an array of integers", |value| match value {
            Value::Array(Array::Integers(integers)) => Some(integers.as_slice()),
            _ => None,
        })
    }

    pub(crate) fn floats(&self, key: &str) -> Result<Option<&[f64]>> {
        self.get(key, "an array of numbers", |value| match value {
            Value::Array(Array::Floats(floats)) => Some(floats.as_slice()),
            _ => None,
        })
    }

    /// Unwraps what [`Self::unsigned`] and its kin found, or says that the key is missing.
    pub(crate) fn required<T>(&self, key: &str, found: Result<Option<T>>) -> Result<T> {
        found?.ok_or_else(|| self.malformed(format!("metadata key \"{key}\" is missing")))
    }

    pub(crate) fn malformed(&self, what: impl std::fmt::Display) -> Error {
        Error::new(Code::GgufMalformed, format!("{}: {what}", self.place))
    }

    pub(crate) fn unsupported(&self, what: impl std::fmt::Display) -> Error {
        Error::new(Code::ModelUnsupported, format!("{}: {what}", self.place))
    }

    fn get<'a, T>(&'a self, key: &str, wanted: &str, read: impl FnOnce(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.values.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| {
            let found = match value {
                Value::Integer(number) => format!("the integer {number}"),
                Value::Float(number) => format!("the number {number}"),
                Value::Bool(flag) => format!("the boolean {flag}"),
                Value::String(_) => "a string".to_owned(),
                Value::Array(_) => "an array of another type".to_owned(),
            };
            self.malformed(format!("metadata key \"{key}\" is {found}, not {wanted}"))
        })
    }
}
