//! What is known of a job, folded from its events. Pure: the same events give the same state.

use std::time::Duration;

use retort_core::{state::JobState, wire::job_state_from_proto};
use retort_proto::{self as proto, job_event::What};

#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    sequence: u64,
    pub job: Option<JobState>,
    pub shards_done: u32,
    pub shards_total: u32,
    pub teacher_tokens: u64,
    /// Tokens a second.
    pub teacher_rate: f64,
    pub step: u32,
    pub steps_total: u32,
    pub loss: Option<f64>,
    pub student_rate: f64,
    pub first_kl: Option<f64>,
    pub latest_kl: Option<f64>,
    pub evaluated: bool,
    pub redone: u32,
    eta: Option<Duration>,
}

/// The phase that holds the job up; teaching and training overlap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Queued,
    Teach,
    Train,
    Evaluate,
    Done,
}

impl State {
    /// False when the event was seen before; then nothing changes.
    pub fn apply(&mut self, event: &proto::JobEvent) -> bool {
        if event.sequence <= self.sequence {
            return false;
        }
        self.sequence = event.sequence;
        self.job = job_state_from_proto(event.state).or(self.job);
        if let Some(progress) = &event.progress {
            self.progress(progress);
        }
        match &event.what {
            Some(What::TrainStepped(stepped)) => {
                self.step = stepped.step;
                // Step 0 only says that training has begun.
                if stepped.step > 0 {
                    self.loss = Some(stepped.loss);
                }
            }
            Some(What::Evaluated(evaluated)) => {
                if let Some(quality) = &evaluated.quality {
                    if evaluated.step == 0 {
                        self.first_kl = Some(quality.kl);
                    }
                    self.kl(quality.kl);
                }
                // The best checkpoint may lie before the last step.
                self.evaluated |= evaluated.step > 0;
            }
            _ => {}
        }
        true
    }

    /// Until the job has ended. How far an evaluation is, nobody says.
    pub fn left(&self) -> Option<Duration> {
        self.eta.filter(|_| !matches!(self.phase(), Phase::Evaluate | Phase::Done))
    }

    pub fn phase(&self) -> Phase {
        match self.job {
            None | Some(JobState::Queued) => Phase::Queued,
            Some(job) if job.is_final() => Phase::Done,
            Some(_) if self.steps_total > 0 && self.step >= self.steps_total => Phase::Evaluate,
            Some(_) if self.shards_total > 0 && self.shards_done >= self.shards_total => Phase::Train,
            Some(_) => Phase::Teach,
        }
    }

    fn progress(&mut self, progress: &proto::Progress) {
        self.shards_done = progress.shards_published;
        self.shards_total = progress.shards_total;
        self.teacher_tokens = progress.teacher_target_tokens;
        self.teacher_rate = progress.teacher_tokens_per_second;
        self.step = progress.step;
        self.steps_total = progress.steps_total;
        self.student_rate = progress.student_tokens_per_second;
        self.redone = progress.attempts_redone;
        if progress.step > 0 && progress.train_loss.is_finite() {
            self.loss = Some(progress.train_loss);
        }
        if let Some(kl) = progress.held_out_kl {
            self.kl(kl);
        }
        self.eta = progress.eta.as_ref().and_then(|eta| {
            let seconds = u64::try_from(eta.seconds).ok()?;
            Some(Duration::new(seconds, u32::try_from(eta.nanos).unwrap_or(0).min(999_999_999)))
        });
    }

    fn kl(&mut self, kl: f64) {
        self.first_kl.get_or_insert(kl);
        self.latest_kl = Some(kl);
    }
}
