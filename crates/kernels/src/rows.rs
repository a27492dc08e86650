//! What happens to single rows between the products: norm, rotation, gate.

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
