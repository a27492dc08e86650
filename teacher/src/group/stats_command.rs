//! `retort-teacher stats`: what the stages of a running group have been doing.

use std::io::Write as _;

use retort_core::{Code, Error, Result};
use retort_proto as proto;
use serde_json::json;

use super::{
    dial::{dial, refusal},
    place::Place,
    stats::busy_share,
};

/// Flags of the command.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  retort-teacher stats --peer 127.0.0.1:7475
  retort-teacher stats --peer 10.0.0.1:7475 --tls-ca ca.pem --tls-cert me.pem --tls-key me.key --json")]
pub struct StatsArgs {
    /// Where a stage listens; stage 0 answers for all stages, another for itself
    #[arg(long, value_name = "HOST:PORT")]
    peer: String,
    /// One JSON object instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    tls: super::TlsArgs,
}

/// Asks the stage, and prints its answer on standard output.
pub async fn show_stats(args: &StatsArgs) -> Result<()> {
    let place = Place::asking(&args.peer, args.tls.read()?)?;
    let mut client = dial(&place, 0).await?;
    let answer = client.get_group_stats(proto::GetGroupStatsRequest {}).await;
    let told = |status: tonic::Status| match status.code() {
        tonic::Code::Unimplemented => Error::new(
            Code::RequestInvalid,
            format!("what answers at {} is no stage of a teacher group; --peer is an address of --peers", args.peer),
        ),
        _ => refusal(&place, 0, &status),
    };
    let stats = answer.map_err(told)?.into_inner();
    let text = if args.json { format!("{}\n", as_json(&stats)) } else { table(&stats) };
    let written = std::io::stdout().lock().write_all(text.as_bytes());
    written.map_err(|error| Error::internal(format!("standard output: {error}")))
}

fn as_json(stats: &proto::GetGroupStatsResponse) -> serde_json::Value {
    let stage = |stage: &proto::StageStats| {
        json!({
            "stage": stage.stage,
            "address": stage.address,
            "layers": [stage.first_layer, stage.end_layer],
            "bytes_read": stage.bytes_read,
            "steps": stage.steps,
            "tokens": stage.tokens,
            "bytes_sent": stage.bytes_sent,
            "busy": busy_share(stage),
            "busy_seconds": stage.busy_seconds,
            "waiting_for_input_seconds": stage.waiting_for_input_seconds,
            "waiting_for_output_seconds": stage.waiting_for_output_seconds,
        })
    };
    json!({
        "group": stats.group,
        "incarnation": stats.incarnation.to_string(),
        "stages": stats.stages.iter().map(stage).collect::<Vec<_>>(),
    })
}

fn table(stats: &proto::GetGroupStatsResponse) -> String {
    let mut text = format!("group {}\n", stats.group);
    text += &format!(
        "{:>5}  {:<24} {:>9} {:>10} {:>8} {:>10} {:>6} {:>10} {:>11}\n",
        "stage", "address", "layers", "MiB read", "steps", "tokens", "busy", "input, s", "output, s"
    );
    for stage in &stats.stages {
        let layers = match stage.end_layer {
            0 => "-".to_owned(),
            end => format!("{}-{}", stage.first_layer, end - 1),
        };
        text += &format!(
            "{:>5}  {:<24} {:>9} {:>10.1} {:>8} {:>10} {:>5.1}% {:>10.1} {:>11.1}\n",
            stage.stage,
            stage.address,
            layers,
            stage.bytes_read as f64 / f64::from(1 << 20),
            stage.steps,
            stage.tokens,
            100.0 * busy_share(stage),
            stage.waiting_for_input_seconds,
            stage.waiting_for_output_seconds,
        );
    }
    text
}
