use clap::Args;
use retort_core::Result;

use crate::{
    command::{Connection, Context},
    json,
    outcome::Outcome,
};

/// Stops a job for good
///
/// Running attempts stop at their next heartbeat. Cancelling a job twice is no error.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  retort job cancel jobs/0198c1d2e3f4a5b6c7d8e9f0a1b2c3d4")]
pub struct Cancel {
    /// jobs/ID, or the ID alone
    job: String,
    #[command(flatten)]
    connection: Connection,
}

impl Cancel {
    pub async fn run(self, context: &Context) -> Result<Outcome> {
        let name = super::resource_name(&self.job)?;
        let job = self.connection.connect().await?.cancel_job(&name).await?;
        context.output.json(&json::job(&job));
        context.output.text(&format!("{name} is {}", json::state(job.state)));
        Ok(Outcome::Done)
    }
}
