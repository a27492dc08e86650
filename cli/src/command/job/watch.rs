use std::io::IsTerminal as _;

use clap::Args;
use retort_core::{Code, Result};
use serde_json::json;

use crate::{
    command::{Connection, Context},
    follow::follow,
    json,
    outcome::{Outcome, conclude, echo_error},
    output,
    progress::{Mode, View},
    report,
    signals::Signals,
};

/// Follows a job to its end and prints its report
///
/// On a terminal: live bars. Elsewhere, or with --json: one JSON object a line,
/// {"type":"event","sequence":...,"state":...,"progress":{...},"event":{"kind":...}}, and at the end
/// {"type":"result","job":{...}} or {"type":"error","code":...,"message":...}, whose code is "interrupted" after a
/// Ctrl-C. A restart of the orchestrator does not end it.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  retort job watch jobs/0198c1d2e3f4a5b6c7d8e9f0a1b2c3d4
  retort job watch 0198c1d2e3f4a5b6c7d8e9f0a1b2c3d4 --plain      text lines, for a log

The exit code says how the job ended: 0 succeeded, 3 rejected, 4 failed, 130 cancelled.")]
pub struct Watch {
    /// jobs/ID, or the ID alone
    job: String,
    /// Text lines instead of bars or JSON
    #[arg(long, conflicts_with = "json")]
    plain: bool,
    #[command(flatten)]
    connection: Connection,
}

impl Watch {
    pub async fn run(self, context: &Context) -> Result<Outcome> {
        let name = super::resource_name(&self.job)?;
        let signals = Signals::listen()?;
        let mode = Mode::choose(context.output.is_json(), self.plain, std::io::stdout().is_terminal());
        let (mut view, output) = View::new(mode, &context.output);
        let client = echo_error(&context.output, &output, self.connection.connect().await)?;
        let closed = output.clone();
        let stop = async {
            // A reader that has gone ends the watch like Ctrl-C does.
            while !closed.is_closed() {
                tokio::select! {
                    () = signals.stop.cancelled() => return,
                    () = tokio::time::sleep(std::time::Duration::from_millis(500)) => {}
                }
            }
        };
        let followed = follow(client, &name, |update| view.update(update), stop).await;
        view.finish();
        let job = echo_error(&context.output, &output, followed)?;
        let Some(job) = job else {
            let farewell = format!("{name} goes on; `retort job cancel {name}` would stop it");
            context.output.remark(&farewell);
            output.json(&json::error(Code::Interrupted.as_str(), &farewell));
            return Ok(Outcome::Interrupted);
        };
        output.json(&json!({ "type": "result", "job": json::job(&job) }));
        let around =
            report::Surroundings { width: output::width(), store: self.connection.local_store(), export: None };
        output.text(&report::render(&job, &around));
        Ok(conclude(&output, &job))
    }
}
