use std::path::PathBuf;

use clap::Args;
use retort_core::{Code, Error, Result, wire::job_spec_to_proto};

use crate::{
    command::{Connection, Context},
    job_plan, json,
    outcome::Outcome,
    spec_file,
};

/// Hands a job to the orchestrator
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  retort job create job.yaml
  retort job create job.yaml --validate-only      check it, print the plan, create nothing
  retort job create job.yaml --request-id 5f0c2ad4-30b4-4c0e-9d4e-8c4c1b1b0e7f   safe to repeat")]
pub struct Create {
    /// The spec, YAML; paths in it are relative to its folder
    spec: PathBuf,
    /// Validate and plan, and create nothing
    #[arg(long)]
    validate_only: bool,
    /// A UUID; the same one again returns the job of the first call
    #[arg(long, value_name = "UUID")]
    request_id: Option<String>,
    #[command(flatten)]
    connection: Connection,
}

impl Create {
    pub async fn run(self, context: &Context) -> Result<Outcome> {
        let request_id = match &self.request_id {
            Some(text) => uuid::Uuid::parse_str(text).map_err(|error| {
                Error::new(Code::RequestInvalid, format!("--request-id {text:?} is no UUID: {error}"))
            })?,
            None => uuid::Uuid::new_v4(),
        };
        let spec = spec_file::read(&self.spec)?;
        let mut client = self.connection.connect().await?;
        let job = client.create_job(job_spec_to_proto(&spec), &request_id.to_string(), self.validate_only).await?;
        context.output.json(&json::job(&job));
        if self.validate_only {
            context.output.text("the spec is valid");
        } else {
            context.output.text(&job.name);
        }
        if let Some(plan) = &job.plan {
            context.output.text(&job_plan::render(plan));
        }
        if !self.validate_only {
            context.output.text(&format!("follow it with `retort job watch {}`", job.name));
        }
        Ok(Outcome::Done)
    }
}
