use std::{
    fmt,
    io::{self, Write},
};

/// Standard error for words that may be lost: on a full disk, or with nobody at the other end of the
/// pipe, they are, and the process goes on. (`eprintln!` would panic.)
#[derive(Clone, Copy, Debug, Default)]
pub struct LossyStderr;

impl Write for LossyStderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = io::stderr().lock().write_all(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let _ = io::stderr().flush();
        Ok(())
    }
}

/// Begins a line of a message that quotes another text, as the end of a log.
const QUOTED: &str = "  | ";

/// One line on standard error, or nowhere; what could move the cursor is [`escaped`].
pub fn remark(line: impl fmt::Display) {
    let _ = writeln!(LossyStderr, "{}", escaped(&line.to_string()));
}

/// Whether a character is one of the marks that reorder a line on a terminal and show nothing.
pub fn reorders(c: char) -> bool {
    matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Text as it may be shown on a terminal: control characters, and the marks that reorder a line, as Rust
/// writes them in a string (`\u{1b}`). A line end stays only where the next line is a quotation
/// (`  | `): text from outside can add lines that look quoted, and no others. Where even those must be
/// retort's own, what is put into a message is written with `{:?}`.
pub fn escaped(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for (at, c) in text.char_indices() {
        match c {
            '\n' if text[at + 1..].starts_with(QUOTED) => shown.push(c),
            c if reorders(c) => shown.extend(c.escape_unicode()),
            c if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}') => shown.extend(c.escape_debug()),
            c => shown.push(c),
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_move_the_cursor_is_shown_and_moves_nothing() {
        assert_eq!(escaped("row \"a\u{1b}[2Jb\": \r\t\0\u{7f}\u{9b}"), r#"row "a\u{1b}[2Jb": \r\t\0\u{7f}\u{9b}"#);
        assert_eq!(escaped("a\nerror[internal]: b\n"), r"a\nerror[internal]: b\n");
        assert_eq!(escaped("a\u{202e}b\u{2028}c\u{200f}d\u{61c}"), r"a\u{202e}b\u{2028}c\u{200f}d\u{61c}");
    }

    #[test]
    fn other_text_and_quotations_stay_as_they_are() {
        let text = "Größe 日本語 e\u{301} 👩\u{200d}🔬 'x' \\ the end of the log:\n  | one\n  | two";
        assert_eq!(escaped(text), text);
    }
}
