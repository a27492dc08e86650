use clap::{Args, ValueEnum};
use retort_core::Result;
use retort_proto as proto;
use serde_json::json;

use crate::{
    command::{Connection, Context},
    json,
    outcome::Outcome,
    text::{clean, table},
};

/// Lists jobs, newest first
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  retort job list
  retort job list --state running
  retort job list --limit 500 --json | jq -r '.jobs[].name'")]
pub struct List {
    /// Only jobs in this state
    #[arg(long)]
    state: Option<State>,
    /// At most this many
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    limit: u32,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum State {
    Queued,
    Running,
    Succeeded,
    Rejected,
    Failed,
    Cancelled,
}

impl List {
    pub async fn run(self, context: &Context) -> Result<Outcome> {
        let state = self.state.map(|state| match state {
            State::Queued => proto::JobState::Queued,
            State::Running => proto::JobState::Running,
            State::Succeeded => proto::JobState::Succeeded,
            State::Rejected => proto::JobState::Rejected,
            State::Failed => proto::JobState::Failed,
            State::Cancelled => proto::JobState::Cancelled,
        });
        let jobs = self.connection.connect().await?.list_jobs(state, self.limit as usize).await?;
        context.output.json(&json!({ "jobs": jobs.iter().map(json::job).collect::<Vec<_>>() }));
        context.output.text(&if jobs.is_empty() { "no jobs".to_owned() } else { render(&jobs) });
        Ok(Outcome::Done)
    }
}

fn render(jobs: &[proto::Job]) -> String {
    let mut rows = vec![["JOB", "NAME", "STATE", "SHARDS", "STEPS", "KL", "CREATED"].map(str::to_owned).to_vec()];
    rows.extend(jobs.iter().map(|job| {
        let progress = job.progress.unwrap_or_default();
        let kl =
            job.report.as_ref().and_then(|report| report.after.as_ref()).map(|after| after.kl).or(progress.held_out_kl);
        vec![
            clean(&job.name),
            job.spec.as_ref().map_or_else(String::new, |spec| clean(&spec.name)),
            json::state(job.state).to_owned(),
            format!("{}/{}", progress.shards_published, progress.shards_total),
            format!("{}/{}", progress.step, progress.steps_total),
            kl.map_or_else(|| "-".to_owned(), |kl| format!("{kl:.3}")),
            job.create_time.as_ref().map_or_else(String::new, time),
        ]
    }));
    table(&rows, &[3, 4, 5])
}

/// To the second, UTC.
pub fn time(time: &prost_types::Timestamp) -> String {
    let text = prost_types::Timestamp { nanos: 0, ..*time }.to_string();
    text.replace('T', " ")
}
