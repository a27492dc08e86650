//! Learning rate over a run: a linear rise, then half a cosine down to nothing.

use std::f64::consts::PI;

/// Learning rate at each optimiser step; a pure function of the spec.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    peak: f64,
    warmup: u32,
    steps: u32,
}

impl Schedule {
    /// `warmup_ratio` of the `steps`, rounded up, go into the rise.
    pub fn new(peak: f64, warmup_ratio: f64, steps: u32) -> Self {
        let warmup = (f64::from(steps) * warmup_ratio.clamp(0.0, 1.0)).ceil() as u32;
        Self { peak, warmup: warmup.min(steps), steps }
    }

    /// Of the step with this index, counted from 0. Positive for every step of the run, `peak` at
    /// the last one of the rise.
    pub fn learning_rate(&self, step: u32) -> f64 {
        if step < self.warmup {
            return self.peak * f64::from(step + 1) / f64::from(self.warmup);
        }
        let falling = f64::from((self.steps - self.warmup).max(1));
        let done = (f64::from(step - self.warmup) / falling).min(1.0);
        self.peak * 0.5 * (1.0 + (PI * done).cos())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rises_to_the_peak_then_falls_to_almost_nothing() {
        let schedule = Schedule::new(1e-3, 0.1, 100);
        let rates: Vec<f64> = (0..100).map(|step| schedule.learning_rate(step)).collect();
        assert!((rates[0] - 1e-4).abs() < 1e-12);
        assert!((rates[9] - 1e-3).abs() < 1e-12);
        assert!(rates[..10].is_sorted() && rates[10..].iter().rev().is_sorted());
        assert!(rates.iter().all(|&rate| rate > 0.0 && rate <= 1e-3));
        assert!(rates[99] < 1e-6);
        // Halfway down the cosine stands half the peak.
        assert!((rates[55] - 5e-4).abs() < 1e-12);
    }

    #[test]
    fn edges_divide_by_nothing() {
        assert_eq!(Schedule::new(1.0, 0.0, 1).learning_rate(0), 1.0);
        assert_eq!(Schedule::new(1.0, 1.0, 4).learning_rate(3), 1.0);
        assert!(Schedule::new(1.0, 1.0, 4).learning_rate(9).is_finite());
        assert!(Schedule::new(1.0, 0.5, 0).learning_rate(0).is_finite());
    }
}
