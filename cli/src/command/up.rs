use std::path::Path;

use clap::Args;
use retort_core::Result;
use serde_json::json;

use super::{Context, HomeArg};
use crate::{
    cluster::{Cluster, ClusterArgs, Purpose},
    home::Running,
    json,
    outcome::Outcome,
    signals::Signals,
};

/// Starts a whole retort on this machine and keeps it up
///
/// Broker, orchestrator, teachers and students run as processes of their own; what dies is
/// restarted. The first Ctrl-C stops all in good order, the second at once.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  retort up
  retort up --home /data/retort --teachers 2
  retort up --listen 127.0.0.1:0 --broker-listen 127.0.0.1:0     take free ports
  retort up --no-broker --brokers kafka-1:9092,kafka-2:9092      use your own Kafka

Logs are in HOME/logs, one file a process; the previous run's are kept as .log.1.")]
pub struct Up {
    #[command(flatten)]
    home: HomeArg,
    /// Where the orchestrator listens
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:7474")]
    listen: String,
    /// Where the broker listens
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:9092", conflicts_with = "no_broker")]
    broker_listen: String,
    /// Pool that the workers serve
    #[arg(long, value_name = "POOL", default_value = "default")]
    pool: String,
    #[command(flatten)]
    cluster: ClusterArgs,
}

impl Up {
    pub async fn run(self, context: &Context) -> Result<Outcome> {
        let output = &context.output;
        let home = self.home.resolve()?;
        let signals = Signals::listen()?;
        let purpose = Purpose {
            command: "up",
            listen: self.listen,
            broker_listen: self.broker_listen,
            teacher_pool: self.pool.clone(),
            student_pool: self.pool,
            one_job: false,
            log: context.log.clone(),
        };
        let Some(mut cluster) = Cluster::start(&home, &self.cluster, &purpose, &signals).await? else {
            return Ok(Outcome::Interrupted);
        };
        let running = cluster.running();
        output.json(&json!({ "type": "up", "home": home.path(), "running": running }));
        output.text(&banner(home.path(), running));
        loop {
            tokio::select! {
                notice = cluster.notice() => {
                    output.json(&json::notice(&notice.text()));
                    output.text(&notice.text());
                }
                () = signals.stop.cancelled() => break,
            }
        }
        output.text("stopping; once more to stop at once");
        cluster.stop().await;
        output.json(&json!({ "type": "stopped" }));
        output.text("stopped");
        Ok(Outcome::Done)
    }
}

fn banner(home: &Path, running: &Running) -> String {
    let rows = [
        ("orchestrator", running.address.clone()),
        ("brokers", running.brokers.clone()),
        ("store", running.store.clone()),
        ("processes", running.processes.keys().cloned().collect::<Vec<_>>().join(", ")),
        ("logs", home.join("logs").display().to_string()),
    ];
    let rows: Vec<Vec<String>> = rows.into_iter().map(|(name, value)| vec![format!("  {name}"), value]).collect();
    format!("retort is up in {}\n{}Ctrl-C stops it", home.display(), crate::text::table(&rows, &[]))
}
