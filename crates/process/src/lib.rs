//! What every retort process does alike: logs to standard error, two-step signals, the line that
//! says it is ready, exit codes, how memory is kept, and what gives way to other work.

mod background;
mod exit;
mod logging;
mod memory;
mod ready;
mod shutdown;
mod stderr;

pub use background::in_background;
pub use exit::{EXIT_REJECTED, exit_with};
pub use logging::{LogArgs, LogFormat};
pub use memory::{keep_freed_memory, return_freed_memory};
pub use ready::Ready;
pub use shutdown::{die_with_parent, on_signals};
pub use stderr::{LossyStderr, escaped, remark, reorders};
