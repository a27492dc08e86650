//! How a command ended, as an exit code.

use std::{
    io::{ErrorKind, Write as _},
    process::ExitCode,
};

use retort_core::{Code, Error, Result};
use retort_process::{EXIT_REJECTED, exit_with};
use retort_proto as proto;

use crate::output::{Output, lost};

/// A job that failed: the command itself did what it was asked.
const EXIT_FAILED: u8 = 4;
/// What was compared differs, as `diff` and `cmp` say it.
const EXIT_DIFFERENT: u8 = 1;
/// What was to be compared could not be, as `diff` and `cmp` say it.
const EXIT_NOT_COMPARED: u8 = 2;
/// Stopped by a signal, or the job was cancelled.
pub const EXIT_INTERRUPTED: u8 = 130;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Done,
    /// The job ended with a gate that failed.
    Rejected,
    /// The job ended FAILED.
    Failed,
    /// What was compared is not the same.
    Different,
    /// What was to be compared could not be, and why has been said.
    NotCompared,
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
            Self::Different => ExitCode::from(EXIT_DIFFERENT),
            Self::NotCompared => ExitCode::from(EXIT_NOT_COMPARED),
            Self::Interrupted => ExitCode::from(EXIT_INTERRUPTED),
        }
    }
}

/// The outcome of a finished job; why it did not succeed goes to standard error.
pub fn conclude(output: &Output, job: &proto::Job) -> Outcome {
    if let Some(error) = &job.error {
        output.remark(&format!("error[{}]: {}", error.code, error.message));
    }
    Outcome::of_job(job)
}

/// For commands that print JSON lines off a terminal without having been asked: the error that ends
/// them is a JSON line as well. Where `--json` was said, [`fail`] prints it.
pub fn echo_error<T>(asked: &Output, used: &Output, result: Result<T>) -> Result<T> {
    if let (Err(error), false) = (&result, asked.is_json()) {
        used.json(&crate::json::error(error.code.as_str(), &error.chain()));
    }
    result
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

/// Ends a command that did its work but could not say all of it.
pub fn incomplete(error: &Error) -> ExitCode {
    exit_with(error);
    ExitCode::FAILURE
}

/// Prints what the command line's parser answers: help on standard output, or what is wrong.
pub fn say(message: &clap::Error) -> ExitCode {
    match message.print().and_then(|()| std::io::stdout().flush()) {
        Err(error) if !message.use_stderr() && error.kind() != ErrorKind::BrokenPipe => incomplete(&lost(error.kind())),
        _ => ExitCode::from(u8::try_from(message.exit_code()).unwrap_or(2)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jobs_state_is_the_exit_code() {
        let code = |state: proto::JobState| {
            Outcome::of_job(&proto::Job { state: state as i32, ..Default::default() }).exit_code()
        };
        assert_eq!(code(proto::JobState::Succeeded), ExitCode::SUCCESS);
        assert_eq!(code(proto::JobState::Rejected), ExitCode::from(3));
        assert_eq!(code(proto::JobState::Failed), ExitCode::from(4));
        assert_eq!(code(proto::JobState::Cancelled), ExitCode::from(130));
    }

    #[test]
    fn bad_input_is_two_and_the_rest_is_one() {
        let code = |code: Code| fail(&Output::new(false), &Error::new(code, "a test's error"));
        assert_eq!(code(Code::SpecUnknownKey), ExitCode::from(2));
        assert_eq!(code(Code::FileNotFound), ExitCode::from(2));
        assert_eq!(code(Code::JobCancelled), ExitCode::from(130));
        assert_eq!(code(Code::PortInUse), ExitCode::FAILURE);
    }
}
