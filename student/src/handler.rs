//! Which attempt does what.

use async_trait::async_trait;
use retort_core::{Error, Result};
use retort_proto::claimed::Task;
use retort_worker::{Attempt, Handler, Rest, TaskContext};

use crate::{evaluate, parallel, settings::Settings, train};

/// Trains and evaluates.
#[derive(Debug)]
pub struct Student {
    settings: Settings,
}

impl Student {
    pub fn new(settings: Settings) -> Self {
        Self { settings }
    }
}

#[async_trait]
impl Handler for Student {
    async fn run(&mut self, attempt: Attempt, cx: &TaskContext) -> Result<Rest> {
        let done = match &attempt.work {
            Task::Train(task) => train::run(&attempt, task, cx, &self.settings).await,
            Task::Evaluate(task) => evaluate::run(&attempt, task, cx, &self.settings).await,
            Task::Replica(task) => parallel::replica(&attempt, task, cx, &self.settings).await,
            Task::Shard(_) => {
                Err(Error::internal(format!("{} is a teacher's task, on a student's topic", attempt.task)))
            }
        };
        // The next training may be hours away, and of a smaller student.
        retort_process::return_freed_memory();
        done.map(|()| Rest::Nothing)
    }
}
