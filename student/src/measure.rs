//! How close a student is to its teacher on rows it was not trained on.

use retort_core::Result;
use retort_llama::Model;
use retort_proto::Quality;

use crate::{batch, example::Example, loss::ChunkedLoss, trainer::target_hidden};

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
}

impl Tally {
    pub fn add(&mut self, other: &Tally) {
        self.kl += other.kl;
        self.agreed += other.agreed;
        self.student_nll += other.student_nll;
        self.teacher_nll += other.teacher_nll;
        self.tokens += other.tokens;
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
        let hidden_nh = tch::no_grad(|| target_hidden(model, &micro, None))?;
        let measured = loss.measure(&hidden_nh, &model.head_weight(), &micro.targets)?;
        let mut n = 0;
        for &member in &micro.members {
            let tally = &mut tallies[member];
            for p in n..n + examples[member].targets.len() {
                tally.kl += measured.kl[p];
                tally.agreed += u64::from(measured.top_ids[p] == micro.targets.top_ids[p]);
                tally.student_nll -= f64::from(measured.label_logprobs[p]);
                tally.teacher_nll -= f64::from(micro.targets.label_logprobs[p]);
                tally.tokens += 1;
            }
            n += examples[member].targets.len();
        }
    }
    Ok(tallies)
}
