use clap::Args;
use retort_core::{Code, Result};
use retort_proto as proto;
use serde_json::json;

use crate::{
    command::{Connection, Context},
    home::{absolute_store, local_folder, open_store},
    json,
    outcome::Outcome,
    promoted,
    text::{clean, table},
};

/// Lists promoted models
///
/// Asks the orchestrator; where none is up, the home's object store is read.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  retort model list
  retort model list --json | jq -r '.models[].name'")]
pub struct List {
    /// At most this many
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    limit: u32,
    /// Read this object store instead: a folder or a URL
    #[arg(long, value_name = "URL")]
    store: Option<String>,
    #[command(flatten)]
    connection: Connection,
}

impl List {
    pub async fn run(self, context: &Context) -> Result<Outcome> {
        let models = self.models(self.limit as usize).await?;
        context.output.json(&json!({ "models": models.iter().map(json::model).collect::<Vec<_>>() }));
        context.output.text(&if models.is_empty() { "no models are promoted".to_owned() } else { render(&models) });
        Ok(Outcome::Done)
    }

    async fn models(&self, limit: usize) -> Result<Vec<proto::Model>> {
        if let Some(store) = &self.store {
            return promoted::list(&open_store(&absolute_store(store)?)?, limit).await;
        }
        match self.ask(limit).await {
            Err(error) if error.code == Code::OrchestratorUnavailable && self.connection.address.is_none() => {
                let location = self.connection.home.resolve()?.store_or(None)?;
                match local_folder(&location).filter(|folder| folder.is_dir()) {
                    Some(_) => promoted::list(&open_store(&location)?, limit).await,
                    None => Err(error),
                }
            }
            asked => asked,
        }
    }

    async fn ask(&self, limit: usize) -> Result<Vec<proto::Model>> {
        self.connection.connect().await?.list_models(limit).await
    }
}

fn render(models: &[proto::Model]) -> String {
    let mut rows = vec![["MODEL", "KL", "TOP-1", "JOB", "PROMOTED"].map(str::to_owned).to_vec()];
    rows.extend(models.iter().map(|model| {
        let name = model.name.strip_prefix("models/").unwrap_or(&model.name).replace("/versions/", "@");
        let time = model.create_time.as_ref().map_or_else(String::new, |time| {
            prost_types::Timestamp { nanos: 0, ..*time }.to_string().replace('T', " ")
        });
        vec![
            clean(&name),
            model.quality.map_or_else(unknown, |quality| format!("{:.3}", quality.kl)),
            model.quality.map_or_else(unknown, |quality| format!("{:.1} %", 100.0 * quality.top1_agreement)),
            clean(&model.job),
            time,
        ]
    }));
    table(&rows, &[1, 2])
}

fn unknown() -> String {
    "-".to_owned()
}
