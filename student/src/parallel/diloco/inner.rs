//! A worker's own steps between two exchanges.

use std::time::{Duration, Instant};

use retort_core::Result;
use retort_proto::worker_event::What;
use retort_worker::{ModelThread, TaskContext};

use super::exchange::Delivery;
use crate::{
    data::TrainingData,
    settings::Threads,
    train::no_trainer,
    trainer::{StepReport, Trainer},
};

/// Where in the whole run the steps lie.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Of the first.
    pub step: u32,
    /// Between two: others take as many at the same time.
    pub stride: u32,
    pub steps: u32,
    /// Steps of the first pass, while which the teacher may still be working.
    pub first_pass: u64,
}

impl Pace {
    fn at(&self, i: usize) -> u32 {
        let offset = u32::try_from(i).unwrap_or(u32::MAX).saturating_mul(self.stride);
        self.step.saturating_add(offset).min(self.steps.saturating_sub(1))
    }
}

/// Trains `batches` one after another, the next one's rows read beside it; what `told` says of each step is sent. What
/// they came to, and the time it took.
pub async fn train(
    thread: &ModelThread<Option<Trainer>>,
    data: &mut TrainingData,
    cx: &TaskContext,
    threads: Threads,
    batches: &[u32],
    pace: Pace,
    told: impl Fn(&StepReport) -> Option<What>,
) -> Result<(Delivery, Duration)> {
    let started = Instant::now();
    let mut sum = Delivery::default();
    let mut rows = match batches.first() {
        Some(&first) => data.rows_of(first).await?,
        None => Vec::new(),
    };
    for i in 0..batches.len() {
        let (examples, at, checked) = (std::mem::take(&mut rows), pace.at(i), cx.clone());
        let teacher_done = u64::from(at) >= pace.first_pass;
        let step = thread.call(move |slot| -> Result<(StepReport, u64)> {
            threads.enter(teacher_done);
            let trainer = slot.as_mut().ok_or_else(no_trainer)?;
            let targets = examples.iter().map(|example| example.targets.len() as u64).sum();
            trainer.progress.step = at;
            Ok((trainer.step(&examples, &|| checked.check())?, targets))
        });
        let next = async {
            match batches.get(i + 1) {
                Some(&next) => data.rows_of(next).await,
                None => Ok(Vec::new()),
            }
        };
        let (stepped, next) = tokio::join!(step, next);
        let (report, targets) = stepped??;
        rows = next?;
        sum.loss += report.loss.unwrap_or_default() * targets as f64;
        sum.target_tokens += targets;
        sum.tokens += report.tokens;
        if let Some(what) = told(&report) {
            cx.emit_lossy(what).await;
        }
    }
    Ok((sum, started.elapsed()))
}
