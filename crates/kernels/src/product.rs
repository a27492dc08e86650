//! `x w^T`: activations times weights, row by row the same bits in any company.
//!
//! A sum over a row's `k` numbers runs in eight lanes, one number in eight to each, in ascending order;
//! then the lanes are added in a fixed order; every 768 numbers the sum so far goes to memory, so that
//! the weights at hand stay in the first-level cache. Nothing in that depends on how many rows are computed
//! together, on which thread, or in which tile, so a sequence's numbers are the same alone, in a batch,
//! and in any stage of a group.
//!
//! Tiles are three rows of activations by four of weights: twelve sums in registers, seven loads for
//! twelve multiplications. Weights that are not f32 are widened four rows at a time, into a scratch
//! that stays in the first-level cache while all activations of the caller pass by it.

use crate::{
    lanes::{Lanes, on_lanes},
    matrix::Matrix,
};

/// What becomes of a sum.
#[derive(Clone, Copy)]
pub enum Into {
    Store,
    Add,
}

const TILE_ROWS: usize = 3;
const TILE_OUTPUTS: usize = 4;
/// Products summed before a sum goes to memory.
const RUN: usize = 768;

/// `out[i, j] (+)= x[i] . w[j] + bias[j]` for all rows `i` of `x` (`[m, k]`, rows `ldx` apart) and all
/// rows `j` of `w`; `out` has rows `ldo` apart.
///
/// # Panics
/// Where a slice is shorter than its shape.
#[allow(clippy::too_many_arguments)]
pub fn linear(
    x: &[f32],
    ldx: usize,
    m: usize,
    w: &Matrix,
    bias: Option<&[f32]>,
    into: Into,
    out: &mut [f32],
    ldo: usize,
) {
    let (n, k) = (w.rows(), w.columns());
    if m == 0 || n == 0 {
        return;
    }
    assert!(x.len() >= (m - 1) * ldx + k && out.len() >= (m - 1) * ldo + n && bias.is_none_or(|bias| bias.len() == n));
    let mut scratch = vec![0.0; if w.in_place(0).is_some() { 0 } else { TILE_OUTPUTS * k }];
    let mut first = 0;
    while first < n {
        let count = TILE_OUTPUTS.min(n - first);
        let (weights, next) = match w.in_place(first) {
            Some(weights) => (weights, w.in_place((first + TILE_OUTPUTS).min(n - 1)).unwrap_or(weights)),
            None => {
                for (row, out) in scratch.chunks_exact_mut(k).take(count).enumerate() {
                    w.read_row(first + row, out);
                }
                (scratch.as_ptr(), scratch.as_ptr())
            }
        };
        let to = out[first..].as_mut_ptr();
        // SAFETY: `weights` has `count` rows of `k`, and the assertion above has measured `x` and `out`.
        unsafe { strip(x.as_ptr(), ldx, m, weights, k, count, k, next, to, ldo, matches!(into, Into::Add)) };
        if let Some(bias) = bias {
            for row in out[first..].chunks_mut(ldo).take(m) {
                for (out, bias) in row.iter_mut().zip(&bias[first..first + count]) {
                    *out += bias;
                }
            }
        }
        first += count;
    }
}

on_lanes! {
    /// All `m` rows of `x` against up to four rows of weights `ldw` apart: sums of `k` products into
    /// `to`, whose rows are `ldo` apart. `next` is where the next weights lie, or any address.
    ///
    /// # Safety
    /// `x` must be good for `m` rows of `k`, `w` for `outputs` rows of `k`, `to` for `m` rows of
    /// `outputs`.
    pub(crate) unsafe fn strip(
        x: *const f32, ldx: usize, m: usize, w: *const f32, ldw: usize, outputs: usize, k: usize,
        next: *const f32, to: *mut f32, ldo: usize, add: bool,
    ) = strip_on
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn strip_on<L: Lanes>(
    x: *const f32,
    ldx: usize,
    m: usize,
    w: *const f32,
    ldw: usize,
    outputs: usize,
    k: usize,
    next: *const f32,
    to: *mut f32,
    ldo: usize,
    add: bool,
) {
    // SAFETY: as the caller of `strip` promises.
    unsafe {
        let mut from = 0;
        while from < k {
            let run = RUN.min(k - from);
            run_on::<L>(
                x.add(from),
                ldx,
                m,
                w.add(from),
                ldw,
                outputs,
                run,
                next.wrapping_add(from),
                to,
                ldo,
                add || from > 0,
            );
            from += run;
        }
    }
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn run_on<L: Lanes>(
    x: *const f32,
    ldx: usize,
    m: usize,
    w: *const f32,
    ldw: usize,
    outputs: usize,
    k: usize,
    next: *const f32,
    to: *mut f32,
    ldo: usize,
    add: bool,
) {
    // SAFETY: as the caller of `strip` promises.
    unsafe {
        // The next weights are asked for, a line of each row with each tile.
        let tiles = m.div_ceil(TILE_ROWS);
        let share = (k * 4).div_ceil(64).div_ceil(tiles);
        let mut line = 0;
        let mut row = 0;
        while row < m {
            for at in line..line + share {
                for output in 0..TILE_OUTPUTS {
                    L::prefetch(next.wrapping_add(output * ldw + at * 16).cast());
                }
            }
            line += share;
            let (x, to) = (x.add(row * ldx), to.add(row * ldo));
            match (m - row, outputs) {
                (1, 4) => tile::<L, 1, 4>(x, ldx, w, ldw, k, to, ldo, add),
                (2, 4) => tile::<L, 2, 4>(x, ldx, w, ldw, k, to, ldo, add),
                (_, 4) => tile::<L, 3, 4>(x, ldx, w, ldw, k, to, ldo, add),
                (rows, _) => {
                    for row in 0..rows.min(TILE_ROWS) {
                        for output in 0..outputs {
                            let (x, w) = (x.add(row * ldx), w.add(output * ldw));
                            tile::<L, 1, 1>(x, ldx, w, ldw, k, to.add(row * ldo + output), ldo, add);
                        }
                    }
                }
            }
            row += TILE_ROWS;
        }
    }
}

/// `M` rows against `N` (up to four) rows of weights.
#[inline(always)]
// Indices keep the sums in registers; iterators over rows of them do not.
#[allow(clippy::too_many_arguments, clippy::needless_range_loop)]
unsafe fn tile<L: Lanes, const M: usize, const N: usize>(
    x: *const f32,
    ldx: usize,
    w: *const f32,
    ldw: usize,
    k: usize,
    to: *mut f32,
    ldo: usize,
    add: bool,
) {
    // SAFETY: as the caller of `strip` promises.
    unsafe {
        let mut sums = [[L::splat(0.0); N]; M];
        let whole = k - k % 8;
        let mut at = 0;
        while at < whole {
            let mut rows = [L::splat(0.0); M];
            for (row, numbers) in rows.iter_mut().enumerate() {
                *numbers = L::load(x.add(row * ldx + at));
            }
            for output in 0..N {
                let weights = L::load(w.add(output * ldw + at));
                for row in 0..M {
                    sums[row][output] = L::fma(rows[row], weights, sums[row][output]);
                }
            }
            at += 8;
        }
        if whole < k {
            for output in 0..N {
                let weights = L::load_part(w.add(output * ldw + whole), k - whole, 0.0);
                for (row, sums) in sums.iter_mut().enumerate() {
                    sums[output] =
                        L::fma(L::load_part(x.add(row * ldx + whole), k - whole, 0.0), weights, sums[output]);
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            let mut four = [L::splat(0.0); 4];
            four[..N].copy_from_slice(sums);
            let four = L::sums(four);
            for (output, sum) in four.iter().enumerate().take(N) {
                let to = to.add(row * ldo + output);
                *to = if add { *to + sum } else { *sum };
            }
        }
    }
}

#[cfg(test)]
mod tests;
