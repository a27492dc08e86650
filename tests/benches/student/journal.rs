//! What a student's log says of a training.

use std::collections::HashMap;

use serde::Serialize;

use crate::Failure;

/// One training, in the order of its steps.
#[derive(Default, Serialize)]
pub struct Journal {
    pub steps: Vec<Step>,
    pub checkpoints: Vec<Checkpoint>,
}

#[derive(Clone, Copy, Serialize)]
pub struct Step {
    /// Steps done, this one included.
    pub step: u32,
    pub seconds: f64,
    /// Before it, for its rows.
    pub waited_s: f64,
    /// Whether a checkpoint was being written when it began.
    pub beside_checkpoint: bool,
}

/// What a checkpoint took of the thread that trains, and beside it.
#[derive(Clone, Copy, Serialize)]
pub struct Checkpoint {
    pub step: u32,
    /// Judging the student on held-out rows.
    pub judged_s: f64,
    /// Until the one before was stored.
    pub waited_s: f64,
    pub copied_s: f64,
    /// From the copy until it was in the store, beside the training.
    pub written_s: f64,
}

impl Journal {
    /// Of a log's lines between a training's begin and its end.
    pub fn read(log: &str) -> Result<Self, Failure> {
        let mut journal = Self::default();
        for line in log.lines() {
            if let Some(fields) = Fields::of(line, "stepped") {
                journal.steps.push(Step {
                    step: fields.get("step")?,
                    seconds: fields.get("seconds")?,
                    waited_s: fields.get("waited_for_rows_s")?,
                    beside_checkpoint: fields.get("beside_checkpoint")?,
                });
            } else if let Some(fields) = Fields::of(line, "a checkpoint is being written") {
                journal.checkpoints.push(Checkpoint {
                    step: fields.get("step")?,
                    judged_s: fields.get("judged_s")?,
                    waited_s: fields.get("waited_s")?,
                    copied_s: fields.get("copied_s")?,
                    written_s: f64::NAN,
                });
            } else if let Some(fields) = Fields::of(line, "checkpoint written") {
                let (step, seconds) = (fields.get::<u32>("step")?, fields.get("seconds")?);
                if let Some(checkpoint) = journal.checkpoints.iter_mut().find(|checkpoint| checkpoint.step == step) {
                    checkpoint.written_s = seconds;
                }
            }
        }
        Ok(journal)
    }

    /// Fails unless every step and every checkpoint of the plan was told.
    pub fn check(&self, steps: u32, every: u32) -> Result<(), Failure> {
        if !self.steps.iter().map(|step| step.step).eq(1..=steps) {
            return Err(format!("the student's log tells of {} of {steps} steps", self.steps.len()).into());
        }
        let due = (1..=steps).filter(|step| step % every == 0 || *step == steps);
        if !self.checkpoints.iter().map(|checkpoint| checkpoint.step).eq(due) {
            return Err(format!("the student's log tells of {} checkpoints", self.checkpoints.len()).into());
        }
        match self.checkpoints.iter().find(|checkpoint| checkpoint.written_s.is_nan()) {
            Some(checkpoint) => Err(format!("the checkpoint of step {} was not written", checkpoint.step).into()),
            None => Ok(()),
        }
    }
}

/// A log line's fields.
struct Fields<'a> {
    line: &'a str,
    of: HashMap<&'a str, &'a str>,
}

impl<'a> Fields<'a> {
    /// Of a line with this message, whose first field is the step.
    fn of(line: &'a str, message: &str) -> Option<Self> {
        let at = line.find(&format!(": {message} step="))?;
        let fields = line[at + 2 + message.len()..].split_whitespace().filter_map(|field| field.split_once('='));
        Some(Self { line, of: fields.collect() })
    }

    fn get<T: std::str::FromStr>(&self, key: &str) -> Result<T, Failure> {
        let value = self.of.get(key).and_then(|value| value.parse().ok());
        value.ok_or_else(|| format!("the student's log has no sound {key:?} in {:?}", self.line).into())
    }
}
