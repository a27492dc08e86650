//! YAML -> [`JobSpec`], with errors that name the line and guess what was meant.

mod outline;

use serde::Deserialize;
use serde_saphyr::{Error as Yaml, NonFiniteFloatPolicy};

use self::outline::{EMPTY, Field, field_at, place_of};
use super::{JobSpec, Sharing, counts};
use crate::{Code, Error, Result};

/// Longest spec read, bytes.
const MAX_SPEC_BYTES: usize = 1 << 20;

/// Parses and validates a spec of a job to be; keys that would do nothing are refused. `name` is how errors call the
/// file.
pub fn parse_yaml(name: &str, text: &str) -> Result<JobSpec> {
    if text.len() > MAX_SPEC_BYTES {
        return Err(Error::new(
            Code::SpecMalformed,
            format!("{name}: {} bytes are more than a spec may have ({MAX_SPEC_BYTES})", text.len()),
        ));
    }
    let spec: JobSpec = read(text).map_err(|error| explain(name, text, error.without_snippet()))?;
    check_sharing(name, text, &spec)?;
    let checked = spec.validate().and_then(|()| spec.check_idle());
    checked.map_err(|error| Error::new(error.code, format!("{name}: {}", error.message)))?;
    Ok(spec)
}

/// Numbers that are not finite come through: what reads them knows what they are to be.
fn read<'de, T: Deserialize<'de>>(text: &'de str) -> Result<T, Yaml> {
    let options = serde_saphyr::options! { non_finite_float_policy: NonFiniteFloatPolicy::PassThrough };
    serde_saphyr::from_str_with_options(text, options)
}

/// Keys of another mode than the one that is given, or meant, would do nothing, whatever their value.
fn check_sharing(name: &str, text: &str, spec: &JobSpec) -> Result<()> {
    let Some(parallel) = &spec.train.parallel else { return Ok(()) };
    if parallel.mode == Sharing::Diloco {
        return Ok(());
    }
    for (key, _) in parallel.of_diloco() {
        if let Some((line, column)) = place_of(text, key) {
            let message = format!("{name} line {line} column {column}: {}", Sharing::does_nothing(key));
            return Err(Error::new(Code::SpecInvalid, message));
        }
    }
    Ok(())
}

/// A library's error in the words of a spec: the place, the field, what it is and what it must be.
fn explain(name: &str, text: &str, error: &Yaml) -> Error {
    let at = error.location();
    let place = at.map_or_else(|| name.to_owned(), |at| format!("{name} line {} column {}", at.line(), at.column()));
    let new = |code: Code, what: String| Error::new(code, format!("{place}: {what}"));
    let field = |text: &str| at.and_then(|at| field_at(text, at.line(), at.column()));
    // With an alias of no value a text has no outline; with a plain text in the alias's place it has.
    let alias = |wrong: &str| {
        let path = field(&text.replace('*', "_")).map_or_else(|| "this".to_owned(), |field| field.path);
        new(Code::SpecMalformed, format!("{path} is an alias {wrong}; write the value out"))
    };
    let wrong = innermost(error);
    match wrong {
        Yaml::SerdeUnknownField { field, expected, .. } => {
            new(Code::SpecUnknownKey, format!("unknown key {field:?}; {}", suggest(field, expected)))
        }
        Yaml::SerdeUnknownVariant { variant, expected, .. } => match field(text) {
            Some(field) if field.value == EMPTY => new(Code::SpecMalformed, wrong_value(Some(&field), wrong)),
            _ => new(Code::SpecInvalid, format!("{variant:?} is not known here; {}", suggest(variant, expected))),
        },
        Yaml::SerdeMissingField { field, .. } => new(Code::SpecInvalid, format!("the key {field:?} is missing")),
        Yaml::DuplicateMappingKey { key: Some(key), .. } => {
            new(Code::SpecMalformed, format!("the key {key:?} is given twice"))
        }
        Yaml::DuplicateMappingKey { .. } => new(Code::SpecMalformed, "a key is given twice".to_owned()),
        Yaml::MultipleDocuments { .. } => {
            new(Code::SpecMalformed, "a spec is one document; remove \"---\" and what follows".to_owned())
        }
        Yaml::Eof { .. } => Error::new(
            Code::SpecMalformed,
            format!("{name}: there is no spec in it; one says name, prompts, teacher and student"),
        ),
        Yaml::ExpectedMappingEndAfterEnumVariantValue { .. } => {
            new(Code::SpecMalformed, format!("student.init takes one of {INITS}, not several"))
        }
        Yaml::RecursiveReferencesRequireWeakTypes { .. } => alias("of what it stands in"),
        Yaml::UnknownAnchor { .. } => alias("without an anchor above it"),
        // Our own words, of what does not know its key.
        Yaml::Message { msg, .. } if msg.starts_with("it must be ") => {
            let of = field(text).map(|Field { path, value }| format!("{path} is {value}; "));
            new(Code::SpecMalformed, format!("{}{}", of.unwrap_or_default(), first_line(msg)))
        }
        // And about keys that do not go together.
        Yaml::Message { msg, .. } | Yaml::ExternalMessage { msg, .. }
            if ["teacher.soft_targets.", "student.init.prune.", "export.gguf "]
                .iter()
                .any(|field| msg.starts_with(field)) =>
        {
            new(Code::SpecInvalid, first_line(msg))
        }
        Yaml::Message { msg, .. } | Yaml::ExternalMessage { msg, .. } => new(Code::SpecMalformed, first_line(msg)),
        Yaml::Budget { .. }
        | Yaml::AliasReplayCounterOverflow { .. }
        | Yaml::AliasReplayLimitExceeded { .. }
        | Yaml::AliasExpansionLimitExceeded { .. }
        | Yaml::AliasReplayStackDepthExceeded { .. } => {
            new(Code::SpecMalformed, "it is nested too deeply, or grows too large, for a spec".to_owned())
        }
        other => new(Code::SpecMalformed, wrong_value(field(text).as_ref(), other)),
    }
}

const INITS: &str = "prune, checkpoint and config";

/// The error itself, where it is about what an alias stands for.
fn innermost(error: &Yaml) -> &Yaml {
    match error {
        Yaml::AliasError { error, .. } => innermost(error.without_snippet()),
        other => other,
    }
}

/// `train.passes is -2; it must be ...`, as far as either is known.
fn wrong_value(field: Option<&Field>, error: &Yaml) -> String {
    match (field, expected(field, error)) {
        (Some(Field { path, value }), Some(expected)) => format!("{path} is {value}; it must be {expected}"),
        (None, Some(expected)) => format!("it must be {expected}"),
        (Some(Field { path, .. }), None) => format!("{path}: {}", first_line(&error.to_string())),
        (None, None) => first_line(&error.to_string()),
    }
}

/// What a field takes, told from the library's name for it.
fn expected(field: Option<&Field>, error: &Yaml) -> Option<String> {
    let kind = match error {
        Yaml::InvalidScalar { ty, .. } => ty,
        Yaml::NullIntoString { .. }
        | Yaml::TaggedScalarCannotDeserializeIntoString { .. }
        | Yaml::BinaryNotUtf8 { .. }
        | Yaml::InvalidBinaryBase64 { .. } => "string",
        Yaml::Unexpected { expected, .. } => expected,
        Yaml::SerdeInvalidType { expected, .. } | Yaml::SerdeInvalidValue { expected, .. } => expected.as_str(),
        Yaml::ExternallyTaggedEnumExpectedScalarOrMapping { .. }
        | Yaml::ExpectedStringKeyForExternallyTaggedEnum { .. }
        | Yaml::UnexpectedValueForUnitEnumVariant { .. }
        | Yaml::SerdeUnknownVariant { .. } => "enum",
        _ => return None,
    };
    let named = |name: &str| field.is_some_and(|field| field.path.ends_with(name));
    Some(match kind {
        _ if named("teacher.mode") => "generate or score".to_owned(),
        _ if named("soft_targets.codec") => "full, top_k, top_k_tail, head_draws, threshold or random".to_owned(),
        _ if named("soft_targets.quantiser") => "u8 or f32".to_owned(),
        _ if named("student.init") => format!("one of {INITS}, as in {{prune: {{layers: 8}}}}"),
        _ if named("student.lora.targets") => "a list, as in [q_proj, v_proj]".to_owned(),
        _ if named("student.lora.base") => "model or int8".to_owned(),
        "u32" => {
            let bounds = field.and_then(|field| counts::bounds(&field.path));
            whole_number(field, bounds.map(|(least, most)| (least.into(), most.into())))
        }
        "u64" => whole_number(field, Some((0, u64::MAX))),
        "floating point" => "a number".to_owned(),
        "boolean" => "true or false".to_owned(),
        kind if kind.contains("mapping") || kind.contains("struct") || kind.contains("map") => {
            "a section of keys".to_owned()
        }
        kind if kind.contains("scalar") => "a single value".to_owned(),
        kind if kind.contains("string") => "a text".to_owned(),
        _ => match error {
            Yaml::SerdeUnknownVariant { expected, .. } => format!("one of {}", expected.join(", ")),
            _ => return None,
        },
    })
}

/// With the way to write one that is only written otherwise, as `1.0`, `1e1` and `010` are.
fn whole_number(field: Option<&Field>, bounds: Option<(u64, u64)>) -> String {
    let Some((least, most)) = bounds else {
        return format!("a whole number up to {}, not a negative one", u32::MAX);
    };
    // In f64 whole numbers are exact below 2^53.
    let largest = most.min((1 << 53) - 1);
    let meant = field
        .and_then(|field| field.value.parse::<f64>().ok())
        .filter(|value| value.fract() == 0.0 && (least as f64..=largest as f64).contains(value));
    let way_out = meant.map(|meant| format!("; write {}", meant.abs())).unwrap_or_default();
    format!("a whole number from {least} to {most}{way_out}")
}

/// A message's first line, without the place that the library writes behind it.
fn first_line(message: &str) -> String {
    let line = message.lines().next().unwrap_or("it is not YAML");
    line.split(" at line ").next().unwrap_or(line).to_owned()
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
