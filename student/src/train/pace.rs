use std::{collections::VecDeque, time::Duration};

/// Steps that a rate is told over: enough that one beside a checkpoint does not double the time that is left.
const STEPS: usize = 16;

/// How fast the last steps were.
#[derive(Debug, Default)]
pub(super) struct Pace(VecDeque<(u64, f64)>);

impl Pace {
    /// Tokens a second over the last steps, after another one of so many tokens and seconds.
    pub(super) fn after(&mut self, tokens: u64, seconds: f64) -> f64 {
        if self.0.len() == STEPS {
            self.0.pop_front();
        }
        self.0.push_back((tokens, seconds));
        let (tokens, seconds) = self.0.iter().fold((0, 0.0), |(all, took), (of, s)| (all + of, took + s));
        tokens as f64 / seconds.max(Duration::from_nanos(1).as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_slow_step_among_many_changes_little() {
        let mut pace = Pace::default();
        assert_eq!(pace.after(100, 1.0), 100.0);
        for _ in 1..STEPS {
            pace.after(100, 1.0);
        }
        assert_eq!(pace.after(100, 3.0), 100.0 * 16.0 / 18.0);
        for _ in 0..STEPS {
            pace.after(200, 1.0);
        }
        assert_eq!(pace.after(200, 1.0), 200.0, "what lies further back is forgotten");
        assert!(Pace::default().after(1, 0.0).is_finite());
    }
}
