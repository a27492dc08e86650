//! What every retort process does alike: logs to standard error, two-step signals, the line that
//! says it is ready, exit codes, and how memory is kept.

mod exit;
mod logging;
mod memory;
mod ready;
mod shutdown;
mod stderr;

pub use exit::{EXIT_REJECTED, exit_with};
pub use logging::{LogArgs, LogFormat};
pub use memory::{keep_freed_memory, return_freed_memory};
pub use ready::Ready;
pub use shutdown::{die_with_parent, on_signals};
pub use stderr::{LossyStderr, escaped, remark, reorders};
