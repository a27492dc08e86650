//! `retort model`: one module a subcommand.

mod chat;
mod export;
mod import;
mod list;

use clap::Subcommand;
use retort_core::Result;

use super::Context;
use crate::outcome::Outcome;

/// Imports teachers; lists, exports and tries promoted models
#[derive(Debug, Subcommand)]
pub enum Model {
    Import(import::Import),
    List(list::List),
    Export(export::Export),
    Chat(chat::Chat),
}

impl Model {
    pub async fn run(self, context: &Context) -> Result<Outcome> {
        match self {
            Self::Import(import) => import.run(context).await,
            Self::List(list) => list.run(context).await,
            Self::Export(export) => export.run(context).await,
            Self::Chat(chat) => chat.run(context).await,
        }
    }
}
