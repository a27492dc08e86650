//! Text on a terminal: cleaned of control characters, wrapped, with figures people can read.

use retort_process::reorders;
use unicode_width::UnicodeWidthChar as _;

/// Text safe to print: control characters and the marks that reorder a line are dropped, tabs
/// become spaces, line ends are kept. What a model wrote cannot move the cursor.
pub fn clean(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' => clean.push('\n'),
            '\t' => clean.push_str("    "),
            c if c.is_control() || reorders(c) => {}
            c => clean.push(c),
        }
    }
    clean
}

/// Cleaned, and cut after `columns` columns with an ellipsis.
pub fn shorten(text: &str, columns: usize) -> String {
    let flat = clean(text).split_whitespace().collect::<Vec<_>>().join(" ");
    if width(&flat) <= columns {
        return flat;
    }
    let mut short = String::new();
    let mut used = 1;
    for c in flat.chars() {
        used += c.width().unwrap_or(0);
        if used > columns {
            break;
        }
        short.push(c);
    }
    short.push('…');
    short
}

/// Lines of at most `columns` columns, broken at spaces; a longer word is broken anywhere. Blank
/// lines are dropped.
pub fn wrap(text: &str, columns: usize) -> Vec<String> {
    let columns = columns.max(1);
    let mut lines = Vec::new();
    for paragraph in text.lines() {
        let mut line = String::new();
        for word in paragraph.split_whitespace() {
            if !line.is_empty() && width(&line) + 1 + width(word) > columns {
                lines.push(std::mem::take(&mut line));
            }
            if !line.is_empty() {
                line.push(' ');
            }
            for c in word.chars() {
                if width(&line) + c.width().unwrap_or(0) > columns {
                    lines.push(std::mem::take(&mut line));
                }
                line.push(c);
            }
        }
        if !line.is_empty() {
            lines.push(line);
        }
    }
    lines
}

/// Columns the text takes.
pub fn width(text: &str) -> usize {
    text.chars().map(|c| c.width().unwrap_or(0)).sum()
}

/// `1234567` -> `1,234,567`.
pub fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Decimal units, as disks are sold: `1.2 MB`.
pub fn bytes(n: u64) -> String {
    let mut value = n as f64;
    for unit in ["B", "kB", "MB", "GB", "TB"] {
        if value < 999.95 {
            return if unit == "B" { format!("{n} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1000.0;
    }
    format!("{value:.1} PB")
}

/// `1 h 02 min`, `3 min 20 s`, `45 s`.
pub fn duration(seconds: f64) -> String {
    // Saturates; NaN becomes 0.
    let seconds = seconds.round() as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s:02} s"),
        (h, m, _) => format!("{h} h {m:02} min"),
    }
}

/// A rate or a rank with three figures or so: `1,234`, `86.2`, `3.41`.
pub fn rate(value: f64) -> String {
    match value {
        v if !v.is_finite() || v <= 0.0 => "-".to_owned(),
        v if v >= 100.0 => count(v.round() as u64),
        v if v >= 10.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

/// Columns aligned to their widest cell, two spaces between, no trailing space. The columns named
/// in `right` are aligned to the right.
pub fn table(rows: &[Vec<String>], right: &[usize]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|c| rows.iter().filter_map(|row| row.get(c)).map(|cell| width(cell)).max().unwrap_or(0))
        .collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (c, cell) in row.iter().enumerate() {
            let padding = " ".repeat(widths[c].saturating_sub(width(cell)));
            let cell = if right.contains(&c) { format!("{padding}{cell}") } else { format!("{cell}{padding}") };
            line.push_str(&cell);
            line.push_str("  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cleans_what_could_move_the_cursor() {
        assert_eq!(clean("a\u{1b}[2Jb\r\tc\u{202e}d\u{9b}\u{61c}e\nf"), "a[2Jb    cde\nf");
    }

    #[test]
    fn wraps_at_spaces_and_breaks_what_is_too_long() {
        assert_eq!(wrap("to be or not\n\nto be", 6), ["to be", "or not", "to be"]);
        assert_eq!(wrap("abcdefgh ij", 3), ["abc", "def", "gh", "ij"]);
        assert_eq!(wrap("日本語 日本", 4), ["日本", "語", "日本"]);
    }

    #[test]
    fn shortens_to_the_columns() {
        assert_eq!(shorten("hello  world", 40), "hello world");
        assert_eq!(shorten("hello world", 6), "hello…");
    }

    #[test]
    fn figures() {
        assert_eq!(count(1_234_567), "1,234,567");
        assert_eq!(count(12), "12");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1_250_000), "1.2 MB");
        assert_eq!(duration(3723.0), "1 h 02 min");
        assert_eq!(duration(200.0), "3 min 20 s");
        assert_eq!(duration(f64::NAN), "0 s");
        assert_eq!(rate(1234.4), "1,234");
        assert_eq!(rate(0.0), "-");
    }

    #[test]
    fn aligns_a_table() {
        let rows = [["a", "1"], ["long", "22"]].map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(table(&rows, &[1]), "a      1\nlong  22\n");
    }
}
