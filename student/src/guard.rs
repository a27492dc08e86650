//! Steps that would do more harm than good: those whose gradient or loss leaps above what it was before.

use retort_core::spec::Guard;
use serde::{Deserialize, Serialize};

/// Steps that are seen before any is judged.
const SEEN_FIRST: u32 = 10;
/// Share of a new step in the running means.
const NEW: f64 = 0.1;
/// Nats a target by which losses count at least. Of a student close to its teacher the loss is an estimate around 0,
/// whose noise is many times its mean and at times below 0.
const LEAST_LOSS: f64 = 0.1;
/// Steps in a row that are left out; the next is taken whatever it is, or a run whose data have changed would
/// stand still.
const MOST_IN_A_ROW: u32 = 5;

/// Running means over the steps that were taken; travels with checkpoints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Watched {
    seen: u32,
    gradient_norm: f64,
    loss: f64,
    in_a_row: u32,
}

impl Watched {
    /// Gradient's norm and loss as they were in the steps before; `None` before the first.
    pub fn usual(&self) -> Option<(f64, f64)> {
        (self.seen > 0).then_some((self.gradient_norm, self.loss))
    }

    /// Why the step is to be left out; `None` takes it and counts it. Both numbers are finite.
    pub fn objection(&mut self, guard: &Guard, gradient_norm: f64, loss: f64) -> Option<String> {
        let leaps = |value: f64, usual: f64, ratio: f64| ratio > 0.0 && usual > 0.0 && value > ratio * usual;
        let usual_loss = self.loss.max(LEAST_LOSS);
        if self.seen >= SEEN_FIRST && self.in_a_row < MOST_IN_A_ROW {
            let of = |what: &str, value: f64, usual: f64, key: &str| {
                format!("its {what} {value:.3} is {:.1} times the usual {usual:.3} (train.guard.{key})", value / usual)
            };
            let why = if leaps(gradient_norm, self.gradient_norm, guard.norm_ratio) {
                Some(of("gradient's norm", gradient_norm, self.gradient_norm, "norm_ratio"))
            } else if leaps(loss, usual_loss, guard.loss_ratio) {
                Some(of("loss", loss, usual_loss, "loss_ratio"))
            } else {
                None
            };
            if why.is_some() {
                self.in_a_row += 1;
                return why;
            }
        }
        let share = if self.seen == 0 { 1.0 } else { NEW };
        self.gradient_norm += share * (gradient_norm - self.gradient_norm);
        self.loss += share * (loss - self.loss);
        self.seen = self.seen.saturating_add(1);
        self.in_a_row = 0;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUARD: Guard = Guard { norm_ratio: 10.0, loss_ratio: 3.0 };

    fn settled() -> Watched {
        let mut watched = Watched::default();
        for step in 0..20 {
            assert_eq!(watched.objection(&GUARD, 1.0 + 0.1 * f64::from(step % 3), 2.0), None);
        }
        watched
    }

    #[test]
    fn a_leap_is_left_out_and_named() {
        let mut watched = settled();
        let before = watched;
        let norm = watched.objection(&GUARD, 50.0, 2.0).unwrap();
        assert!(norm.contains("norm 50.000 is 4") && norm.contains("train.guard.norm_ratio"), "{norm}");
        let loss = watched.objection(&GUARD, 1.0, 7.0).unwrap();
        assert!(loss.contains("loss 7.000 is 3.5 times"), "{loss}");
        assert_eq!((watched.gradient_norm, watched.loss), (before.gradient_norm, before.loss));
        assert_eq!(watched.objection(&GUARD, 5.0, 4.0), None);
        assert_eq!(watched.in_a_row, 0);
    }

    #[test]
    fn noise_around_no_loss_is_no_leap() {
        for usual in [-0.06, 0.0, 0.001] {
            let mut watched = Watched::default();
            assert!((0..20).all(|_| watched.objection(&GUARD, 1.0, usual).is_none()));
            assert_eq!(watched.objection(&GUARD, 1.0, 0.25), None);
            let why = watched.objection(&GUARD, 1.0, 0.35).unwrap();
            assert!(why.contains("loss 0.350 is 3.5 times the usual 0.100"), "{why}");
        }
    }

    #[test]
    fn what_goes_on_is_taken_in_the_end() {
        let mut watched = settled();
        let taken = (0..20).position(|_| watched.objection(&GUARD, 100.0, 2.0).is_none());
        assert_eq!(taken, Some(5));
        assert!(watched.gradient_norm > 10.0);
    }

    #[test]
    fn the_first_steps_and_ratios_of_nothing_object_to_nothing() {
        let mut watched = Watched::default();
        assert!((0..10).all(|step| watched.objection(&GUARD, f64::from(10 << step), 1.0).is_none()));
        let mut watched = settled();
        assert_eq!(watched.objection(&Guard { norm_ratio: 0.0, loss_ratio: 0.0 }, 1e9, 1e9), None);
    }
}
