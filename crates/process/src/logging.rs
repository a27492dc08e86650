use std::io::IsTerminal as _;

use clap::{Args, ValueEnum};
use tracing_subscriber::EnvFilter;

use crate::{LossyStderr, remark};

/// Flags of every process that logs.
#[derive(Clone, Debug, Args)]
pub struct LogArgs {
    /// What to log, in tracing's filter syntax
    #[arg(long, env = "RETORT_LOG", default_value = "info", global = true, value_name = "FILTER")]
    pub log: String,
    /// How to log
    #[arg(long, env = "RETORT_LOG_FORMAT", default_value = "text", global = true)]
    pub log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

impl LogArgs {
    /// Logs to standard error from here on. A filter that does not parse is replaced by `info`.
    pub fn init(&self) {
        let filter = EnvFilter::try_new(&self.log).unwrap_or_else(|error| {
            remark(format_args!("warning: --log {:?}: {error}; logging at info", self.log));
            EnvFilter::new("info")
        });
        let builder = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(|| LossyStderr)
            .log_internal_errors(false)
            .with_ansi(std::io::stderr().is_terminal());
        let started = match self.log_format {
            LogFormat::Text => builder.try_init(),
            LogFormat::Json => builder.json().try_init(),
        };
        if let Err(error) = started {
            remark(format_args!("warning: logging was set up before: {error}"));
        }
    }
}
