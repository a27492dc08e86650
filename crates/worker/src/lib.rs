//! The worker loop, the same for teachers and students: read a task from the bus, claim it, keep
//! its lease while a [`Handler`] works, report, and only then commit.
//!
//! What holds, whatever dies and when:
//!
//! - A record is committed after the event that settles its task was acknowledged by the broker.
//!   A worker killed before that is given the record again, and `ClaimTask` says whether anything
//!   is left to do.
//! - An attempt stops when it was fenced, when its job was cancelled, when this process was asked to
//!   stop, or when its lease must have run out by its own clock. An orchestrator that is away for
//!   less than a lease costs nothing: heartbeats go on asking.
//! - A fenced attempt emits nothing.
//!
//! A worker works on one task at a time; what is left of it once its model is free (encoding, upload, the
//! event) goes on while the next is worked on, and then it holds two. Models live on a [`ModelThread`]; nothing async blocks.

mod args;
mod attempt;
mod context;
mod kafka;
mod lease;
mod model_thread;
mod orchestrator;
pub mod peer;
pub mod ports;
mod retry;
mod run;
mod work_loop;

pub use args::WorkerArgs;
pub use attempt::Attempt;
pub use context::{Stop, StopSwitch, TaskContext};
pub use model_thread::ModelThread;
pub use run::{run, run_until, start};

use futures::future::BoxFuture;
use retort_core::{Error, Result};

/// What a worker does with a claimed task.
///
/// `run`, or the rest that it leaves, emits the task's result through [`TaskContext::emit`] before it
/// answers `Ok`. It watches
/// [`TaskContext::cancelled`] and returns soon after it fires; whatever it then answers is not
/// reported. An `Err` is reported as `TaskFailed`, retryable as [`retort_core::Error::is_retryable`]
/// says.
#[async_trait::async_trait]
pub trait Handler: Send {
    async fn run(&mut self, attempt: Attempt, cx: &TaskContext) -> Result<Rest>;

    /// Waits until the handler can take no more work, and says why; most always can. The worker then
    /// ends with this error, after the task it holds.
    async fn defunct(&mut self) -> Error {
        std::future::pending().await
    }
}

/// What of a task is still to be done when its handler can take the next one.
pub enum Rest {
    Nothing,
    /// Runs beside the next task, on the async threads: what computes for long goes elsewhere.
    After(BoxFuture<'static, Result<()>>),
}

#[cfg(test)]
mod tests;
