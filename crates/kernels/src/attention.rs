//! Causal attention with grouped queries, block by block with a running softmax (Dao et al.,
//! "FlashAttention", 2022): no matrix of positions by positions is ever kept.
//!
//! Blocks of keys begin at multiples of [`KEYS`] whatever is asked, and a key that a query must not see
//! adds exactly nothing to its sums (of finite numbers; the teacher refuses others). So a position's result is the same bits whether its prompt came
//! whole, in pieces, or behind a shared beginning.

use crate::{
    lanes::{Lanes, on_lanes},
    product::{Panels, Target},
};

mod documents;

pub use documents::{Documents, Projected, Stored};

/// Keys of a block.
const KEYS: usize = 128;
/// Positions whose queries are taken together.
pub const POSITIONS: usize = 32;

/// Keys and values of one sequence, position after position; each position's numbers begin `stride`
/// apart, and the head asked for is at `offset`.
#[derive(Clone, Copy)]
pub struct Kept<'a> {
    pub keys: &'a [f32],
    pub values: &'a [f32],
    pub stride: usize,
    pub offset: usize,
}

/// Queries of up to [`POSITIONS`] positions, from `first` on, for the `heads` that share a key head.
#[derive(Clone, Copy)]
pub struct Asked<'a> {
    /// `[positions, ..]`, rows `stride` apart, the heads' numbers side by side at `offset`.
    pub queries: &'a [f32],
    pub stride: usize,
    pub offset: usize,
    pub positions: usize,
    pub first: usize,
    pub heads: usize,
    pub head_dim: usize,
    /// How many positions back a query looks, itself included; all where `None`.
    pub window: Option<usize>,
}

/// Memory that one thread uses again for each call.
#[derive(Default)]
pub struct Scratch {
    queries: Vec<f32>,
    panels: Panels,
    scores: Vec<f32>,
    sums: Vec<f32>,
    mixed: Vec<f32>,
}

impl Scratch {
    /// Attends, and hands `out` each row's result: index of the position, index of the head, `head_dim` numbers.
    ///
    /// # Panics
    /// Where a slice is shorter than its strides say.
    pub fn attend(&mut self, asked: &Asked, kept: &Kept, mut out: impl FnMut(usize, usize, &[f32])) {
        let (d, heads) = (asked.head_dim, asked.heads);
        let rows = asked.positions * heads;
        let last = asked.first + asked.positions;
        assert!(kept.keys.len() >= (last - 1) * kept.stride + kept.offset + d);
        assert!(kept.values.len() >= (last - 1) * kept.stride + kept.offset + d);
        self.queries.clear();
        let scale = 1.0 / (d as f32).sqrt();
        for position in 0..asked.positions {
            let from = position * asked.stride + asked.offset;
            self.queries.extend(asked.queries[from..from + heads * d].iter().map(|x| x * scale));
        }
        self.panels.pack(&self.queries, d, rows, d);
        self.scores.resize(rows * KEYS, 0.0);
        self.mixed.clear();
        self.mixed.resize(rows * d, 0.0);
        // Running maximum and sum of each row.
        self.sums.clear();
        self.sums.resize(rows * 2, 0.0);
        for row in 0..rows {
            self.sums[row * 2] = f32::NEG_INFINITY;
        }
        let earliest = asked.window.map_or(0, |window| (asked.first + 1).saturating_sub(window));
        let mut block = earliest - earliest % KEYS;
        while block < last {
            let keys = KEYS.min(last - block);
            self.block(asked, kept, rows, block, keys);
            block += KEYS;
        }
        for row in 0..rows {
            let sum = self.sums[row * 2 + 1];
            let mixed = &mut self.mixed[row * d..(row + 1) * d];
            mixed.iter_mut().for_each(|x| *x /= sum);
            out(row / heads, row % heads, mixed);
        }
    }

    fn block(&mut self, asked: &Asked, kept: &Kept, rows: usize, block: usize, keys: usize) {
        let (d, heads) = (asked.head_dim, asked.heads);
        // SAFETY: `attend` has measured keys and values up to the last position, and made the scratch.
        unsafe {
            let first = kept.keys.as_ptr().add(block * kept.stride + kept.offset);
            let target = Target { to: self.scores.as_mut_ptr(), stride: KEYS, add: false };
            self.panels.against(first, kept.stride, 0..keys, target);
        }
        for row in 0..rows {
            let position = asked.first + row / heads;
            let seen = (position + 1).saturating_sub(block).min(keys);
            let hidden = asked.window.map_or(0, |window| (position + 1).saturating_sub(window + block)).min(seen);
            let scores = &mut self.scores[row * KEYS..row * KEYS + keys];
            scores[seen..].fill(0.0);
            scores[..hidden].fill(0.0);
            if hidden < seen {
                let (max, sum) = (self.sums[row * 2], self.sums[row * 2 + 1]);
                let visible = &mut scores[hidden..seen];
                let highest = visible.iter().copied().fold(max, f32::max);
                let shrink = if max == f32::NEG_INFINITY { 0.0 } else { (max - highest).exp() };
                // Lanes must meet the same keys whatever is hidden, so sums run over the whole block.
                // SAFETY: the slice's own bounds.
                unsafe { exponentials(visible.as_mut_ptr(), visible.len(), highest) };
                let added = unsafe { total(scores.as_ptr(), keys) };
                self.sums[row * 2] = highest;
                self.sums[row * 2 + 1] = sum * shrink + added;
                if shrink != 1.0 {
                    self.mixed[row * d..(row + 1) * d].iter_mut().for_each(|x| *x *= shrink);
                }
            }
        }
        // SAFETY: as above.
        unsafe {
            let first = kept.values.as_ptr().add(block * kept.stride + kept.offset);
            mix(self.scores.as_ptr(), KEYS, rows, first, kept.stride, keys, d, self.mixed.as_mut_ptr());
        }
    }
}

on_lanes! {
    /// `x = exp(x - max)`.
    pub(crate) unsafe fn exponentials(x: *mut f32, count: usize, max: f32) = exponentials_on
}

#[inline(always)]
unsafe fn exponentials_on<L: Lanes>(x: *mut f32, count: usize, max: f32) {
    // SAFETY: as the caller promises.
    unsafe {
        let max = L::splat(max);
        let whole = count - count % 8;
        for at in (0..whole).step_by(8) {
            L::store(x.add(at), L::exp(L::sub(L::load(x.add(at)), max)));
        }
        if whole < count {
            let rest = L::to_array(L::exp(L::sub(L::load_part(x.add(whole), count - whole, 0.0), max)));
            std::ptr::copy_nonoverlapping(rest.as_ptr(), x.add(whole), count - whole);
        }
    }
}

on_lanes! {
    unsafe fn total(x: *const f32, count: usize) -> f32 = total_on
}

#[inline(always)]
unsafe fn total_on<L: Lanes>(x: *const f32, count: usize) -> f32 {
    // SAFETY: as the caller promises.
    unsafe {
        let whole = count - count % 8;
        let mut sum = L::splat(0.0);
        for at in (0..whole).step_by(8) {
            sum = L::add(sum, L::load(x.add(at)));
        }
        if whole < count {
            sum = L::add(sum, L::load_part(x.add(whole), count - whole, 0.0));
        }
        L::sum(sum)
    }
}

on_lanes! {
    /// `out[i] += sum over s of weights[i, s] * values[s]`: `out` is `[rows, d]`, `weights` has rows
    /// `ldw` apart, `values` rows `ldv` apart.
    unsafe fn mix(
        weights: *const f32, ldw: usize, rows: usize, values: *const f32, ldv: usize, count: usize, d: usize, out: *mut f32,
    ) = mix_on
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn mix_on<L: Lanes>(
    weights: *const f32,
    ldw: usize,
    rows: usize,
    values: *const f32,
    ldv: usize,
    count: usize,
    d: usize,
    out: *mut f32,
) {
    // SAFETY: as the caller promises.
    unsafe {
        let mut row = 0;
        while row < rows {
            let here = if rows - row >= 6 { 6 } else { 3.min(rows - row) };
            let (weights, out) = (weights.add(row * ldw), out.add(row * d));
            let mut column = 0;
            while column < d {
                let (values, out) = (values.add(column), out.add(column));
                let wide = match d - column {
                    16.. => 16,
                    8..16 => 8,
                    rest => rest,
                };
                match (here, wide) {
                    (6, 16) => mix_tile::<L, 6, 2>(weights, ldw, values, ldv, count, d, out),
                    (3, 16) => mix_tile::<L, 3, 2>(weights, ldw, values, ldv, count, d, out),
                    (_, 8..) => {
                        for (row, column) in (0..here).flat_map(|row| (0..wide).step_by(8).map(move |at| (row, at))) {
                            let (weights, values) = (weights.add(row * ldw), values.add(column));
                            mix_tile::<L, 1, 1>(weights, ldw, values, ldv, count, d, out.add(row * d + column));
                        }
                    }
                    (_, rest) => {
                        for row in 0..here {
                            for column in 0..rest {
                                let mut sum = *out.add(row * d + column);
                                for s in 0..count {
                                    sum = (*weights.add(row * ldw + s)).mul_add(*values.add(s * ldv + column), sum);
                                }
                                *out.add(row * d + column) = sum;
                            }
                        }
                    }
                }
                column += wide;
            }
            row += here;
        }
    }
}

#[inline(always)]
// Indices keep the sums in registers; iterators over rows of them do not.
#[allow(clippy::needless_range_loop)]
unsafe fn mix_tile<L: Lanes, const M: usize, const N: usize>(
    weights: *const f32,
    ldw: usize,
    values: *const f32,
    ldv: usize,
    count: usize,
    d: usize,
    out: *mut f32,
) {
    // SAFETY: as the caller promises.
    unsafe {
        let mut sums = [[L::splat(0.0); N]; M];
        for row in 0..M {
            for column in 0..N {
                sums[row][column] = L::load(out.add(row * d + column * 8));
            }
        }
        for s in 0..count {
            let mut numbers = [L::splat(0.0); N];
            for column in 0..N {
                numbers[column] = L::load(values.add(s * ldv + column * 8));
            }
            for row in 0..M {
                let weight = L::splat(*weights.add(row * ldw + s));
                for column in 0..N {
                    sums[row][column] = L::fma(weight, numbers[column], sums[row][column]);
                }
            }
        }
        for row in 0..M {
            for column in 0..N {
                L::store(out.add(row * d + column * 8), sums[row][column]);
            }
        }
    }
}

#[cfg(test)]
mod tests;
