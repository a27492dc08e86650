//! Where a command's words go. Results go to standard output, remarks to standard error; a reader
//! that has gone away ends neither with a panic.

use std::{
    io::{ErrorKind, IsTerminal as _, Write as _},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use serde_json::Value;

/// Columns used when the terminal does not say how many it has.
const DEFAULT_WIDTH: usize = 100;

#[derive(Clone, Debug)]
pub struct Output {
    json: bool,
    closed: Arc<AtomicBool>,
}

impl Output {
    pub fn new(json: bool) -> Self {
        Self { json, closed: Arc::default() }
    }

    /// Whether `--json` was asked for.
    pub fn is_json(&self) -> bool {
        self.json
    }

    /// Whether the reader of standard output has gone.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// Text for people; silent in JSON mode.
    pub fn text(&self, text: &str) {
        if !self.json {
            self.write(text);
        }
    }

    /// One JSON line; silent in text mode.
    pub fn json(&self, value: &Value) {
        if self.json {
            self.write(&value.to_string());
        }
    }

    /// A remark beside the result, on standard error: it never mixes with what a script reads.
    pub fn remark(&self, text: &str) {
        let _ = writeln!(std::io::stderr().lock(), "{text}");
    }

    /// The same output, as JSON lines.
    pub fn as_json(&self) -> Self {
        Self { json: true, closed: self.closed.clone() }
    }

    fn write(&self, text: &str) {
        let mut out = std::io::stdout().lock();
        match writeln!(out, "{}", text.trim_end_matches('\n')).and_then(|()| out.flush()) {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => self.closed.store(true, Ordering::Relaxed),
            _ => {}
        }
    }
}

/// Columns of standard output, between 40 and 160.
pub fn width() -> usize {
    let stdout = std::io::stdout();
    let columns = if stdout.is_terminal() {
        rustix::termios::tcgetwinsize(&stdout).map(|size| usize::from(size.ws_col)).unwrap_or(0)
    } else {
        std::env::var("COLUMNS").ok().and_then(|text| text.parse().ok()).unwrap_or(0)
    };
    if columns == 0 { DEFAULT_WIDTH } else { columns.clamp(40, 160) }
}
