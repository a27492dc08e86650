//! How close a student is to its teacher on rows it was not trained on.

use retort_core::Result;
use retort_llama::Model;
use retort_proto::Quality;

use crate::{batch, calibration::Calibration, example::Example, loss::ChunkedLoss, trainer::target_hidden};

/// Sums over target tokens; those of two sets of rows add up.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tally {
    /// Forward KL, teacher against student, nats: exact over the head, and estimated without bias
    /// from the sampled tail.
    pub kl: f64,
    /// Tokens at which both find the same token the most likely.
    pub agreed: u64,
    /// Negative log-likelihood of the completion's own tokens, nats.
    pub student_nll: f64,
    pub teacher_nll: f64,
    pub tokens: u64,
    pub student_calibration: Calibration,
    /// Of the tokens whose soft target has the probability of the teacher's most likely token.
    pub teacher_calibration: Calibration,
}

impl Tally {
    pub fn add(&mut self, other: &Tally) {
        self.kl += other.kl;
        self.agreed += other.agreed;
        self.student_nll += other.student_nll;
        self.teacher_nll += other.teacher_nll;
        self.tokens += other.tokens;
        self.student_calibration.add(&other.student_calibration);
        self.teacher_calibration.add(&other.teacher_calibration);
    }

    /// Nats a token; 0 of nothing.
    pub fn mean_kl(&self) -> f64 {
        self.kl / self.tokens.max(1) as f64
    }

    pub fn quality(&self) -> Quality {
        let tokens = self.tokens.max(1) as f64;
        Quality {
            kl: self.mean_kl(),
            top1_agreement: self.agreed as f64 / tokens,
            student_perplexity: (self.student_nll / tokens).exp(),
            teacher_perplexity: (self.teacher_nll / tokens).exp(),
            tokens: self.tokens,
            calibration_error: self.student_calibration.error(),
            teacher_calibration_error: self.teacher_calibration.error(),
        }
    }
}

/// One tally for each of `examples`, in their order. `check` is asked between micro-batches.
pub fn measure(
    model: &Model,
    loss: &mut ChunkedLoss,
    examples: &[Example],
    limits: batch::Limits,
    check: &dyn Fn() -> Result<()>,
) -> Result<Vec<Tally>> {
    let mut tallies = vec![Tally::default(); examples.len()];
    for micro in batch::cut(examples, limits) {
        check()?;
        let hidden_nh = tch::no_grad(|| target_hidden(model, &micro))?;
        let measured = loss.measure(&hidden_nh, &model.head_weight(), &micro.targets)?;
        let mut n = 0;
        let targets = &micro.targets;
        for &member in &micro.members {
            let tally = &mut tallies[member];
            for p in n..n + examples[member].targets.len() {
                let (label, top_id) = (targets.labels[p], measured.top_ids[p]);
                tally.student_calibration.push(f64::from(measured.top_logprobs[p]).exp(), top_id == label);
                if let Some(logprob) = targets.top_logprob(p) {
                    tally.teacher_calibration.push(f64::from(logprob).exp(), targets.top_ids[p] == label);
                }
                tally.kl += measured.kl[p];
                tally.agreed += u64::from(top_id == targets.top_ids[p]);
                tally.student_nll -= f64::from(measured.label_logprobs[p]);
                tally.teacher_nll -= f64::from(targets.label_logprobs[p]);
                tally.tokens += 1;
            }
            n += examples[member].targets.len();
        }
    }
    Ok(tallies)
}
