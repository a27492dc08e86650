use clap::Args;
use retort_core::Result;
use retort_proto as proto;
use serde_json::json;

use crate::{
    command::{Connection, Context},
    json,
    outcome::Outcome,
    text::{clean, table},
};

/// Lists promoted models
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  retort model list
  retort model list --json | jq -r '.models[].name'")]
pub struct List {
    /// At most this many
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    limit: u32,
    #[command(flatten)]
    connection: Connection,
}

impl List {
    pub async fn run(self, context: &Context) -> Result<Outcome> {
        let models = self.connection.connect().await?.list_models(self.limit as usize).await?;
        context.output.json(&json!({ "models": models.iter().map(json::model).collect::<Vec<_>>() }));
        context.output.text(&if models.is_empty() { "no models are promoted".to_owned() } else { render(&models) });
        Ok(Outcome::Done)
    }
}

fn render(models: &[proto::Model]) -> String {
    let mut rows = vec![["MODEL", "KL", "TOP-1", "JOB", "PROMOTED"].map(str::to_owned).to_vec()];
    rows.extend(models.iter().map(|model| {
        let name = model.name.strip_prefix("models/").unwrap_or(&model.name).replace("/versions/", "@");
        let quality = model.quality.unwrap_or_default();
        let time = model.create_time.as_ref().map_or_else(String::new, |time| {
            prost_types::Timestamp { nanos: 0, ..*time }.to_string().replace('T', " ")
        });
        vec![
            clean(&name),
            format!("{:.3}", quality.kl),
            format!("{:.1} %", 100.0 * quality.top1_agreement),
            clean(&model.job),
            time,
        ]
    }));
    table(&rows, &[1, 2])
}
