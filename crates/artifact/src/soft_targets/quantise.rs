//! One byte a log-probability, counted down from the position's maximum.
//!
//! Byte 0 is the most likely token itself, whose log-probability is stored exactly beside it. The
//! others count intervals below the maximum and are read as an interval's middle: bytes 1 to 128 steps
//! of 1/16 nat down to 8 nat, bytes 129 to 255 steps of 1/4 nat down to 39.75 nat. So the error is at
//! most 1/32 nat where a token has more than e^-8 of the maximum's probability and 1/8 nat below, and
//! no other entry, a tie included, can be read back as the most likely one. A sure teacher needs the
//! far range: the 32nd token of a position can lie 20 nat below the first. What lies below 39.75 nat
//! is stored as 255; its probability is under 1e-17 of the maximum's.

/// Value of `retort.quantiser`.
pub const NAME: &str = "u8-step-1/16-to-8-then-1/4-nat-below-max";
/// Largest error of a log-probability less than 8 nat below the maximum, nats.
pub const NEAR_ERROR: f32 = 1.0 / 32.0;
/// Largest error of a log-probability inside the range, nats.
pub const MAX_ERROR: f32 = 1.0 / 8.0;
/// Distance below the maximum that a byte can say, nats.
pub const RANGE: f32 = NEAR as f32 + 127.0 / 4.0;

/// Where the fine steps end, nats, and the byte they end with.
const NEAR: f64 = 8.0;
const NEAR_STEPS: u8 = 128;

/// Byte of an entry that is not the most likely one. `max` must not be below `logprob`.
pub(super) fn quantise(max: f32, logprob: f32) -> u8 {
    let below = (f64::from(max) - f64::from(logprob)).max(0.0);
    if below < NEAR {
        (below * 16.0).floor() as u8 + 1
    } else {
        // A float-to-integer cast saturates, so what lies outside the range becomes 126.
        (((below - NEAR) * 4.0).floor() as u64).min(126) as u8 + NEAR_STEPS + 1
    }
}

/// Log-probability that a byte stands for.
pub(super) fn dequantise(max: f32, q: u8) -> f64 {
    match q {
        0 => f64::from(max),
        q if q <= NEAR_STEPS => f64::from(max) - (f64::from(q) - 0.5) / 16.0,
        q => f64::from(max) - NEAR - (f64::from(q - NEAR_STEPS) - 0.5) / 4.0,
    }
}

/// Masses of a head's entries from their stored bytes, so that they sum to `1 - tail_mass`.
///
/// The maximum is stored exactly, so rounding is spread over the others alone: they are scaled by
/// one factor. That comes closer to the truth than scaling all or none of them (the test
/// `scaling_the_rest_of_the_head_is_closest` measures it). The factor stays within what rounding
/// can explain, so where almost all mass is the maximum's the sum may miss by about 1e-7.
pub(super) fn head_masses(max: f32, tail_mass: f32, qs: &[u8], masses: &mut Vec<f64>) {
    masses.clear();
    let top = f64::from(max).exp();
    let rest: f64 = qs.iter().filter(|&&q| q != 0).map(|&q| dequantise(max, q).exp()).sum();
    let bound = f64::from(MAX_ERROR).exp();
    let wanted = 1.0 - f64::from(tail_mass) - top;
    let scale = if rest > 0.0 { (wanted / rest).clamp(1.0 / bound, bound) } else { 1.0 };
    masses.extend(qs.iter().map(|&q| if q == 0 { top } else { dequantise(max, q).exp() * scale }));
}

#[cfg(test)]
mod tests {
    use retort_core::random::{Counter, Purpose};

    use super::*;

    #[test]
    fn errors_stay_within_their_bounds_over_the_range() {
        let (mut near, mut far) = (0.0f64, 0.0f64);
        for max in [-1e-4f32, -0.7, -9.3] {
            for i in 0..636_000u32 {
                let logprob = max - i as f32 / 16_000.0;
                let q = quantise(max, logprob);
                assert!(q > 0);
                let error = (dequantise(max, q) - f64::from(logprob)).abs();
                let worst = if i < 128_000 { &mut near } else { &mut far };
                *worst = worst.max(error);
            }
        }
        assert!(near <= f64::from(NEAR_ERROR) + 1e-6 && far <= f64::from(MAX_ERROR) + 1e-5, "{near} {far}");
        assert!(near > 0.031 && far > 0.124, "{near} {far}: the stated bounds should be tight");
    }

    #[test]
    fn what_lies_below_the_range_is_clamped() {
        for below in [RANGE, 40.0, 200.0, f32::MAX] {
            assert_eq!(quantise(0.0, -below), 255);
        }
        assert!((dequantise(0.0, 255) + 39.625).abs() < 1e-12);
    }

    #[test]
    fn a_tie_stays_below_the_maximum() {
        assert_eq!(quantise(-0.5, -0.5), 1);
        assert!(dequantise(-0.5, 1) < f64::from(-0.5f32));
    }

    /// Three ways to make the head's stored masses whole, against the unquantised truth.
    #[test]
    fn scaling_the_rest_of_the_head_is_closest() {
        let mut error = [0.0f64; 3];
        for position in 0..2000 {
            let mut rng = Counter::new(11, Purpose::Sample, 0, position);
            let sharpness = 0.2 + 3.0 * rng.next_f64();
            let logits: Vec<f64> = (0..200).map(|i| -sharpness * f64::from(i + 1).ln() - rng.next_f64()).collect();
            let norm = logits.iter().map(|l| l.exp()).sum::<f64>().ln();
            let mut logprobs: Vec<f32> = logits.iter().map(|l| (l - norm) as f32).collect();
            logprobs.sort_by(|a, b| b.total_cmp(a));
            let head = &logprobs[..32];
            let truth: Vec<f64> = head.iter().map(|&lp| f64::from(lp).exp()).collect();
            let tail_mass = (1.0 - truth.iter().sum::<f64>()) as f32;
            let qs: Vec<u8> =
                head.iter().enumerate().map(|(i, &lp)| if i == 0 { 0 } else { quantise(head[0], lp) }).collect();
            let plain: Vec<f64> = qs.iter().map(|&q| dequantise(head[0], q).exp()).collect();
            let all = (1.0 - f64::from(tail_mass)) / plain.iter().sum::<f64>();
            let mut rest = Vec::new();
            head_masses(head[0], tail_mass, &qs, &mut rest);
            assert!((rest.iter().sum::<f64>() - (1.0 - f64::from(tail_mass))).abs() < 1e-9);
            for (i, &t) in truth.iter().enumerate() {
                for (e, m) in error.iter_mut().zip([plain[i], plain[i] * all, rest[i]]) {
                    *e += (m - t).abs();
                }
            }
        }
        assert!(error[2] < error[0] && error[2] < error[1], "none, all, rest: {error:?}");
    }
}
