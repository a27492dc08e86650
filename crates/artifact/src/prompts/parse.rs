//! Reading prompt files, with errors that name the line and the way out.

use std::{collections::HashMap, fs::File, io::Read, path::Path};

use retort_core::{Code, Error, Result};
use serde_json::{Map, Value};

use super::{
    Message, Piece, Role, Row, Split,
    text::{Unique, is_blank, without_nul},
};

/// Longest line, bytes.
pub const MAX_LINE_BYTES: usize = 1 << 20;
/// Largest prompt file, bytes.
pub const MAX_FILE_BYTES: u64 = 1 << 30;
/// Longest id and longest tag, bytes; most tags of a row.
const MAX_NAME_BYTES: usize = 256;
const MAX_TAGS: usize = 64;

const ROW_KEYS: [&str; 6] = ["id", "messages", "tags", "split", "completion", "weight"];
/// Largest weight of a row.
const MAX_WEIGHT: f64 = 1000.0;
const PIECE_KEYS: [&str; 2] = ["text", "weight"];
const MESSAGE_KEYS: [&str; 3] = ["role", "content", "weight"];
const ROLES: [&str; 3] = ["system", "user", "assistant"];
const SPLITS: [&str; 2] = ["train", "held_out"];

/// Reads a prompt file whole. Blocks the thread.
pub fn read(path: &Path) -> Result<Vec<Row>> {
    let file = File::open(path).map_err(|error| Error::io(path, error))?;
    let mut text = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut text).map_err(|error| Error::io(path, error))?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(Error::new(
            Code::PromptMalformed,
            format!("{}: it takes more than {MAX_FILE_BYTES} bytes; split it into several jobs", path.display()),
        ));
    }
    parse(&path.display().to_string(), &text)
}

/// Reads all rows of a prompt file; `name` stands before every message.
///
/// Blank lines, a byte order mark and CRLF line ends are accepted. A row without an id is called
/// `row-N` after its line. An id twice is refused, and so is one prompt in both splits.
pub fn parse(name: &str, text: &[u8]) -> Result<Vec<Row>> {
    if text.starts_with(&[0xff, 0xfe]) || text.starts_with(&[0xfe, 0xff]) {
        return Err(malformed(name, "it is UTF-16; save it as UTF-8".to_owned()));
    }
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
    let mut rows: Vec<Row> = Vec::new();
    let mut lines: Vec<usize> = Vec::new();
    let mut ids: HashMap<String, usize> = HashMap::new();
    for (index, line) in text.split(|&byte| byte == b'\n').enumerate() {
        let number = index + 1;
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let place = || format!("{name} line {number}");
        if line.len() > MAX_LINE_BYTES {
            return Err(too_long(&place(), line.len()));
        }
        let line = std::str::from_utf8(line).map_err(|error| {
            malformed(&place(), format!("byte {} is not UTF-8; save the file as UTF-8", error.valid_up_to() + 1))
        })?;
        let row = parse_line(name, number, line)?;
        if let Some(first) = ids.insert(row.id.clone(), number) {
            return Err(malformed(&place(), format!("the id {:?} is line {first}'s already; ids must differ", row.id)));
        }
        rows.push(row);
        lines.push(number);
    }
    if rows.is_empty() {
        return Err(Error::new(Code::PromptEmpty, format!("{name}: there is no row in it")));
    }
    refuse_both_splits(name, &rows, &lines)?;
    Ok(rows)
}

/// The line of the nth row, both counted as [`parse`] counts them: rows from 0, lines from 1.
pub fn line_of(text: &[u8], row: usize) -> usize {
    let blank = |line: &[u8]| line.iter().all(u8::is_ascii_whitespace);
    let mut lines = text.split(|&byte| byte == b'\n').enumerate().filter(|(_, line)| !blank(line));
    lines.nth(row).map_or(0, |(index, _)| index + 1)
}

/// Reads one row; `line_no` counts from 1.
pub fn parse_line(name: &str, line_no: usize, line: &str) -> Result<Row> {
    let place = format!("{name} line {line_no}");
    if line.len() > MAX_LINE_BYTES {
        return Err(too_long(&place, line.len()));
    }
    let bad = |why: String| malformed(&place, why);
    let Unique(value) = serde_json::from_str(line).map_err(|error| {
        let text = error.to_string();
        let what = text.split(" at line ").next().unwrap_or(&text);
        if error.is_data() {
            bad(what.to_owned())
        } else {
            bad(format!("not JSON at column {}: {what}", error.column()))
        }
    })?;
    let Value::Object(mut object) = value else {
        return Err(bad("it must be a JSON object, like {\"messages\": [...]}".to_owned()));
    };
    refuse_unknown_keys(&object, "", &ROW_KEYS).map_err(bad)?;
    let messages = match object.remove("messages") {
        Some(Value::Array(list)) => messages(&place, list)?,
        Some(other) => return Err(bad(format!("\"messages\" must be a list, it is {}", kind(&other)))),
        None => return Err(bad("\"messages\" is missing".to_owned())),
    };
    let (completion, pieces) = match object.remove("completion") {
        None | Some(Value::Null) => (None, Vec::new()),
        Some(Value::String(text)) => (Some(text), Vec::new()),
        Some(Value::Array(list)) => in_pieces(list).map(|(text, pieces)| (Some(text), pieces)).map_err(bad)?,
        Some(other) => {
            return Err(bad(format!("\"completion\" must be a string or a list of pieces, it is {}", kind(&other))));
        }
    };
    if completion.as_deref().is_some_and(is_blank) {
        let message = format!("{place}: \"completion\" is empty; leave it out or fill it");
        return Err(Error::new(Code::PromptEmpty, message));
    }
    Ok(Row {
        id: optional_text(&mut object, "id").map_err(bad)?.unwrap_or_else(|| format!("row-{line_no}")),
        messages,
        tags: tags(object.remove("tags")).map_err(bad)?,
        split: split(object.remove("split")).map_err(bad)?,
        completion: completion.map(|text| without_nul("\"completion\"", text)).transpose().map_err(bad)?,
        pieces,
        weight: weight("\"weight\"", object.remove("weight")).map_err(bad)?,
    })
}

/// A completion's text, and its pieces unless all of them weigh 1.
fn in_pieces(list: Vec<Value>) -> Result<(String, Vec<Piece>), String> {
    let (mut whole, mut pieces) = (String::new(), Vec::with_capacity(list.len()));
    for (i, value) in list.into_iter().enumerate() {
        let Value::Object(mut object) = value else {
            return Err(format!("completion[{i}] must be an object with \"text\" and \"weight\""));
        };
        refuse_unknown_keys(&object, &format!("completion[{i}]."), &PIECE_KEYS)?;
        let text = match object.remove("text") {
            Some(Value::String(text)) => text,
            Some(other) => return Err(format!("completion[{i}].text must be a string, it is {}", kind(&other))),
            None => return Err(format!("completion[{i}].text is missing")),
        };
        if text.is_empty() {
            return Err(format!("completion[{i}].text is empty; leave the piece out"));
        }
        let weight = weight(&format!("completion[{i}].weight"), object.remove("weight"))?;
        pieces.push(Piece { bytes: text.len(), weight });
        whole += &text;
    }
    if pieces.iter().all(|piece| piece.weight == 1.0) {
        pieces.clear();
    }
    Ok((whole, pieces))
}

fn weight(what: &str, value: Option<Value>) -> Result<f64, String> {
    match value {
        None | Some(Value::Null) => Ok(1.0),
        Some(Value::Number(number)) => match number.as_f64() {
            Some(weight) if (0.0..=MAX_WEIGHT).contains(&weight) => Ok(weight),
            _ => Err(format!("{what} is {number}; it must lie between 0 and {MAX_WEIGHT}")),
        },
        Some(other) => Err(format!("{what} must be a number, it is {}", kind(&other))),
    }
}

/// A turn before the completion is read and never trained on, which 0 says too.
fn refuse_weight(i: usize, role: Role, value: Value) -> Result<(), String> {
    let weight = weight(&format!("messages[{i}].weight"), Some(value))?;
    if weight == 0.0 && role == Role::Assistant {
        return Ok(());
    }
    Err(match role {
        Role::Assistant => format!(
            "messages[{i}].weight is {weight}, but turns before the completion are not trained on; give this one as the \
             \"completion\" of a row of its own, or 0"
        ),
        _ => format!("messages[{i}].weight: only an assistant turn may have one"),
    })
}

fn messages(place: &str, list: Vec<Value>) -> Result<Vec<Message>> {
    let bad = |why: String| malformed(place, why);
    let mut messages = Vec::with_capacity(list.len());
    for (i, value) in list.into_iter().enumerate() {
        let Value::Object(mut object) = value else {
            return Err(bad(format!("messages[{i}] must be an object with \"role\" and \"content\"")));
        };
        refuse_unknown_keys(&object, &format!("messages[{i}]."), &MESSAGE_KEYS).map_err(bad)?;
        let role = match object.remove("role") {
            Some(Value::String(role)) => role,
            Some(other) => return Err(bad(format!("messages[{i}].role must be a string, it is {}", kind(&other)))),
            None => return Err(bad(format!("messages[{i}].role is missing"))),
        };
        let role = match role.as_str() {
            "system" => Role::System,
            "user" => Role::User,
            "assistant" => Role::Assistant,
            other => {
                let hint = did_you_mean(other, &ROLES);
                return Err(bad(format!(
                    "messages[{i}].role is {:?}{hint}; use system, user or assistant",
                    shown(other)
                )));
            }
        };
        let content = match object.remove("content") {
            Some(Value::String(content)) => content,
            Some(other) => return Err(bad(format!("messages[{i}].content must be a string, it is {}", kind(&other)))),
            None => return Err(bad(format!("messages[{i}].content is missing"))),
        };
        if is_blank(&content) {
            return Err(Error::new(Code::PromptEmpty, format!("{place}: messages[{i}].content is empty")));
        }
        let content = without_nul(&format!("messages[{i}].content"), content).map_err(bad)?;
        if let Some(value) = object.remove("weight").filter(|value| !value.is_null()) {
            refuse_weight(i, role, value).map_err(bad)?;
        }
        if role == Role::System && i > 0 {
            return Err(bad(format!("messages[{i}] is a system turn; only the first message may be one")));
        }
        messages.push(Message { role, content });
    }
    match messages.last() {
        None => Err(Error::new(Code::PromptEmpty, format!("{place}: \"messages\" is empty"))),
        Some(last) if last.role != Role::User => Err(bad("\"messages\" must end with a user turn".to_owned())),
        Some(_) => Ok(messages),
    }
}

fn tags(value: Option<Value>) -> Result<Vec<String>, String> {
    let list = match value {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(list)) if list.len() <= MAX_TAGS => list,
        Some(Value::Array(list)) => return Err(format!("\"tags\" has {} entries, at most {MAX_TAGS}", list.len())),
        Some(other) => return Err(format!("\"tags\" must be a list of strings, it is {}", kind(&other))),
    };
    let tag = |(i, value)| match value {
        Value::String(tag) => name(&format!("tags[{i}]"), tag),
        other => Err(format!("tags[{i}] must be a string, it is {}", kind(&other))),
    };
    list.into_iter().enumerate().map(tag).collect()
}

fn split(value: Option<Value>) -> Result<Option<Split>, String> {
    let text = match value {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(text)) => text,
        Some(other) => return Err(format!("\"split\" must be a string, it is {}", kind(&other))),
    };
    Split::parse(&text).map(Some).ok_or_else(|| {
        format!("\"split\" is {:?}{}; use train or held_out", shown(&text), did_you_mean(&text, &SPLITS))
    })
}

fn optional_text(object: &mut Map<String, Value>, key: &str) -> Result<Option<String>, String> {
    match object.remove(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => name(&format!("{key:?}"), text).map(Some),
        Some(other) => Err(format!("{key:?} must be a string, it is {}", kind(&other))),
    }
}

/// A short text on one line.
fn name(what: &str, text: String) -> Result<String, String> {
    if is_blank(&text) {
        Err(format!("{what} is empty"))
    } else if text.len() > MAX_NAME_BYTES {
        Err(format!("{what} takes {} bytes, at most {MAX_NAME_BYTES}", text.len()))
    } else if text.contains(char::is_control) {
        Err(format!("{what} has a control character in it"))
    } else {
        Ok(text)
    }
}

fn refuse_unknown_keys(object: &Map<String, Value>, path: &str, known: &[&str]) -> Result<(), String> {
    match object.keys().find(|key| !known.contains(&key.as_str())) {
        None => Ok(()),
        Some(key) => {
            let hint = did_you_mean(key, known);
            Err(format!("unknown key \"{path}{}\"{hint}; known are {}", shown(key), known.join(", ")))
        }
    }
}

fn did_you_mean(given: &str, known: &[&str]) -> String {
    if given.len() > MAX_NAME_BYTES {
        return String::new(); // a likeness takes time that grows with the length
    }
    let likeness = |word: &str| strsim::jaro_winkler(&given.to_lowercase(), word);
    match known.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b))) {
        Some(best) if likeness(best) > 0.75 => format!(", did you mean {best:?}?"),
        _ => String::new(),
    }
}

fn refuse_both_splits(name: &str, rows: &[Row], lines: &[usize]) -> Result<()> {
    let mut seen: HashMap<&[Message], (usize, Split)> = HashMap::new();
    for (row, &line) in rows.iter().zip(lines) {
        let Some(split) = row.split else { continue };
        match seen.get(row.messages.as_slice()) {
            Some(&(first, other)) if other != split => {
                return Err(Error::new(
                    Code::PromptSetLeaks,
                    format!(
                        "{name} line {line}: the same prompt is in line {first} with split {other}, here with {split}; \
                         a held-out prompt must not be trained on"
                    ),
                ));
            }
            Some(_) => {}
            None => {
                seen.insert(&row.messages, (line, split));
            }
        }
    }
    Ok(())
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn shown(text: &str) -> String {
    text.chars().take(80).collect()
}

fn too_long(place: &str, bytes: usize) -> Error {
    malformed(place, format!("it takes {bytes} bytes, at most {MAX_LINE_BYTES} fit in one line"))
}

fn malformed(place: &str, why: String) -> Error {
    Error::new(Code::PromptMalformed, format!("{place}: {why}"))
}
