use std::io::{BufRead as _, IsTerminal as _, Write as _};

use clap::Args;
use retort_core::{Code, Error, Result};
use serde_json::json;

use crate::{
    command::{Connection, Context},
    outcome::Outcome,
};

/// Removes a finished job, its rows and its objects; promoted models stay
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  retort job delete jobs/0198c1d2e3f4a5b6c7d8e9f0a1b2c3d4
  retort job delete 0198c1d2e3f4a5b6c7d8e9f0a1b2c3d4 --yes      ask nothing")]
pub struct Delete {
    /// jobs/ID, or the ID alone
    job: String,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
    #[command(flatten)]
    connection: Connection,
}

impl Delete {
    pub async fn run(self, context: &Context) -> Result<Outcome> {
        let name = super::resource_name(&self.job)?;
        let mut client = self.connection.connect().await?;
        let job = client.get_job(&name).await?;
        if !self.yes {
            let spec = job.spec.as_ref().map_or("", |spec| spec.name.as_str());
            if !confirm(&format!("delete {name} ({spec}), its soft targets and its checkpoints?")).await? {
                context.output.text("nothing was deleted");
                return Ok(Outcome::Interrupted);
            }
        }
        client.delete_job(&name).await?;
        context.output.json(&json!({ "deleted": name }));
        context.output.text(&format!("{name} is deleted"));
        Ok(Outcome::Done)
    }
}

/// Asks on the terminal; off one the answer must be given beforehand.
async fn confirm(question: &str) -> Result<bool> {
    if !std::io::stdin().is_terminal() {
        return Err(Error::new(
            Code::RequestInvalid,
            format!("{question} standard input is no terminal to ask on; say --yes"),
        ));
    }
    let question = crate::text::clean(question);
    let ask = move || -> std::io::Result<bool> {
        let mut screen = std::io::stderr().lock();
        write!(screen, "{question} [y/N] ")?;
        screen.flush()?;
        let mut answer = String::new();
        std::io::stdin().lock().read_line(&mut answer)?;
        Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
    };
    match tokio::task::spawn_blocking(ask).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(Error::internal(format!("cannot ask: {error}"))),
        Err(error) => Err(Error::internal(format!("cannot ask: {error}"))),
    }
}
