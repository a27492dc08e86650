//! `retort job`: one module a subcommand.

mod cancel;
mod create;
mod delete;
mod get;
mod list;
mod watch;

use clap::Subcommand;
use retort_core::{Result, id::JobId};

use super::Context;
use crate::outcome::Outcome;

/// Creates, follows and removes jobs
#[derive(Debug, Subcommand)]
pub enum Job {
    Create(create::Create),
    Get(get::Get),
    List(list::List),
    Watch(watch::Watch),
    Cancel(cancel::Cancel),
    Delete(delete::Delete),
}

impl Job {
    pub async fn run(self, context: &Context) -> Result<Outcome> {
        match self {
            Self::Create(create) => create.run(context).await,
            Self::Get(get) => get.run(context).await,
            Self::List(list) => list.run(context).await,
            Self::Watch(watch) => watch.run(context).await,
            Self::Cancel(cancel) => cancel.run(context).await,
            Self::Delete(delete) => delete.run(context).await,
        }
    }
}

/// `jobs/{job}` of what the user typed: that, or the bare id.
fn resource_name(text: &str) -> Result<String> {
    Ok(JobId::from_resource_name(text)?.resource_name())
}
