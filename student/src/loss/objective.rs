//! What is made small at one position, and how it changes with the student's logits.
//!
//! A target names some tokens, each with the teacher's exact probability or as a sample that stands for
//! others, and may hold what is left as one *bucket*. All distances but forward KL compare the two
//! distributions over the exact entries and a bucket for everything else: what the codec kept exactly is
//! judged exactly, and the distance is never more than that of the whole distributions. Forward KL is linear
//! in the teacher, so that samples with their weights estimate it without bias, and needs no bucket for them.
//!
//! With `q = softmax(z)`, a distance with derivatives `g_i` in the student's probability of outcome `i`
//! changes with a token's logit by `q_v (g_i - sum_j q_j g_j)`, `i` being the token's outcome. Outside the
//! support that is `spread * q_v` with one `spread` for all, so a position's gradient is `spread * q` plus a
//! correction for each entry, and no graph is needed, whatever the distance.

use retort_core::spec::Loss;

use crate::batch::Targets;

/// Least mass that either side is taken to have in a bucket; what it has beside a sure head is rounding.
const LEAST_BUCKET: f64 = 1e-6;

/// Weights of the terms at one step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Objective {
    forward_kl: f64,
    reverse_kl: f64,
    jensen_shannon: f64,
    skew_forward_kl: f64,
    skew_reverse_kl: f64,
    total_variation: f64,
    logit_mse: f64,
    /// Of the label's cross-entropy, which is at temperature 1 always.
    pub label_ce: f64,
    beta: f64,
    alpha: f64,
    /// Of both sides' softmax.
    pub temperature: f64,
}

/// A target and what the student says there.
#[derive(Clone, Copy, Debug)]
pub struct Position<'a> {
    /// What each entry weighs in forward KL.
    pub masses: &'a [f32],
    /// Teacher's log-probabilities.
    pub logprobs: &'a [f32],
    /// Which entries are exact.
    pub heads: &'a [bool],
    /// Mass of the codec's own bucket.
    pub residual: f32,
    /// Student's log-probabilities of the entries.
    pub student: &'a [f32],
    pub vocab_size: usize,
}

/// The loss at a position but for the label's, and its gradient: `spread * q` and a correction for each entry.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Judged {
    /// As it is weighed.
    pub loss: f64,
    /// Forward KL as it is.
    pub kl: f64,
    pub spread: f64,
}

impl Objective {
    /// Of a step, of so many.
    pub fn of(loss: &Loss, step: u32, steps: u32) -> Self {
        let temperature = loss.temperature;
        // Distances shrink with the square of the temperature, and their gradients once more by it.
        let at = |weight: retort_core::spec::Weight| weight.at(step, steps) * temperature * temperature;
        Self {
            forward_kl: at(loss.forward_kl),
            reverse_kl: at(loss.reverse_kl),
            jensen_shannon: at(loss.jensen_shannon),
            skew_forward_kl: at(loss.skew_forward_kl),
            skew_reverse_kl: at(loss.skew_reverse_kl),
            total_variation: at(loss.total_variation),
            logit_mse: at(loss.logit_mse),
            label_ce: loss.label_ce.at(step, steps),
            beta: loss.jensen_shannon_beta,
            alpha: loss.skew_alpha,
            temperature,
        }
    }

    /// Adds each entry's correction to `corrections`. The gradient is with respect to the logits over the
    /// temperature.
    pub fn judge(&self, position: &Position, corrections: &mut [f64]) -> Judged {
        let (kl, spread) = position.forward_kl(self.forward_kl, corrections);
        let mut judged = Judged { loss: self.forward_kl * kl, kl, spread };
        if self.compares() {
            let (loss, spread) = self.compare(position, corrections);
            judged.loss += loss;
            judged.spread += spread;
        }
        if self.logit_mse > 0.0 {
            judged.loss += self.logit_mse * position.logit_mse(self.logit_mse, corrections);
        }
        judged
    }

    fn compares(&self) -> bool {
        let weights =
            [self.reverse_kl, self.jensen_shannon, self.skew_forward_kl, self.skew_reverse_kl, self.total_variation];
        weights.iter().any(|&weight| weight > 0.0)
    }

    /// Over the exact entries and a bucket for everything else: the loss, and the gradient's spread.
    fn compare(&self, position: &Position, corrections: &mut [f64]) -> (f64, f64) {
        let exact = || (0..position.student.len()).filter(|&e| position.heads[e]);
        let probability = |logprob: f32| f64::from(logprob).exp();
        let (mut loss, mut mean_slope, mut teacher_kept, mut student_kept) = (0.0, 0.0, 0.0, 0.0);
        for e in exact() {
            let (t, q) = (probability(position.logprobs[e]), probability(position.student[e]));
            let (value, slope) = self.outcome(t, q);
            loss += value;
            mean_slope += q * slope;
            corrections[e] += q * slope;
            teacher_kept += t;
            student_kept += q;
        }
        let mut bucket_slope = 0.0;
        if exact().count() < position.vocab_size {
            let left = |kept: f64| (1.0 - kept).max(LEAST_BUCKET);
            let (value, slope) = self.outcome(left(teacher_kept), left(student_kept));
            loss += value;
            bucket_slope = slope;
            mean_slope += (1.0 - student_kept).max(0.0) * slope;
            for e in exact() {
                corrections[e] -= probability(position.student[e]) * slope;
            }
        }
        (loss, bucket_slope - mean_slope)
    }

    /// What an outcome of probabilities `t` and `q` adds, and its derivative in `q`.
    fn outcome(&self, t: f64, q: f64) -> (f64, f64) {
        let (mut loss, mut slope) = (0.0, 0.0);
        let mut add = |weight: f64, value: f64, derivative: f64| {
            loss += weight * value;
            slope += weight * derivative;
        };
        // A probability of 0 is one of a number too small for it.
        let (t, q) = (t.max(f64::MIN_POSITIVE), q.max(f64::MIN_POSITIVE));
        if self.reverse_kl > 0.0 {
            let log = (q / t).ln();
            add(self.reverse_kl, q * log, log + 1.0);
        }
        if self.jensen_shannon > 0.0 {
            let b = self.beta;
            let m = b * t + (1.0 - b) * q;
            let log = (q / m).ln();
            add(self.jensen_shannon, b * t * (t / m).ln() + (1.0 - b) * q * log, (1.0 - b) * log);
        }
        if self.skew_forward_kl > 0.0 {
            let m = self.alpha * t + (1.0 - self.alpha) * q;
            add(self.skew_forward_kl, t * (t / m).ln(), -t * (1.0 - self.alpha) / m);
        }
        if self.skew_reverse_kl > 0.0 {
            let m = self.alpha * q + (1.0 - self.alpha) * t;
            let log = (q / m).ln();
            add(self.skew_reverse_kl, q * log, log + 1.0 - self.alpha * q / m);
        }
        if self.total_variation > 0.0 {
            add(self.total_variation, (q - t).abs() / 2.0, (q - t).signum() / 2.0);
        }
        (loss, slope)
    }
}

impl<'a> Position<'a> {
    /// The `p`-th target, and the student's log-probabilities of its entries.
    pub fn of(targets: &'a Targets, p: usize, student: &'a [f32], vocab_size: usize) -> Self {
        let entries = targets.offsets[p]..targets.offsets[p + 1];
        Self {
            masses: &targets.masses[entries.clone()],
            logprobs: &targets.logprobs[entries.clone()],
            heads: &targets.heads[entries],
            residual: targets.residuals[p],
            student,
            vocab_size,
        }
    }

    /// `sum_v t_v (log p_v - log q_v)`, with the codec's bucket as one more outcome, and the gradient's spread
    /// times `weight`, as are the corrections.
    pub fn forward_kl(&self, weight: f64, corrections: &mut [f64]) -> (f64, f64) {
        let residual = f64::from(self.residual);
        let mut loss = 0.0;
        let mut mass = residual;
        for ((&mass_of, &teacher), &student) in self.masses.iter().zip(self.logprobs).zip(self.student) {
            loss += f64::from(mass_of) * (f64::from(teacher) - f64::from(student));
            mass += f64::from(mass_of);
        }
        for (correction, &mass_of) in corrections.iter_mut().zip(self.masses) {
            *correction -= weight * f64::from(mass_of);
        }
        if residual == 0.0 {
            return (loss, weight * mass);
        }
        // The student's own bucket shares the pull by its own distribution inside.
        let kept: f64 = self.student.iter().map(|&logprob| f64::from(logprob).exp()).sum();
        let bucket = (1.0 - kept).max(LEAST_BUCKET);
        let pull = residual / bucket;
        for (correction, &student) in corrections.iter_mut().zip(self.student) {
            *correction += weight * pull * f64::from(student).exp();
        }
        (loss + residual * pull.ln(), weight * (mass - pull))
    }

    /// Mean squared difference of the exact entries' logits, each side centred on its own mean.
    fn logit_mse(&self, weight: f64, corrections: &mut [f64]) -> f64 {
        let exact = || (0..self.student.len()).filter(|&e| self.heads[e]);
        let count = exact().count() as f64;
        if count == 0.0 {
            return 0.0;
        }
        let difference = |e: usize| f64::from(self.student[e]) - f64::from(self.logprobs[e]);
        let mean = exact().map(difference).sum::<f64>() / count;
        let mut loss = 0.0;
        for e in exact() {
            let centred = difference(e) - mean;
            loss += centred * centred / count;
            corrections[e] += weight * 2.0 * centred / count;
        }
        loss
    }
}
