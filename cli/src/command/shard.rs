//! `retort shard`: one module a subcommand.

mod diff;
mod export;
mod files;
mod show;
mod stats;
mod verify;

use clap::Subcommand;
use retort_core::Result;

use super::Context;
use crate::outcome::Outcome;

/// Looks into soft-target files
#[derive(Debug, Subcommand)]
pub enum Shard {
    Show(show::Show),
    Stats(stats::Stats),
    Verify(verify::Verify),
    Diff(diff::Diff),
    Export(export::Export),
}

impl Shard {
    pub async fn run(self, context: &Context) -> Result<Outcome> {
        match self {
            Self::Show(show) => show.run(context).await,
            Self::Stats(stats) => stats.run(context).await,
            Self::Verify(verify) => verify.run(context).await,
            Self::Diff(diff) => diff.run(context).await,
            Self::Export(export) => export.run(context).await,
        }
    }
}
