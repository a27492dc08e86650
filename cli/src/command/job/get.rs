use clap::Args;
use retort_core::Result;

use crate::{
    command::{Connection, Context},
    job_plan, json,
    outcome::Outcome,
    output, report,
    text::{duration, rate, table},
};

/// Shows a job: its state, its plan, its progress, its report
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  retort job get jobs/0198c1d2e3f4a5b6c7d8e9f0a1b2c3d4
  retort job get 0198c1d2e3f4a5b6c7d8e9f0a1b2c3d4 --json | jq .report.after")]
pub struct Get {
    /// jobs/ID, or the ID alone
    job: String,
    #[command(flatten)]
    connection: Connection,
}

impl Get {
    pub async fn run(self, context: &Context) -> Result<Outcome> {
        let name = super::resource_name(&self.job)?;
        let job = self.connection.connect().await?.get_job(&name).await?;
        context.output.json(&json::job(&job));
        let around =
            report::Surroundings { width: output::width(), store: self.connection.local_store(), export: None };
        context.output.text(&report::render(&job, &around));
        if job.report.is_none() {
            if let Some(plan) = &job.plan {
                context.output.text(&job_plan::render(plan));
            }
            if let Some(progress) = &job.progress {
                context.output.text(&render_progress(progress));
            }
        }
        Ok(Outcome::Done)
    }
}

fn render_progress(progress: &retort_proto::Progress) -> String {
    let of = |done: u32, total: u32| format!("{done} of {total}");
    let mut rows = vec![
        (
            "published",
            format!(
                "{} shards, {} tokens/s",
                of(progress.shards_published, progress.shards_total),
                rate(progress.teacher_tokens_per_second)
            ),
        ),
        (
            "trained",
            format!(
                "{} steps, {} tokens/s",
                of(progress.step, progress.steps_total),
                rate(progress.student_tokens_per_second)
            ),
        ),
    ];
    if progress.step > 0 {
        rows.push(("loss", format!("{:.4}", progress.train_loss)));
    }
    if let Some(kl) = progress.held_out_kl {
        rows.push(("held-out KL", format!("{kl:.4}")));
    }
    rows.push(("redone", format!("{} attempts", progress.attempts_redone)));
    // How far an evaluation is, nobody says.
    if let Some(eta) = progress.eta.as_ref().filter(|_| progress.step < progress.steps_total) {
        rows.push(("left", duration(eta.seconds as f64)));
    }
    let rows: Vec<Vec<String>> = rows.into_iter().map(|(name, value)| vec![format!("  {name}"), value]).collect();
    table(&rows, &[])
}
