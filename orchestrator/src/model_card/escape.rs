//! Text from outside in a model card: it is seen as it is, and is neither YAML nor Markdown nor HTML.

use std::fmt::Write as _;

use retort_process::reorders;

/// Longest text that is shown, characters.
const MAX_CHARS: usize = 200;

/// A quoted YAML scalar.
pub(super) fn yaml(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars().take(MAX_CHARS) {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if is_shown(c) => quoted.push(c),
            c => drop(write!(quoted, "\\U{:08x}", u32::from(c))),
        }
    }
    quoted.push('"');
    quoted
}

/// Text between Markdown, in a table's cell too.
pub(super) fn markdown(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars().take(MAX_CHARS) {
        match c {
            // Escaped by a backslash everywhere, in cells of tables too; `&` and `<` would begin HTML.
            c if c.is_ascii_punctuation() && !matches!(c, '&' | '<' | '>' | '|') => escaped.extend(['\\', c]),
            '&' | '<' | '>' | '|' => drop(write!(escaped, "&#{};", u32::from(c))),
            c if is_shown(c) => escaped.push(c),
            _ => escaped.push(' '),
        }
    }
    escaped
}

/// As [`markdown`], set as code.
pub(super) fn code(text: &str) -> String {
    let shown = text.chars().take(MAX_CHARS);
    let mut escaped = String::from("<code>");
    for c in shown {
        match c {
            c if c.is_ascii_alphanumeric() || matches!(c, ' ' | '.' | ',' | '/' | '-') => escaped.push(c),
            c if c.is_ascii() && !c.is_ascii_control() => drop(write!(escaped, "&#{};", u32::from(c))),
            c if is_shown(c) => escaped.push(c),
            _ => escaped.push(' '),
        }
    }
    escaped.push_str("</code>");
    escaped
}

/// What a path or URL ends in: where a model lies is nobody's business but its owner's.
pub(super) fn last_part(path: &str) -> String {
    let part = path.trim_end_matches(['/', '\\']).rsplit(['/', '\\']).next().unwrap_or_default();
    part.to_owned()
}

/// Neither control characters, nor what moves text about or ends a line.
fn is_shown(c: char) -> bool {
    !c.is_control() && !reorders(c) && !matches!(c, '\u{2028}' | '\u{2029}' | '\u{feff}' | '\u{fffe}' | '\u{ffff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_yaml_scalar_stays_one() {
        assert_eq!(yaml("a: \"b\"\n- c\\"), r#""a: \"b\"\U0000000a- c\\""#);
        assert_eq!(yaml("\u{85}\u{2028}é日"), r#""\U00000085\U00002028é日""#);
        assert_eq!(yaml(&"x".repeat(1000)).len(), MAX_CHARS + 2);
    }

    #[test]
    fn markdown_stays_text() {
        assert_eq!(
            markdown("a|b\n# <img src=x> [l](u) `c`"),
            "a&#124;b \\# &#60;img src\\=x&#62; \\[l\\]\\(u\\) \\`c\\`"
        );
        assert_eq!(
            code("{\"a_b\": 1}`|</code>\u{202e}"),
            "<code>&#123;&#34;a&#95;b&#34;&#58; 1&#125;&#96;&#124;&#60;/code&#62; </code>"
        );
    }

    #[test]
    fn a_path_is_its_end() {
        assert_eq!(last_part("/data/models/teacher/"), "teacher");
        assert_eq!(last_part("file:///data/teacher"), "teacher");
        assert_eq!(last_part("head_draws"), "head_draws");
    }
}
