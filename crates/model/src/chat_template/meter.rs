//! Puts meters into a template's text: filters that give back what they get and count its bytes.
//!
//! The engine counts steps, but one step can double a text, and forty of those need more memory
//! than there is. So each operand of `~`, `+` and `*` and the input of each filter passes a meter of
//! [`super::bounds`]. A filter binds tighter than any operator, so the meaning stays the same.

pub(super) const OPERAND: &str = "|__operand";
pub(super) const FACTOR: &str = "|__factor";
pub(super) const INPUT: &str = "|__input";
/// Shorter text between tags is paid for by the steps that print it.
const FREE_BYTES: usize = 64;
/// Deeper than the engine parses.
const MAX_DEPTH: usize = 400;

const KEYWORDS: [&str; 21] = [
    "and",
    "or",
    "not",
    "in",
    "is",
    "if",
    "else",
    "elif",
    "for",
    "set",
    "recursive",
    "macro",
    "call",
    "filter",
    "block",
    "with",
    "do",
    "as",
    "import",
    "from",
    "include",
];

/// The template with its meters.
pub(super) fn metered(source: &str) -> String {
    let mut text = String::with_capacity(source.len() * 2);
    let mut rest = source;
    while let Some(at) = next_tag(rest) {
        put_text(&mut text, &rest[..at]);
        let tag = &rest[at..];
        let length = if tag.starts_with("{#") { put_comment(&mut text, tag) } else { put_code(&mut text, tag) };
        rest = &tag[length..];
    }
    put_text(&mut text, rest);
    text
}

fn next_tag(text: &str) -> Option<usize> {
    let opens = |pair: &[u8]| pair[0] == b'{' && matches!(pair[1], b'{' | b'%' | b'#');
    text.as_bytes().windows(2).position(opens)
}

/// Text between tags, metered in its middle so that the tags' own rules on white space still hold.
fn put_text(text: &mut String, raw: &str) {
    match raw.char_indices().find(|(_, c)| !c.is_whitespace()) {
        Some((at, c)) if raw.len() > FREE_BYTES => {
            let (before, after) = raw.split_at(at + c.len_utf8());
            text.push_str(&format!("{before}{{{{ __text({}) }}}}{after}", raw.len()));
        }
        _ => text.push_str(raw),
    }
}

/// Gives the bytes of `tag` that are done.
fn put_comment(text: &mut String, tag: &str) -> usize {
    let end = tag.find("#}").map_or(tag.len(), |end| end + 2);
    text.push_str(&tag[..end]);
    end
}

/// A tag, and behind `{% raw %}` all that is no code. Gives the bytes of `tag` that are done.
fn put_code(text: &mut String, tag: &str) -> usize {
    let tokens = tokens(tag);
    let last = tokens.last().map_or(2, |token| token.end);
    let mut done = 0;
    for (place, meter) in meters(tag, &tokens) {
        text.push_str(&tag[done..place]);
        text.push_str(meter);
        done = place;
    }
    let closed = last + closing(&tag[last..]);
    let word = tokens.iter().find(|token| token.kind == Kind::Word).map_or("", |token| &tag[token.start..token.end]);
    let end = match (word, tag.starts_with("{%")) {
        ("raw", true) => tag[closed..].find("endraw").map_or(tag.len(), |end| closed + end),
        _ => closed,
    };
    text.push_str(&tag[done..end]);
    end
}

/// Where in a tag which meter goes, in order.
fn meters(tag: &str, tokens: &[Token]) -> Vec<(usize, &'static str)> {
    let mut walk = Walk { tag, tokens, meters: Vec::new() };
    let mut at = 0;
    while at < tokens.len() {
        at = walk.expression(at, 0) + 1;
    }
    walk.meters.sort_by_key(|(place, _)| *place);
    walk.meters
}

/// Bytes to the end of the closing `}}` or `%}`; none where the tag is not closed.
fn closing(rest: &str) -> usize {
    let trimmed = rest.trim_start();
    let blank = rest.len() - trimmed.len();
    if trimmed.starts_with("}}") || trimmed.starts_with("%}") { blank + 2 } else { 0 }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A name.
    Word,
    /// A string or a number.
    Literal,
    Open,
    Close,
    Dot,
    Pipe,
    /// Any other sign, and keywords.
    Operator,
}

#[derive(Clone, Copy, Debug)]
struct Token {
    kind: Kind,
    start: usize,
    end: usize,
}

/// The tokens of the tag that a text begins with, without its opening and closing signs.
fn tokens(tag: &str) -> Vec<Token> {
    let close = if tag.starts_with("{{") { "}}" } else { "%}" };
    let (mut tokens, mut depth, mut at) = (Vec::new(), 0_usize, 2);
    while let Some(first) = tag[at..].chars().next() {
        if depth == 0 && tag[at..].starts_with(close) {
            break;
        }
        let start = at;
        at += first.len_utf8();
        let kind = match first {
            c if c.is_whitespace() => continue,
            '\'' | '"' => {
                at = string_end(tag, at, first);
                Kind::Literal
            }
            c if c.is_ascii_digit() => {
                let number = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
                at = tag[at..].find(|c| !number(c)).map_or(tag.len(), |end| at + end);
                Kind::Literal
            }
            c if c.is_alphabetic() || c == '_' => {
                at = tag[at..].find(|c: char| !(c.is_alphanumeric() || c == '_')).map_or(tag.len(), |end| at + end);
                if KEYWORDS.contains(&&tag[start..at]) { Kind::Operator } else { Kind::Word }
            }
            '(' | '[' | '{' => {
                depth += 1;
                Kind::Open
            }
            ')' | ']' | '}' => {
                depth = depth.saturating_sub(1);
                Kind::Close
            }
            '.' => Kind::Dot,
            '|' => Kind::Pipe,
            '*' if tag[at..].starts_with('*') => {
                at += 1;
                Kind::Operator
            }
            _ => Kind::Operator,
        };
        tokens.push(Token { kind, start, end: at });
    }
    tokens
}

fn string_end(tag: &str, from: usize, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in tag[from..].char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return from + at + 1,
            _ => {}
        }
    }
    tag.len()
}

/// Finds operands and where their meters go: byte offsets into the tag.
struct Walk<'a> {
    tag: &'a str,
    tokens: &'a [Token],
    meters: Vec<(usize, &'static str)>,
}

impl<'a> Walk<'a> {
    /// Gives the index of the bracket that closes the expression, or the end.
    fn expression(&mut self, mut at: usize, depth: usize) -> usize {
        let mut before = None;
        while let Some(token) = self.tokens.get(at) {
            match token.kind {
                Kind::Close => return at,
                Kind::Operator | Kind::Dot | Kind::Pipe => {
                    before = self.sign(at);
                    at += 1;
                }
                Kind::Word | Kind::Literal | Kind::Open => {
                    at = self.operand(at, depth);
                    let signs = [before.take(), self.sign(at)];
                    if signs.contains(&Some("*")) {
                        self.meter(at, FACTOR);
                    } else if signs.iter().flatten().any(|sign| ["~", "+"].contains(sign)) {
                        self.meter(at, OPERAND);
                    }
                }
            }
        }
        at
    }

    /// A name, literal or bracket with everything that binds to it; gives the token behind it.
    fn operand(&mut self, at: usize, depth: usize) -> usize {
        let mut at = if self.kind(at) == Some(Kind::Open) { self.group(at, depth) } else { at + 1 };
        loop {
            at = match self.kind(at) {
                Some(Kind::Open) => self.group(at, depth),
                Some(Kind::Dot) => at + 2,
                Some(Kind::Pipe) => {
                    self.meter(at, INPUT);
                    at + 2
                }
                _ => return at.min(self.tokens.len()),
            };
        }
    }

    fn group(&mut self, at: usize, depth: usize) -> usize {
        if depth > MAX_DEPTH { self.tokens.len() } else { self.expression(at + 1, depth + 1) + 1 }
    }

    fn kind(&self, at: usize) -> Option<Kind> {
        self.tokens.get(at).map(|token| token.kind)
    }

    /// The operator at a place. At either end of a tag stands a mark for its white space instead.
    fn sign(&self, at: usize) -> Option<&'a str> {
        let inside = at > 0 && at + 1 < self.tokens.len();
        let token = self.tokens.get(at).filter(|token| inside && token.kind == Kind::Operator)?;
        Some(&self.tag[token.start..token.end])
    }

    /// Behind the token before `at`.
    fn meter(&mut self, at: usize, meter: &'static str) {
        if let Some(last) = self.tokens.get(at.saturating_sub(1)) {
            self.meters.push((last.end, meter));
        }
    }
}
