//! YAML -> [`JobSpec`], with errors that name the line and guess what was meant.

use serde_saphyr::Error as Yaml;

use super::JobSpec;
use crate::{Code, Error, Result};

/// Longest spec read, bytes.
const MAX_SPEC_BYTES: usize = 1 << 20;

/// Parses and validates a spec. `name` is how errors call the file.
pub fn parse_yaml(name: &str, text: &str) -> Result<JobSpec> {
    if text.len() > MAX_SPEC_BYTES {
        return Err(Error::new(
            Code::SpecMalformed,
            format!("{name}: {} bytes are more than a spec may have ({MAX_SPEC_BYTES})", text.len()),
        ));
    }
    let spec: JobSpec = serde_saphyr::from_str(text).map_err(|error| explain(name, error.without_snippet()))?;
    spec.validate().map_err(|error| Error::new(error.code, format!("{name}: {}", error.message)))?;
    Ok(spec)
}

fn explain(name: &str, error: &Yaml) -> Error {
    let place = error
        .location()
        .map_or_else(|| name.to_owned(), |at| format!("{name} line {} column {}", at.line(), at.column()));
    match error {
        Yaml::SerdeUnknownField { field, expected, .. } => {
            Error::new(Code::SpecUnknownKey, format!("{place}: unknown key {field:?}; {}", suggest(field, expected)))
        }
        Yaml::SerdeUnknownVariant { variant, expected, .. } => Error::new(
            Code::SpecInvalid,
            format!("{place}: {variant:?} is not known here; {}", suggest(variant, expected)),
        ),
        Yaml::SerdeMissingField { field, .. } => {
            Error::new(Code::SpecInvalid, format!("{place}: the key {field:?} is missing"))
        }
        other => {
            let text = other.to_string();
            Error::new(Code::SpecMalformed, format!("{place}: {}", text.lines().next().unwrap_or("not YAML")))
        }
    }
}

/// `did you mean "x"?`, or the keys that exist.
fn suggest(wrong: &str, expected: &[&str]) -> String {
    let near = expected
        .iter()
        .map(|key| (strsim::damerau_levenshtein(wrong, key), wrong.len().abs_diff(key.len()), key))
        .min()
        .filter(|(distance, _, key)| *distance <= 2.max(key.len() / 3));
    match near {
        Some((_, _, key)) => format!("did you mean {key:?}?"),
        None => format!("known here: {}", expected.join(", ")),
    }
}
