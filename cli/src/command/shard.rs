//! `retort shard`: one module a subcommand.

mod show;

use clap::Subcommand;
use retort_core::Result;

use super::Context;
use crate::outcome::Outcome;

/// Looks into soft-target files
#[derive(Debug, Subcommand)]
pub enum Shard {
    Show(show::Show),
}

impl Shard {
    pub async fn run(self, context: &Context) -> Result<Outcome> {
        match self {
            Self::Show(show) => show.run(context).await,
        }
    }
}
