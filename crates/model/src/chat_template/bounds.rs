//! How much text a template may make: what each meter of [`super::meter`] counts, in bytes.

use minijinja::{
    Environment, Error, ErrorKind, State, Value, filters,
    value::{Rest, ValueKind},
};
use minijinja_contrib::pycompat;

/// Of one rendering, every text and list counted each time it is used. A conversation of a megabyte
/// needs a few hundred megabytes in the most wasteful of known templates.
const MAX_BYTES: usize = 1 << 29;
/// Most often that `*` repeats something, widest field of a format, largest batch.
const MAX_TIMES: usize = 4096;
const MAX_DEPTH: usize = 64;
/// What an item of a list or map takes, beside its own text.
const ITEM_BYTES: usize = 64;

/// Filters whose output can be larger than their input, and need looking at before they run.
const GROWING: [&str; 12] =
    ["replace", "join", "indent", "format", "batch", "slice", "sum", "string", "pprint", "list", "split", "lines"];

/// Bytes of the rendering at work.
struct Spent(usize);

/// Adds the meters, and puts one before each filter and method that makes text grow.
pub(super) fn add(environment: &mut Environment<'static>) {
    environment.add_filter("__operand", |state: &mut State, value: Value| {
        spend(state, size(&value, 0))?;
        Ok::<_, Error>(value)
    });
    environment.add_filter("__factor", |state: &mut State, value: Value| {
        if number(&value) > MAX_TIMES {
            return Err(too_much(format!("it repeats or multiplies more than {MAX_TIMES} times")));
        }
        if value.kind() != ValueKind::Number {
            spend(state, size(&value, 0).saturating_mul(MAX_TIMES))?;
        }
        Ok(value)
    });
    environment.add_filter("__input", |state: &mut State, value: Value| {
        let bytes = value.as_str().map_or_else(|| value.len().unwrap_or(0).saturating_mul(ITEM_BYTES), str::len);
        spend(state, bytes)?;
        Ok::<_, Error>(value)
    });
    environment.add_function("__text", |state: &mut State, bytes: usize| spend(state, bytes).map(|()| ""));
    environment.add_filter("__replace", filters::replace);
    environment.add_filter("__join", filters::join);
    environment.add_filter("__indent", filters::indent);
    environment.add_filter("__format", filters::format);
    environment.add_filter("__batch", filters::batch);
    environment.add_filter("__slice", filters::slice);
    environment.add_filter("__sum", filters::sum);
    environment.add_filter("__string", filters::string);
    environment.add_filter("__pprint", filters::pprint);
    environment.add_filter("__list", filters::list);
    environment.add_filter("__split", filters::split);
    environment.add_filter("__lines", filters::lines);
    for name in GROWING {
        let builtin = format!("__{name}");
        environment.add_filter(name, move |state: &mut State, arguments: Rest<Value>| {
            spend(state, estimate(name, &arguments)?)?;
            state.apply_filter(&builtin, &arguments)
        });
    }
    environment.set_unknown_method_callback(|state, value, method, arguments| {
        let all: Vec<Value> = match (method, arguments) {
            ("join", [list, ..]) => vec![list.clone(), value.clone()],
            _ => [value].into_iter().chain(arguments).cloned().collect(),
        };
        spend(state, estimate(method, &all)?)?;
        pycompat::unknown_method_callback(state, value, method, arguments)
    });
}

/// Counts what is about to be printed or made.
pub(super) fn spend(state: &mut State, bytes: usize) -> Result<(), Error> {
    let spent = state.get_or_insert_extension(Spent(0));
    spent.0 = spent.0.saturating_add(bytes);
    if spent.0 > MAX_BYTES {
        return Err(too_much(format!("it makes more than {} MiB of text", MAX_BYTES >> 20)));
    }
    Ok(())
}

/// Bytes of a value once it is written out; stops looking where it is too much anyway.
pub(super) fn size(value: &Value, depth: usize) -> usize {
    if depth > MAX_DEPTH {
        return MAX_BYTES;
    }
    match value.kind() {
        ValueKind::String | ValueKind::Bytes => value.as_bytes().map_or(0, <[u8]>::len),
        ValueKind::Seq | ValueKind::Iterable | ValueKind::Map => {
            let Ok(items) = value.try_iter() else { return ITEM_BYTES };
            let map = value.kind() == ValueKind::Map;
            let mut bytes = 0_usize;
            for item in items {
                bytes = bytes.saturating_add(ITEM_BYTES + size(&item, depth + 1));
                if map && let Ok(inner) = value.get_item(&item) {
                    bytes = bytes.saturating_add(size(&inner, depth + 1));
                }
                if bytes > MAX_BYTES {
                    break;
                }
            }
            bytes
        }
        _ => ITEM_BYTES,
    }
}

/// Bytes that a filter or method makes of its arguments, at most.
fn estimate(name: &str, arguments: &[Value]) -> Result<usize, Error> {
    let text = |at: usize| arguments.get(at).and_then(Value::as_str).unwrap_or_default();
    let (input, others) = match arguments.split_first() {
        Some((input, others)) => (size(input, 0), others),
        None => return Ok(0),
    };
    let largest = || others.iter().map(|value| size(value, 0)).max().unwrap_or(0);
    let times = others.iter().map(numbers).max().unwrap_or(0);
    let signs = |signs: &[char]| text(0).matches(signs).count();
    Ok(match name {
        "replace" => input.saturating_add(text(0).matches(text(1)).count().saturating_mul(text(2).len())),
        "join" => input.saturating_add(arguments[0].len().unwrap_or(0).saturating_mul(largest())),
        "indent" => input.saturating_add(signs(&['\n']).saturating_add(1).saturating_mul(times)),
        "format" if times > MAX_TIMES || longest_number(text(0)) > 3 => {
            return Err(too_much("it formats into too wide a field".to_owned()));
        }
        "format" => input.saturating_add(signs(&['%', '{']).saturating_mul(largest().saturating_add(1000))),
        "batch" | "slice" if times > MAX_TIMES => {
            return Err(too_much(format!("it makes batches of more than {MAX_TIMES}")));
        }
        "batch" | "slice" | "list" | "split" | "lines" | "splitlines" => {
            input.saturating_add(times).saturating_mul(ITEM_BYTES)
        }
        _ => input,
    })
}

/// Digits of the longest number in a text.
fn longest_number(text: &str) -> usize {
    text.split(|c: char| !c.is_ascii_digit()).map(str::len).max().unwrap_or(0)
}

/// The largest number in an argument, keyword arguments included.
fn numbers(value: &Value) -> usize {
    match value.kind() {
        ValueKind::Map => {
            let values = value.try_iter().into_iter().flatten().filter_map(|key| value.get_item(&key).ok());
            values.map(|value| number(&value)).max().unwrap_or(0)
        }
        _ => number(value),
    }
}

/// 0 for what is no number.
fn number(value: &Value) -> usize {
    if value.kind() != ValueKind::Number {
        return 0;
    }
    // A number beyond usize becomes the largest one.
    f64::try_from(value.clone()).map_or(0, |number| number.abs() as usize)
}

fn too_much(what: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, what)
}
