//! Version 1's byte of a log-probability, counted down from the position's maximum.
//!
//! Byte 0 is the most likely token itself, whose log-probability is stored exactly beside it. The
//! others count intervals below the maximum and are read as an interval's middle: bytes 1 to 128 steps
//! of 1/16 nat down to 8 nat, bytes 129 to 255 steps of 1/4 nat down to 39.75 nat. So the error is at
//! most 1/32 nat where a token has more than e^-8 of the maximum's probability and 1/8 nat below, and
//! no other entry, a tie included, can be read back as the most likely one. A sure teacher needs the
//! far range: the 32nd token of a position can lie 20 nat below the first. What lies below 39.75 nat
//! is stored as 255; its probability is under 1e-17 of the maximum's.

/// Value of `retort.quantiser`.
pub(in super::super) const NAME: &str = "u8-step-1/16-to-8-then-1/4-nat-below-max";
/// Largest error of a log-probability inside the range, nats.
const MAX_ERROR: f64 = 1.0 / 8.0;

/// Where the fine steps end, nats, and the byte they end with.
const NEAR: f64 = 8.0;
const NEAR_STEPS: u8 = 128;

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
/// one factor. The factor stays within what rounding
/// can explain, so where almost all mass is the maximum's the sum may miss by about 1e-7.
pub(super) fn head_masses(max: f32, tail_mass: f32, qs: &[u8], masses: &mut Vec<f64>) {
    masses.clear();
    let top = f64::from(max).exp();
    let rest: f64 = qs.iter().filter(|&&q| q != 0).map(|&q| dequantise(max, q).exp()).sum();
    let bound = MAX_ERROR.exp();
    let wanted = 1.0 - f64::from(tail_mass) - top;
    let scale = if rest > 0.0 { (wanted / rest).clamp(1.0 / bound, bound) } else { 1.0 };
    masses.extend(qs.iter().map(|&q| if q == 0 { top } else { dequantise(max, q).exp() * scale }));
}
