//! Where a command's words go. Results go to standard output, remarks to standard error; a reader
//! that has gone away ends neither with a panic. What standard output did not take for any other
//! reason (its disk is full) is remembered: the command then fails, whatever else it did.

use std::{
    io::{ErrorKind, IsTerminal as _, Write as _},
    sync::{Arc, Mutex, PoisonError},
};

use retort_core::{Code, Error};
use serde_json::Value;

/// Columns used when the terminal does not say how many it has.
const DEFAULT_WIDTH: usize = 100;

#[derive(Clone, Debug)]
pub struct Output {
    json: bool,
    /// Why standard output first refused to take a line.
    refused: Arc<Mutex<Option<ErrorKind>>>,
}

impl Output {
    pub fn new(json: bool) -> Self {
        Self { json, refused: Arc::default() }
    }

    /// Whether `--json` was asked for.
    pub fn is_json(&self) -> bool {
        self.json
    }

    /// Whether the reader of standard output has gone.
    pub fn is_closed(&self) -> bool {
        self.refused() == Some(ErrorKind::BrokenPipe)
    }

    /// Whether standard output took every line.
    pub fn is_whole(&self) -> bool {
        self.refused().is_none()
    }

    /// The error that ends a command whose output is incomplete. A reader that has gone asked for
    /// no more, so that is none.
    pub fn lost(&self) -> Option<Error> {
        self.refused().filter(|kind| *kind != ErrorKind::BrokenPipe).map(lost)
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
        retort_process::remark(text);
    }

    /// The same output, as JSON lines.
    pub fn as_json(&self) -> Self {
        Self { json: true, refused: self.refused.clone() }
    }

    fn refused(&self) -> Option<ErrorKind> {
        *self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, text: &str) {
        let mut out = std::io::stdout().lock();
        if let Err(error) = writeln!(out, "{}", text.trim_end_matches('\n')).and_then(|()| out.flush()) {
            self.refused.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error.kind());
        }
    }
}

/// What standard output refused for this reason is not where the user wanted it.
pub fn lost(kind: ErrorKind) -> Error {
    let code = match kind {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Code::DiskFull,
        _ => Code::FileUnreadable,
    };
    Error::new(code, format!("the output is incomplete: standard output could not be written ({kind})"))
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
