use std::io::Write as _;

use serde::{Deserialize, Serialize};

/// The one line a service prints on standard output, once it serves: JSON, so that a supervisor
/// learns the port when the service chose one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// `broker`, `orchestrator`, `teacher` or `student`.
    pub ready: String,
    /// `host:port`, for those that listen.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub listen: Option<String>,
}

impl Ready {
    pub fn announce(&self) {
        if let Ok(line) = serde_json::to_string(self) {
            let mut out = std::io::stdout().lock();
            // A supervisor that has gone does not stop the service.
            let _ = writeln!(out, "{line}").and_then(|()| out.flush());
        }
    }
}
