//! The gates: a pure function of the spec and the evaluation.

use retort_core::spec::Gates;

use crate::report::{GateResult, Quality};

/// One result for each gate that is set, in the spec's order. A value that is not a number passes
/// nothing.
pub fn judge(gates: &Gates, before: &Quality, after: &Quality) -> Vec<GateResult> {
    let at_most = |gate: &str, limit: Option<f64>, value: f64| {
        limit.map(|limit| GateResult { gate: gate.to_owned(), limit, value, passed: value <= limit })
    };
    let at_least = |gate: &str, limit: Option<f64>, value: f64| {
        limit.map(|limit| GateResult { gate: gate.to_owned(), limit, value, passed: value >= limit })
    };
    [
        at_most("max_kl", gates.max_kl, after.kl),
        at_most("max_kl_ratio", gates.max_kl_ratio, ratio(after.kl, before.kl)),
        at_least("min_top1_agreement", gates.min_top1_agreement, after.top1_agreement),
        at_most(
            "max_perplexity_ratio",
            gates.max_perplexity_ratio,
            ratio(after.student_perplexity, after.teacher_perplexity),
        ),
        at_most("max_calibration_error", gates.max_calibration_error, after.calibration_error.unwrap_or(f64::NAN)),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Whether the candidate may be promoted. Nothing judged promotes nothing.
pub fn promotes(results: &[GateResult], after: &Quality) -> bool {
    after.tokens > 0 && results.iter().all(|result| result.passed)
}

/// An estimate of something that is never negative may be, where it is nearly nothing. A student that was perfect
/// before training has nothing to gain: 1 where it is so still, and without end where it is not.
fn ratio(value: f64, of: f64) -> f64 {
    match (value <= 0.0, of <= 0.0) {
        (true, true) => 1.0,
        (false, true) if !value.is_nan() => f64::INFINITY,
        _ => value / of,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quality(kl: f64, top1: f64, student: f64, teacher: f64) -> Quality {
        Quality {
            kl,
            top1_agreement: top1,
            student_perplexity: student,
            teacher_perplexity: teacher,
            tokens: 10,
            calibration_error: Some(kl / 4.0),
            teacher_calibration_error: None,
        }
    }

    fn check(gates: Gates, expected: &[(&str, f64, bool)]) {
        let results = judge(&gates, &quality(2.0, 0.1, 90.0, 10.0), &quality(0.5, 0.6, 15.0, 10.0));
        let found: Vec<_> = results.iter().map(|r| (r.gate.as_str(), r.value, r.passed)).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn each_gate_compares_its_own_value() {
        check(Gates { max_kl: Some(0.5), ..Gates::default() }, &[("max_kl", 0.5, true)]);
        check(Gates { max_kl: Some(0.49), ..Gates::default() }, &[("max_kl", 0.5, false)]);
        check(Gates { max_kl_ratio: Some(0.25), ..Gates::default() }, &[("max_kl_ratio", 0.25, true)]);
        check(Gates { max_kl_ratio: Some(0.2), ..Gates::default() }, &[("max_kl_ratio", 0.25, false)]);
        check(Gates { min_top1_agreement: Some(0.6), ..Gates::default() }, &[("min_top1_agreement", 0.6, true)]);
        check(Gates { min_top1_agreement: Some(0.7), ..Gates::default() }, &[("min_top1_agreement", 0.6, false)]);
        check(Gates { max_perplexity_ratio: Some(1.5), ..Gates::default() }, &[("max_perplexity_ratio", 1.5, true)]);
        check(Gates { max_perplexity_ratio: Some(1.4), ..Gates::default() }, &[("max_perplexity_ratio", 1.5, false)]);
        let calibrated = |limit| Gates { max_calibration_error: Some(limit), ..Gates::default() };
        check(calibrated(0.125), &[("max_calibration_error", 0.125, true)]);
        check(calibrated(0.12), &[("max_calibration_error", 0.125, false)]);
        check(Gates::default(), &[]);
    }

    #[test]
    fn what_is_not_a_number_passes_nothing() {
        let gates = Gates {
            max_kl: Some(1e6),
            max_kl_ratio: Some(1e6),
            min_top1_agreement: Some(0.0),
            max_perplexity_ratio: Some(1e6),
            max_calibration_error: Some(1.0),
        };
        let nan = Quality { calibration_error: None, ..quality(f64::NAN, f64::NAN, f64::INFINITY, 10.0) };
        assert!(judge(&gates, &quality(2.0, 0.1, 90.0, 10.0), &nan).iter().all(|result| !result.passed));
    }

    /// The held-out KL is a mean over sampled entries: of a perfect student it lies on either side of 0.
    #[test]
    fn a_student_that_was_perfect_can_only_lose() {
        let gates = Gates { max_kl_ratio: Some(1.5), ..Gates::default() };
        let of = |before: f64, after: f64| {
            let result = judge(&gates, &quality(before, 0.5, 10.0, 10.0), &quality(after, 0.5, 10.0, 10.0)).remove(0);
            (result.value, result.passed)
        };
        for before in [-1e-4, 0.0] {
            assert_eq!(of(before, 0.3), (f64::INFINITY, false));
            assert_eq!(of(before, 1e-6), (f64::INFINITY, false));
            for after in [0.0, -1e-4, -2e-4] {
                assert_eq!(of(before, after), (1.0, true));
            }
            assert!(!of(before, f64::NAN).1);
        }
        assert_eq!(of(0.3, -3e-4), (-0.001, true));
        assert!(!of(f64::NAN, 0.3).1);
    }

    #[test]
    fn promotion_needs_every_gate_and_something_judged() {
        let good = quality(0.1, 0.9, 11.0, 10.0);
        assert!(promotes(&[], &good));
        assert!(!promotes(&[], &Quality { tokens: 0, ..good.clone() }));
        let gate = |passed| GateResult { gate: "max_kl".into(), limit: 1.0, value: 0.5, passed };
        assert!(promotes(&[gate(true), gate(true)], &good));
        assert!(!promotes(&[gate(true), gate(false)], &good));
    }
}
