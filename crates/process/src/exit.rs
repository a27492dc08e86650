use std::process::ExitCode;

use retort_core::{Error, Kind};

use crate::remark;

/// A job whose gates failed: everything ran, nothing was promoted.
pub const EXIT_REJECTED: u8 = 3;

/// Prints an error the way every retort process does and chooses the exit code: 2 for input that
/// must be mended, 130 for a cancelled call, 1 for everything else.
pub fn exit_with(error: &Error) -> ExitCode {
    remark(format_args!("error[{}]: {}", error.code, error.chain()));
    match error.kind() {
        Kind::Invalid => ExitCode::from(2),
        Kind::Cancelled => ExitCode::from(130),
        _ => ExitCode::FAILURE,
    }
}
