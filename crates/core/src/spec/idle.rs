//! Keys that would do nothing, losses that would weigh nothing and random weights that would stay: slips, told before
//! a job costs anything. They are looked for where a job is made and nowhere else, so that one admitted before a slip
//! was looked for goes on.

use super::{Init, JobSpec, Loss, Parallel, Promote, Prune, Schedule, Sharing, Train, Weight, validate::invalid};
use crate::Result;

/// The least that a term weighs; by less, nothing would train.
const MIN_WEIGHT: f64 = 1e-6;

impl JobSpec {
    /// The first slip, with the way out. Of a [valid](Self::validate) spec.
    pub fn check_idle(&self) -> Result<()> {
        let train = &self.train;
        match &self.student.init {
            Init::Prune(prune) => prune.check_idle()?,
            Init::Config { .. } if self.student.lora.is_some() => {
                return Err(invalid(
                    "student.lora would keep the random embeddings and head of student.init.config; start from prune or \
                     checkpoint, or leave lora out"
                        .to_owned(),
                ));
            }
            _ => {}
        }
        if train.freeze_embeddings && self.student.lora.is_some() {
            return Err(invalid(
                "train.freeze_embeddings does nothing with student.lora, whose adapters alone train; leave one of them out"
                    .to_owned(),
            ));
        }
        if train.adam_embedding_epsilon != Train::default().adam_embedding_epsilon
            && (train.freeze_embeddings || self.student.lora.is_some())
        {
            return Err(invalid(format!(
                "train.adam_embedding_epsilon {} does nothing where the embeddings stay as they are, as with \
                 train.freeze_embeddings and with student.lora; leave the key out",
                train.adam_embedding_epsilon
            )));
        }
        if train.decay_ratio != Train::default().decay_ratio && train.schedule != Schedule::Wsd {
            return Err(invalid(format!(
                "train.decay_ratio {} does nothing without train.schedule wsd; say schedule: wsd, or leave the key out",
                train.decay_ratio
            )));
        }
        if train.schedule == Schedule::Wsd && train.decay_ratio == 0.0 {
            return Err(invalid(
                "train.decay_ratio 0 never lets the learning rate of train.schedule wsd fall; say schedule: constant, or \
                 give a share of the steps"
                    .to_owned(),
            ));
        }
        if train.promote == Promote::Best && train.checkpoint_steps == 0 {
            return Err(invalid(
                "train.promote best does nothing with train.checkpoint_steps 0, whose one checkpoint is the last; raise \
                 checkpoint_steps, or leave promote out"
                    .to_owned(),
            ));
        }
        for (key, ratio) in [("norm_ratio", train.guard.norm_ratio), ("loss_ratio", train.guard.loss_ratio)] {
            if ratio > 0.0 && ratio < 1.0 {
                return Err(invalid(format!(
                    "train.guard.{key} is {ratio}, so that usual steps would count as leaps and be left out; give at \
                     least 1, or 0 for no guard"
                )));
            }
        }
        train.loss.check_idle()?;
        train.parallel.as_ref().map_or(Ok(()), Parallel::check_idle)
    }
}

impl Prune {
    fn check_idle(&self) -> Result<()> {
        let rows = self.calibration_rows;
        if rows == Self::default().calibration_rows || self.needs_calibration() {
            return Ok(());
        }
        Err(invalid(format!(
            "student.init.prune.calibration_rows {rows} does nothing where importance chooses nothing; say choose: \
             block_influence, give a size such as intermediate_size, or leave the key out"
        )))
    }
}

impl Parallel {
    fn check_idle(&self) -> Result<()> {
        let idle = self.of_diloco().into_iter().find(|(_, given)| *given);
        match (self.mode, idle) {
            (Sharing::Synchronous, Some((key, _))) => Err(invalid(Sharing::does_nothing(key))),
            (Sharing::Diloco, _) if self.workers == 1 => Err(invalid(
                "train.parallel.mode diloco does nothing with train.parallel.workers 1, who has nobody to exchange with; \
                 raise workers, or leave parallel out"
                    .to_owned(),
            )),
            _ => Ok(()),
        }
    }

    /// Keys that only mode `diloco` reads, and whether each has another value than its default.
    pub(super) fn of_diloco(&self) -> [(&'static str, bool); 3] {
        let plain = Self::of(self.workers);
        [
            ("train.parallel.inner_steps", self.inner_steps != plain.inner_steps),
            ("train.parallel.outer_learning_rate", self.outer_learning_rate != plain.outer_learning_rate),
            ("train.parallel.outer_momentum", self.outer_momentum != plain.outer_momentum),
        ]
    }
}

impl Sharing {
    /// What is said of a key of mode `diloco` where the mode is `synchronous`.
    pub(super) fn does_nothing(key: &str) -> String {
        format!("{key} does nothing with train.parallel.mode synchronous; say mode: diloco, or leave the key out")
    }
}

impl Loss {
    fn check_idle(&self) -> Result<()> {
        if let Some(when) = self.nothing() {
            return Err(invalid(format!("train.loss weighs nothing{when}; give at least one term a weight there")));
        }
        self.check_weights()?;
        let plain = Self::default();
        if self.temperature != plain.temperature && !self.goes_by_temperature() {
            return Err(invalid(format!(
                "train.loss.temperature {} does nothing with label_ce alone, which is at temperature 1; give another term \
                 a weight, or leave the key out",
                self.temperature
            )));
        }
        if self.jensen_shannon_beta != plain.jensen_shannon_beta && self.jensen_shannon.is_zero() {
            return Err(invalid(format!(
                "train.loss.jensen_shannon_beta {} does nothing without jensen_shannon; give that a weight, or leave the \
                 key out",
                self.jensen_shannon_beta
            )));
        }
        let skewed = !self.skew_forward_kl.is_zero() || !self.skew_reverse_kl.is_zero();
        if self.skew_alpha != plain.skew_alpha && !skewed {
            return Err(invalid(format!(
                "train.loss.skew_alpha {} does nothing without skew_forward_kl or skew_reverse_kl; give one of them a \
                 weight, or leave the key out",
                self.skew_alpha
            )));
        }
        Ok(())
    }

    /// A weight is 0, or large enough to train by.
    fn check_weights(&self) -> Result<()> {
        for (key, Weight { from, to, .. }) in self.terms() {
            for (part, weight) in [(".from", from), (".to", to)] {
                if weight > 0.0 && weight < MIN_WEIGHT {
                    let part = if from == to { "" } else { part };
                    return Err(invalid(format!(
                        "train.loss.{key}{part} is {weight:e}, too small to train by; give it 0, or at least {MIN_WEIGHT}"
                    )));
                }
            }
        }
        Ok(())
    }

    /// When no term has a weight, if ever, in a run that is long enough to come there.
    ///
    /// Weights go in straight lines between numbers that are not negative. So what rises from 0 is 0 at step 0 alone,
    /// what falls to 0 is 0 from `until` on, which with `until: 1` no step reaches, and nothing else is ever 0 but
    /// what always is: all are at some step only if they all are at the first or at the last.
    fn nothing(&self) -> Option<&'static str> {
        let terms = self.terms();
        let all = |is_nothing: fn(&Weight) -> bool| terms.iter().all(|(_, weight)| is_nothing(weight));
        if all(Weight::is_zero) {
            Some("")
        } else if all(|weight| if weight.until > 0.0 { weight.from == 0.0 } else { weight.to == 0.0 }) {
            Some(" at the first step")
        } else if all(|weight| weight.is_zero() || (weight.to == 0.0 && weight.until < 1.0)) {
            Some(" at the last steps")
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests;
