//! Learning rate over a run: a linear rise, then what the spec says.

use std::f64::consts::PI;

use retort_core::spec::{self, Train};

/// Learning rate at each optimiser step; a pure function of the spec.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    peak: f64,
    kind: spec::Schedule,
    warmup: u32,
    /// Steps at the end over which it falls.
    falling: u32,
    steps: u32,
}

impl Schedule {
    /// Shares of the `steps` are rounded up.
    pub fn new(train: &Train, steps: u32) -> Self {
        let share = |ratio: f64| (f64::from(steps) * ratio.clamp(0.0, 1.0)).ceil() as u32;
        let warmup = share(train.warmup_ratio).min(steps);
        let falling = match train.schedule {
            spec::Schedule::Cosine | spec::Schedule::Linear => steps - warmup,
            spec::Schedule::Constant => 0,
            spec::Schedule::Wsd => share(train.decay_ratio).min(steps - warmup),
        };
        Self { peak: train.learning_rate, kind: train.schedule, warmup, falling, steps }
    }

    /// Of the step with this index, counted from 0. Positive for every step of the run, `peak` at
    /// the last one of the rise.
    pub fn learning_rate(&self, step: u32) -> f64 {
        if step < self.warmup {
            return self.peak * f64::from(step + 1) / f64::from(self.warmup);
        }
        let stable = self.steps - self.falling;
        if self.falling == 0 || step < stable {
            return self.peak;
        }
        let done = (f64::from(step - stable) / f64::from(self.falling)).min(1.0);
        let left = match self.kind {
            spec::Schedule::Cosine => 0.5 * (1.0 + (PI * done).cos()),
            spec::Schedule::Wsd => 1.0 - done.sqrt(),
            spec::Schedule::Linear | spec::Schedule::Constant => 1.0 - done,
        };
        self.peak * left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(kind: spec::Schedule, warmup_ratio: f64, steps: u32) -> Schedule {
        let train = Train { learning_rate: 1e-3, warmup_ratio, schedule: kind, ..Train::default() };
        Schedule::new(&train, steps)
    }

    fn rates(kind: spec::Schedule) -> Vec<f64> {
        let schedule = schedule(kind, 0.1, 100);
        (0..100).map(|step| schedule.learning_rate(step)).collect()
    }

    fn near(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-12
    }

    #[test]
    fn rises_to_the_peak_then_never_rises_again() {
        for kind in [spec::Schedule::Cosine, spec::Schedule::Linear, spec::Schedule::Constant, spec::Schedule::Wsd] {
            let rates = rates(kind);
            assert!(near(rates[0], 1e-4) && near(rates[9], 1e-3), "{kind:?}");
            assert!(rates[..10].is_sorted() && rates[10..].iter().rev().is_sorted(), "{kind:?}");
            assert!(rates.iter().all(|&rate| rate > 0.0 && rate <= 1e-3), "{kind:?}");
        }
    }

    #[test]
    fn each_falls_as_it_should() {
        let cosine = rates(spec::Schedule::Cosine);
        // Halfway down the cosine stands half the peak.
        assert!(near(cosine[55], 5e-4) && cosine[99] < 1e-6);
        assert!(near(rates(spec::Schedule::Linear)[55], 5e-4));
        assert_eq!(rates(spec::Schedule::Constant)[99], 1e-3);
        let wsd = rates(spec::Schedule::Wsd);
        assert!(near(wsd[79], 1e-3) && near(wsd[80], 1e-3) && near(wsd[85], 5e-4), "{wsd:?}");
    }

    #[test]
    fn edges_divide_by_nothing() {
        for kind in [spec::Schedule::Cosine, spec::Schedule::Linear, spec::Schedule::Constant, spec::Schedule::Wsd] {
            assert_eq!(schedule(kind, 0.0, 1).learning_rate(0), 1e-3);
            assert_eq!(schedule(kind, 1.0, 4).learning_rate(3), 1e-3);
            assert!(schedule(kind, 1.0, 4).learning_rate(9).is_finite());
            assert!(schedule(kind, 0.5, 0).learning_rate(0).is_finite());
        }
    }
}
