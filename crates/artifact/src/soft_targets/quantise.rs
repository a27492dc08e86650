//! One byte a log-probability, counted down from the position's maximum.
//!
//! Byte 0 is the most likely token itself, whose log-probability is stored beside it. The others count
//! intervals below the maximum and are read as an interval's middle; the intervals double in width as
//! the probability falls: 1/16 nat down to 8 nat, 1/8 down to 16, 1/4 down to 31.75. So the error is at
//! most 1/32, 1/16 and 1/8 nat, and no other entry, a tie included, can be read back as the most likely
//! one. What lies lower still is stored as 255; its probability is under 1e-13 of the maximum's.

/// Value of `retort.quantiser` where log-probabilities are bytes.
pub const NAME: &str = "u8-step-1/16-to-8-1/8-to-16-1/4-nat-below-max";
/// Where they are floats.
pub const NAME_F32: &str = "f32";
/// Largest error of a log-probability less than 8 nat below the maximum, nats.
pub const NEAR_ERROR: f32 = 1.0 / 32.0;
/// Largest error of a log-probability inside the range, nats.
pub const MAX_ERROR: f32 = 1.0 / 8.0;
/// Distance below the maximum that a byte can say, nats.
pub const RANGE: f32 = 31.75;

/// Where a width of interval begins, nats below the maximum; the byte of its first interval; how many
/// intervals a nat has.
const PIECES: [(f64, u8, f64); 3] = [(16.0, 193, 4.0), (8.0, 129, 8.0), (0.0, 1, 16.0)];

/// Byte of an entry that is not the most likely one. `max` must not be below `logprob`.
pub(super) fn quantise(max: f32, logprob: f32) -> u8 {
    let below = (f64::from(max) - f64::from(logprob)).max(0.0);
    let (start, first, per_nat) = PIECES.into_iter().find(|&(start, ..)| below >= start).unwrap_or(PIECES[2]);
    // A float-to-integer cast saturates, so what lies outside the range becomes 255.
    ((below - start) * per_nat).floor().min(f64::from(u8::MAX - first)) as u8 + first
}

/// Nats below the maximum that a byte stands for.
pub(super) fn below_max(q: u8) -> f64 {
    match PIECES.into_iter().find(|&(_, first, _)| q >= first) {
        Some((start, first, per_nat)) => start + (f64::from(q - first) + 0.5) / per_nat,
        None => 0.0,
    }
}

/// Rounds to eight significant bits, as bfloat16 has them: by 1/256 at most, and the bytes
/// that become zero take no room.
pub(super) fn coarse(value: f32) -> f32 {
    let bits = value.to_bits();
    f32::from_bits(bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) & 0xffff_0000)
}

/// A share of one, rounded so that it and what it leaves both keep eight significant bits.
pub(super) fn coarse_share(share: f64) -> f32 {
    if share > 0.5 { 1.0 - coarse((1.0 - share) as f32) } else { coarse(share as f32) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_stay_within_their_bounds_over_the_range() {
        let mut worst = [0.0f64; 3];
        for max in [-1e-4f32, -0.7, -9.3] {
            for i in 0..508_000u32 {
                let logprob = max - i as f32 / 16_000.0;
                let q = quantise(max, logprob);
                assert!(q > 0);
                let below = f64::from(max) - f64::from(logprob);
                let error = (below_max(q) - below).abs();
                let piece = if below < 8.0 { 0 } else { 1 + usize::from(below >= 16.0) };
                worst[piece] = worst[piece].max(error);
            }
        }
        for (worst, bound) in worst.into_iter().zip([NEAR_ERROR, NEAR_ERROR * 2.0, MAX_ERROR]) {
            let bound = f64::from(bound);
            assert!(worst <= bound + 1e-6 && worst > bound * 0.99, "{worst} against {bound}: it should be tight");
        }
    }

    #[test]
    fn bytes_rise_as_probabilities_fall() {
        let bytes: Vec<u8> = (0..4000).map(|i| quantise(0.0, -(i as f32) / 100.0)).collect();
        assert!(bytes.is_sorted());
        assert_eq!((bytes[0], bytes[3999]), (1, 255));
        assert!((1..=u8::MAX).map(below_max).is_sorted_by(|a, b| a < b));
        for below in [RANGE, 40.0, 200.0, f32::MAX] {
            assert_eq!(quantise(0.0, -below), 255);
        }
    }

    #[test]
    fn a_tie_stays_below_the_maximum() {
        assert_eq!(quantise(-0.5, -0.5), 1);
        assert!(below_max(1) > below_max(0));
    }

    #[test]
    fn a_share_and_its_rest_both_keep_eight_bits() {
        for share in [0.0, 1e-6, 0.3, 0.5, 0.51, 0.9, 0.999, 0.99999, 1.0] {
            let found = f64::from(coarse_share(share));
            assert!((found - share).abs() <= share / 256.0, "{share} became {found}");
            assert!((found - share).abs() <= (1.0 - share) / 256.0 + 1e-7, "{share} became {found}");
        }
    }

    #[test]
    fn eight_bits_are_within_a_256th() {
        for value in [-0.5f32, -1e-5, -13.37, 1.0, 0.999, 3e-7, 0.0, -0.0] {
            let rounded = coarse(value);
            assert!((rounded - value).abs() <= value.abs() / 256.0, "{value} became {rounded}");
            assert_eq!(rounded.to_bits() & 0xffff, 0);
            assert_eq!(coarse(rounded), rounded);
        }
    }
}
