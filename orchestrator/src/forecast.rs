//! What the report says of more target tokens: pure.

use retort_artifact::checkpoint::HeldOut;
use retort_core::spec::{JobSpec, Schedule};
use retort_plan::forecast::{Point, forecast};

use crate::report::Forecast;

/// From a run's held-out curve; None of no curve. Points of a smaller sample than the last one's are left out.
pub fn of(spec: &JobSpec, curve: Vec<HeldOut>) -> Option<Forecast> {
    let sample = curve.last()?.tokens;
    let comparable = curve.iter().filter(|point| point.tokens == sample);
    let points: Vec<Point> = comparable.map(|point| Point { tokens: point.target_tokens, kl: point.kl }).collect();
    let decaying = spec.train.schedule != Schedule::Constant;
    Some(match forecast(&points, spec.seed) {
        Ok(fit) => Forecast { curve, fit: Some(fit), none: String::new(), decaying },
        Err(unfit) => Forecast { curve, fit: None, none: unfit.to_string(), decaying },
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn curve(tokens: impl Fn(u32) -> u64) -> Vec<HeldOut> {
        let point = |step: u32| HeldOut {
            step,
            target_tokens: u64::from(step) * 100,
            kl: 0.5 + 20.0 / f64::from(step * 100).sqrt(),
            tokens: tokens(step),
            ..HeldOut::default()
        };
        (1..=9).map(point).collect()
    }

    #[test]
    fn a_curve_is_continued_and_kept() {
        let spec = crate::testing::spec(Path::new("/nowhere"));
        let made = of(&spec, curve(|_| 50)).unwrap();
        assert_eq!((made.curve.len(), made.none.as_str(), made.decaying), (9, "", true));
        let fit = made.fit.unwrap();
        assert_eq!(fit.points, 9);
        assert!((fit.predictions[0].kl - (0.5 + 20.0 / 1800f64.sqrt())).abs() < 1e-3, "{fit:?}");
        let mut constant = spec;
        constant.train.schedule = Schedule::Constant;
        assert!(!of(&constant, curve(|_| 50)).unwrap().decaying);
        assert_eq!(of(&constant, Vec::new()), None);
    }

    #[test]
    fn what_was_judged_on_fewer_rows_is_left_out() {
        let spec = crate::testing::spec(Path::new("/nowhere"));
        let made = of(&spec, curve(|step| if step < 6 { 20 } else { 50 })).unwrap();
        assert_eq!((made.curve.len(), made.fit), (9, None));
        assert!(made.none.starts_with("the held-out curve has 4 of the 5 points that a fit needs"), "{}", made.none);
    }
}
