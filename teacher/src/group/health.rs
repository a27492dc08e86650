//! Whether a group still holds: the first thing that was seen to be wrong, told to all who wait.

use std::{
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use retort_core::{Code, Error};
use tokio_util::sync::CancellationToken;

/// How long a reason may lag behind what it closes: longer than silence takes to be noticed.
const TOLD_WITHIN: Duration = Duration::from_secs(10);

/// Shared by everything that belongs to one life of a group at one stage.
#[derive(Clone, Debug, Default)]
pub(super) struct Health {
    broken: CancellationToken,
    why: Arc<OnceLock<(Code, String)>>,
}

impl Health {
    /// The first reason stays.
    pub(super) fn break_with(&self, error: &Error) {
        if self.why.set((error.code, error.chain())).is_ok() {
            tracing::error!(code = %error.code, "the group is broken: {}", error.chain());
        }
        self.broken.cancel();
    }

    /// As [`Health::break_with`], for an end that is no fault.
    pub(super) fn break_quietly(&self, why: &Error) {
        let _ = self.why.set((why.code, why.chain()));
        self.broken.cancel();
    }

    /// Why the group is broken, if it is.
    pub(super) fn error(&self) -> Option<Error> {
        self.why.get().map(|(code, message)| Error::new(*code, message.clone()))
    }

    /// As [`Health::error`], for one who knows that it must be broken.
    pub(super) fn why(&self) -> Error {
        self.error().unwrap_or_else(|| Error::new(Code::GroupBroken, "the group has come to its end"))
    }

    /// As [`Health::why`], on a thread that has seen a channel of the group close: that may be before the
    /// one who closed it has said why.
    pub(super) fn why_closed(&self) -> Error {
        let deadline = Instant::now() + TOLD_WITHIN;
        while self.error().is_none() && Instant::now() < deadline {
            std::thread::park_timeout(Duration::from_millis(10));
        }
        self.why()
    }

    /// Waits until the group is broken.
    pub(super) async fn broken(&self) -> Error {
        self.broken.cancelled().await;
        self.why()
    }
}
