//! The two pieces of Python's library that chat templates call: `json.dumps` and `strftime`.

use minijinja::{
    Error, ErrorKind, Value,
    value::{Kwargs, ValueKind},
};
use time::OffsetDateTime;

/// Deeper than any tool schema; JSON here is written by recursion.
const MAX_DEPTH: usize = 64;
/// Bytes of a separator.
const MAX_SEPARATOR: usize = 16;

/// `json.dumps(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub(super) fn json_dumps(value: &Value, options: &Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let (comma, colon) = match separators.as_deref() {
        Some([comma, colon]) if comma.len().max(colon.len()) <= MAX_SEPARATOR => (comma.clone(), colon.clone()),
        Some(_) => return Err(invalid("tojson: separators must be two short strings")),
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
    };
    let mut writer = Writer {
        text: String::new(),
        indent: indent.map(|indent| indent.min(64)),
        comma,
        colon,
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    writer.value(value, 0)?;
    Ok(writer.text)
}

struct Writer {
    text: String,
    indent: Option<usize>,
    comma: String,
    colon: String,
    sort_keys: bool,
    ascii: bool,
}

impl Writer {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(invalid("tojson: the value is nested too deeply"));
        }
        match value.kind() {
            ValueKind::None => self.text.push_str("null"),
            ValueKind::Bool => self.text.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => self.text.push_str(&value.to_string()),
            ValueKind::Number => self.text.push_str(&float(f64::try_from(value.clone())?)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.sequence(('{', '}'), &keys, depth, |writer, key| {
                    match key.as_str() {
                        Some(key) => writer.string(key),
                        None => writer.string(&key.to_string()),
                    }
                    writer.text.push_str(&writer.colon.clone());
                    writer.value(&value.get_item(key)?, depth + 1)
                })?;
            }
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.sequence(('[', ']'), &items, depth, |writer, item| writer.value(item, depth + 1))?;
            }
            kind => return Err(invalid(format!("tojson: {kind} is not JSON serializable"))),
        }
        Ok(())
    }

    fn sequence(
        &mut self,
        (open, close): (char, char),
        items: &[Value],
        depth: usize,
        mut write: impl FnMut(&mut Self, &Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.text.push(open);
        for (at, item) in items.iter().enumerate() {
            if at > 0 {
                self.text.push_str(&self.comma.clone());
            }
            self.line(depth + 1);
            write(self, item)?;
        }
        if !items.is_empty() {
            self.line(depth);
        }
        self.text.push(close);
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = self.indent {
            self.text.push('\n');
            self.text.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn string(&mut self, text: &str) {
        let quoted = serde_json::Value::from(text).to_string();
        if !self.ascii {
            self.text.push_str(&quoted);
            return;
        }
        let mut units = [0; 2];
        for character in quoted.chars() {
            if character.is_ascii() {
                self.text.push(character);
            } else {
                for unit in character.encode_utf16(&mut units) {
                    self.text.push_str(&format!("\\u{unit:04x}"));
                }
            }
        }
    }
}

/// As Python prints it: `1e-05` where Rust says `1e-5`.
fn float(value: f64) -> String {
    let text = format!("{value:?}");
    match text.split_once('e') {
        Some((digits, exponent)) => {
            let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |exponent| ('-', exponent));
            format!("{}e{sign}{exponent:0>2}", digits.strip_suffix(".0").unwrap_or(digits))
        }
        None if value.is_nan() => "NaN".to_owned(),
        None if value.is_infinite() => (if value > 0.0 { "Infinity" } else { "-Infinity" }).to_owned(),
        None => text,
    }
}

/// The directives that chat templates use, in English; any other is an error rather than a guess.
pub(super) fn strftime(now: OffsetDateTime, format: &str) -> Result<String, String> {
    let mut text = String::new();
    let mut rest = format.chars();
    while let Some(character) = rest.next() {
        if character != '%' {
            text.push(character);
            continue;
        }
        let mut directive = rest.next();
        let padded = directive != Some('-');
        if !padded {
            directive = rest.next();
        }
        let mut number = |value: u32, width: usize| {
            let width = if padded { width } else { 0 };
            text.push_str(&format!("{value:0width$}"));
        };
        let (month, weekday) = (now.month().to_string(), now.weekday().to_string());
        match directive {
            Some('Y') => number(now.year().unsigned_abs(), 4),
            Some('y') => number(now.year().unsigned_abs() % 100, 2),
            Some('m') => number(u8::from(now.month()).into(), 2),
            Some('d') => number(now.day().into(), 2),
            Some('j') => number(now.ordinal().into(), 3),
            Some('H') => number(now.hour().into(), 2),
            Some('I') => number(u32::from(now.hour() + 11) % 12 + 1, 2),
            Some('M') => number(now.minute().into(), 2),
            Some('S') => number(now.second().into(), 2),
            Some('p') => text.push_str(if now.hour() < 12 { "AM" } else { "PM" }),
            Some('B') => text.push_str(&month),
            Some('b' | 'h') => text.push_str(&month[..3]),
            Some('A') => text.push_str(&weekday),
            Some('a') => text.push_str(&weekday[..3]),
            Some('Z') => text.push_str("UTC"),
            Some('%') => text.push('%'),
            other => {
                return Err(format!("strftime_now: %{} is not supported", other.map_or(String::new(), String::from)));
            }
        }
    }
    Ok(text)
}

fn invalid(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}
