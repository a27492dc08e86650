//! How a command ended, as an exit code.

use std::process::ExitCode;

use retort_core::{Code, Error};
use retort_process::{EXIT_REJECTED, exit_with};
use retort_proto as proto;

use crate::output::Output;

/// A job that failed: the command itself did what it was asked.
const EXIT_FAILED: u8 = 4;
/// Stopped by a signal, or the job was cancelled.
pub const EXIT_INTERRUPTED: u8 = 130;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Done,
    /// The job ended with a gate that failed.
    Rejected,
    /// The job ended FAILED.
    Failed,
    /// The job was cancelled, or the user stopped the command.
    Interrupted,
}

impl Outcome {
    /// What a job's final state means for the caller of `run` and `watch`.
    pub fn of_job(job: &proto::Job) -> Self {
        match job.state() {
            proto::JobState::Rejected => Self::Rejected,
            proto::JobState::Failed => Self::Failed,
            proto::JobState::Cancelled => Self::Interrupted,
            _ => Self::Done,
        }
    }

    pub fn exit_code(self) -> ExitCode {
        match self {
            Self::Done => ExitCode::SUCCESS,
            Self::Rejected => ExitCode::from(EXIT_REJECTED),
            Self::Failed => ExitCode::from(EXIT_FAILED),
            Self::Interrupted => ExitCode::from(EXIT_INTERRUPTED),
        }
    }
}

/// The outcome of a finished job; why it did not succeed goes to standard error.
pub fn conclude(output: &Output, job: &proto::Job) -> Outcome {
    if let Some(error) = &job.error {
        output.remark(&crate::text::clean(&format!("error[{}]: {}", error.code, error.message)));
    }
    Outcome::of_job(job)
}

/// Says an error the way every retort process does, and in JSON too when JSON is what is read.
pub fn fail(output: &Output, error: &Error) -> ExitCode {
    output.json(&crate::json::error(error.code.as_str(), &error.chain()));
    match error.code {
        // Named by the user and not there: input to mend, like any other bad input.
        Code::FileNotFound => {
            exit_with(error);
            ExitCode::from(2)
        }
        _ => exit_with(error),
    }
}
