//! What happens to single rows between the products: norm, rotation, gate, scale, and to bf16 and back.

use half::bf16;

use crate::lanes::{Lanes, on_lanes};

/// RMSNorm of each row of `x`, `[m, h]` with `h` numbers in `weight`, into `out` (Zhang and Sennrich, "Root
/// Mean Square Layer Normalization", 2019).
pub fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    let width = weight.len().max(1);
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        // SAFETY: all three hold `width` numbers.
        unsafe { norm_row(x.as_ptr(), weight.as_ptr(), width, epsilon, out.as_mut_ptr()) };
    }
}

/// `gate = silu(gate) * up`, number by number (SwiGLU: Shazeer, "GLU Variants Improve Transformer", 2020).
pub fn swiglu(gate: &mut [f32], up: &[f32]) {
    let count = gate.len().min(up.len());
    // SAFETY: both hold `count` numbers.
    unsafe { swiglu_run(gate.as_mut_ptr(), up.as_ptr(), count) };
}

/// Turns pairs `(i, i + d / 2)` of each head of a row by the angles of its position: `cos` and `sin`
/// hold `d / 2` numbers (Su et al., "RoFormer", 2021, in the half-split layout of Hugging Face).
pub fn rotate(row: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = cos.len().min(sin.len()).max(1);
    for head in row.chunks_exact_mut(2 * half) {
        let (first, second) = head.split_at_mut(half);
        for (((first, second), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
            let (x, y) = (*first, *second);
            *first = x * cos - y * sin;
            *second = y * cos + x * sin;
        }
    }
}

/// Multiplies each number.
pub fn scale(row: &mut [f32], factor: f32) {
    // SAFETY: no more than the processor's own instructions.
    unsafe { scale_run(row, factor) };
}

/// Each number of `from` in f32, as many as both hold.
pub fn widen_bf16(from: &[bf16], to: &mut [f32]) {
    // SAFETY: as above.
    unsafe { widen_run(from, to) };
}

/// Each number of `from` rounded to the nearest bf16, ties to even; as many as both hold.
pub fn narrow_bf16(from: &[f32], to: &mut [bf16]) {
    // SAFETY: as above.
    unsafe { narrow_run(from, to) };
}

on_lanes! {
    unsafe fn scale_run(row: &mut [f32], factor: f32) = scale_on
}

// These loops are plain: compiled with the processor's instructions, they become vectors.
#[inline(always)]
unsafe fn scale_on<L: Lanes>(row: &mut [f32], factor: f32) {
    row.iter_mut().for_each(|x| *x *= factor);
}

on_lanes! {
    unsafe fn widen_run(from: &[bf16], to: &mut [f32]) = widen_on
}

#[inline(always)]
unsafe fn widen_on<L: Lanes>(from: &[bf16], to: &mut [f32]) {
    for (from, to) in from.iter().zip(to) {
        *to = f32::from_bits(u32::from(from.to_bits()) << 16);
    }
}

on_lanes! {
    unsafe fn narrow_run(from: &[f32], to: &mut [bf16]) = narrow_on
}

#[inline(always)]
unsafe fn narrow_on<L: Lanes>(from: &[f32], to: &mut [bf16]) {
    for (from, to) in from.iter().zip(to) {
        let bits = from.to_bits();
        // Rounding must not carry a not-a-number's bits over into an infinity.
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
        let kept = if from.is_nan() { bits | 0x0040_0000 } else { rounded };
        *to = bf16::from_bits((kept >> 16) as u16);
    }
}

on_lanes! {
    unsafe fn norm_row(x: *const f32, weight: *const f32, width: usize, epsilon: f32, out: *mut f32) = norm_row_on
}

#[inline(always)]
unsafe fn norm_row_on<L: Lanes>(x: *const f32, weight: *const f32, width: usize, epsilon: f32, out: *mut f32) {
    let whole = width - width % 8;
    // SAFETY: as the caller promises.
    unsafe {
        let mut squares = L::splat(0.0);
        for at in (0..whole).step_by(8) {
            let numbers = L::load(x.add(at));
            squares = L::fma(numbers, numbers, squares);
        }
        let mut sum = L::sum(squares);
        for at in whole..width {
            sum += *x.add(at) * *x.add(at);
        }
        let scale = 1.0 / (sum / width as f32 + epsilon).sqrt();
        let scales = L::splat(scale);
        for at in (0..whole).step_by(8) {
            let normed = L::mul(L::load(x.add(at)), scales);
            L::store(out.add(at), L::mul(normed, L::load(weight.add(at))));
        }
        for at in whole..width {
            *out.add(at) = *x.add(at) * scale * *weight.add(at);
        }
    }
}

on_lanes! {
    unsafe fn swiglu_run(gate: *mut f32, up: *const f32, count: usize) = swiglu_run_on
}

#[inline(always)]
unsafe fn swiglu_run_on<L: Lanes>(gate: *mut f32, up: *const f32, count: usize) {
    // SAFETY: as the caller promises.
    unsafe {
        let whole = count - count % 8;
        for at in (0..whole).step_by(8) {
            L::store(gate.add(at), L::mul(silu::<L>(L::load(gate.add(at))), L::load(up.add(at))));
        }
        if whole < count {
            let gated = silu::<L>(L::load_part(gate.add(whole), count - whole, 0.0));
            let gated = L::to_array(L::mul(gated, L::load_part(up.add(whole), count - whole, 0.0)));
            std::ptr::copy_nonoverlapping(gated.as_ptr(), gate.add(whole), count - whole);
        }
    }
}

// No closure: it would not have the instructions of the function around it.
#[inline(always)]
unsafe fn silu<L: Lanes>(x: L::V) -> L::V {
    // SAFETY: as the caller promises.
    unsafe { L::div(x, L::add(L::splat(1.0), L::exp(L::sub(L::splat(0.0), x)))) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn bf16_is_rounded_as_half_rounds_it(bits in prop::collection::vec(any::<u32>(), 0..40)) {
            let wide: Vec<f32> = bits.iter().map(|&bits| f32::from_bits(bits)).collect();
            let mut narrow = vec![bf16::ZERO; wide.len()];
            narrow_bf16(&wide, &mut narrow);
            let mut back = vec![0.0; wide.len()];
            widen_bf16(&narrow, &mut back);
            for ((&wide, &narrow), &back) in wide.iter().zip(&narrow).zip(&back) {
                prop_assert_eq!(narrow.to_bits(), bf16::from_f32(wide).to_bits());
                prop_assert_eq!(back.to_bits(), narrow.to_f32().to_bits());
            }
        }
    }

    #[test]
    fn ties_go_to_even_and_the_largest_to_infinity() {
        let wide = [f32::from_bits(0x3f80_8000), f32::from_bits(0x3f81_8000), f32::MAX, f32::NAN, -0.0];
        let mut narrow = [bf16::ZERO; 5];
        narrow_bf16(&wide, &mut narrow);
        assert_eq!(narrow.map(bf16::to_bits)[..3], [0x3f80, 0x3f82, 0x7f80]);
        assert!(narrow[3].is_nan());
        assert_eq!(narrow[4].to_bits(), 0x8000);
        let mut row = [1.0, -2.0, 0.5];
        scale(&mut row, 3.0);
        assert_eq!(row, [3.0, -6.0, 1.5]);
    }
}
