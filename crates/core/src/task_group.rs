//! Background tasks that nobody forgets: each is started with a name, and what its error and its
//! panic mean is the same for all of a group: the group is cancelled and the first error returned.

use std::future::Future;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::{Error, Result};

/// A set of tasks that live and die together.
#[derive(Debug)]
pub struct TaskGroup {
    tasks: JoinSet<(&'static str, Result<()>)>,
    shutdown: CancellationToken,
}

impl TaskGroup {
    /// Tasks are asked to stop through `shutdown`; the first that fails cancels it.
    pub fn new(shutdown: CancellationToken) -> Self {
        Self { tasks: JoinSet::new(), shutdown }
    }

    pub fn shutdown(&self) -> &CancellationToken {
        &self.shutdown
    }

    pub fn spawn(&mut self, name: &'static str, task: impl Future<Output = Result<()>> + Send + 'static) {
        self.tasks.spawn(async move { (name, task.await) });
    }

    /// Waits for every task. The first error or panic cancels the rest and is returned when all
    /// have stopped.
    pub async fn join(mut self) -> Result<()> {
        let mut first = Ok(());
        while let Some(joined) = self.tasks.join_next().await {
            let outcome = match joined {
                Ok((_, Ok(()))) => Ok(()),
                Ok((name, Err(error))) => {
                    tracing::error!(task = name, code = %error.code, "{}", error.chain());
                    Err(error)
                }
                Err(join) if join.is_cancelled() => Ok(()),
                Err(join) => Err(Error::internal(format!("a task panicked: {join}"))),
            };
            if outcome.is_err() {
                self.shutdown.cancel();
                if first.is_ok() {
                    first = outcome;
                }
            }
        }
        first
    }
}
