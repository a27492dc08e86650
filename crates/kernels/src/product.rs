//! `x w^T`: activations times weights, row by row the same bits in any company.
//!
//! A sum over a row's `k` numbers runs in ascending order, one fused multiply-add after another; every 768
//! numbers the sum so far goes to memory, so that what is at hand stays in the first two levels of cache.
//! Nothing in that depends on how many rows are computed together, on which thread, or in which tile, so a
//! sequence's numbers are the same alone, in a batch, and in any stage of a group.
//!
//! Activations are packed into panels, 16 rows side by side for each of the `k` numbers; weights are read
//! where they lie, one number at a time to all lanes. A tile is 16 rows by six outputs: twelve sums in
//! registers, eight loads for twelve multiplications, and nothing to add up across lanes at the end (the
//! shape is that of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008, with
//! the small operand packed instead of the large one). Weights that are not f32 are widened twelve rows at
//! a time, into a scratch that stays near while all panels pass by it.

use std::ops::Range;

use rayon::prelude::*;

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

/// Rows of a whole panel; the last panel of a matrix has 8 or 16, dead ones full of zeros.
const PANEL: usize = 16;
/// Outputs whose weights are at hand together.
const STRIP: usize = 12;
/// Products summed before a sum goes to memory.
const RUN: usize = 768;

/// Rows of activations, packed for [`Panels::product`]. Used again, it takes no new memory.
#[derive(Default)]
pub struct Panels {
    /// Panel after panel, each `[columns, its rows]`.
    lines: Vec<Line>,
    rows: usize,
    columns: usize,
}

/// A cache line: loads of eight never cross one.
#[derive(Clone, Copy, Default)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// Up to [`STRIP`] rows of weights over one run; where there are fewer, the last stands again for the rest.
#[derive(Clone, Copy)]
struct Strip {
    weights: [*const f32; STRIP],
    outputs: usize,
    /// Where the next strip's rows lie, or any addresses.
    next: *const f32,
    next_stride: usize,
}

/// Where sums go: rows `stride` apart.
#[derive(Clone, Copy)]
pub(crate) struct Target {
    pub(crate) to: *mut f32,
    pub(crate) stride: usize,
    pub(crate) add: bool,
}

// SAFETY: whoever writes through it promises that nobody else writes the same numbers.
unsafe impl Send for Target {}
// SAFETY: as above.
unsafe impl Sync for Target {}

impl Target {
    /// From an output on; sums of any but the first run go to those before.
    unsafe fn at(self, output: usize, from: usize) -> Self {
        // SAFETY: as the callers of `Panels::against` promise.
        Self { to: unsafe { self.to.add(output) }, add: self.add || from > 0, ..self }
    }
}

impl Panels {
    /// Packs `rows` rows of `columns` numbers that begin `stride` apart.
    ///
    /// # Panics
    /// Where `x` is shorter than that.
    pub fn pack(&mut self, x: &[f32], stride: usize, rows: usize, columns: usize) {
        let needed = rows.saturating_sub(1).checked_mul(stride).and_then(|before| before.checked_add(columns));
        assert!(rows == 0 || needed.is_some_and(|needed| x.len() >= needed), "{} numbers for {rows} rows", x.len());
        (self.rows, self.columns) = (rows, columns);
        self.lines.resize((rows.next_multiple_of(8) * columns).div_ceil(16), Line::default());
        // SAFETY: measured above; the lines hold each row's numbers, those of dead rows too.
        unsafe { pack(x.as_ptr(), stride, rows, columns, self.lines.as_mut_ptr().cast()) }
    }

    /// `out[i, j] (+)= x[i] . w[j] + bias[j]` for all packed rows `i` and all rows `j` of `w`; `out` has
    /// rows `stride` apart.
    ///
    /// # Panics
    /// Where the shapes do not fit, or a slice is shorter than its shape.
    pub fn product(&self, w: &Matrix, bias: Option<&[f32]>, into: Into, out: &mut [f32], stride: usize) {
        if !self.check(w, bias, out, stride) {
            return;
        }
        let target = Target { to: out.as_mut_ptr(), stride, add: matches!(into, Into::Add) };
        // SAFETY: the shapes are checked.
        unsafe { self.outputs(w, 0..w.rows(), bias, target) }
    }

    /// As [`Panels::product`], the rows of `w` shared out over the threads of the pool that this runs in: each
    /// is read by one thread only, which counts where few rows of `x` are packed.
    pub fn product_shared(&self, w: &Matrix, bias: Option<&[f32]>, into: Into, out: &mut [f32], stride: usize) {
        let threads = rayon::current_num_threads();
        if threads == 1 {
            return self.product(w, bias, into, out, stride);
        }
        if !self.check(w, bias, out, stride) {
            return;
        }
        let target = Target { to: out.as_mut_ptr(), stride, add: matches!(into, Into::Add) };
        let share = w.rows().div_ceil(threads).next_multiple_of(STRIP);
        (0..w.rows().div_ceil(share)).into_par_iter().for_each(|part| {
            let outputs = part * share..w.rows().min((part + 1) * share);
            // SAFETY: the shapes are checked, and no two parts write the same numbers.
            unsafe { self.outputs(w, outputs, bias, target) }
        });
    }

    /// Refuses shapes that do not fit; false where there is nothing to compute.
    fn check(&self, w: &Matrix, bias: Option<&[f32]>, out: &[f32], stride: usize) -> bool {
        let (n, k) = (w.rows(), w.columns());
        assert!(k == self.columns && bias.is_none_or(|bias| bias.len() == n), "{k} columns, not {}", self.columns);
        if self.rows == 0 || n == 0 {
            return false;
        }
        let needed = (self.rows - 1).checked_mul(stride).and_then(|before| before.checked_add(n));
        assert!(needed.is_some_and(|needed| out.len() >= needed), "{} numbers for {} rows", out.len(), self.rows);
        assert!(self.rows == 1 || stride >= n, "rows of {n} numbers {stride} apart");
        true
    }

    /// Some rows of `w`, and their bias.
    ///
    /// # Safety
    /// The target must have a row of `w.rows()` numbers for each packed row.
    unsafe fn outputs(&self, w: &Matrix, outputs: Range<usize>, bias: Option<&[f32]>, target: Target) {
        match w.in_place() {
            // SAFETY: `w` has as many rows; the target is as the caller promises.
            Some(weights) => unsafe { self.against(weights, w.columns(), outputs.clone(), target) },
            // SAFETY: as the caller promises.
            None => unsafe { self.widened(w, outputs.clone(), target) },
        }
        let Some(bias) = bias else { return };
        for row in 0..self.rows {
            for output in outputs.clone() {
                // SAFETY: as the caller promises.
                unsafe { *target.to.add(row * target.stride + output) += bias[output] };
            }
        }
    }

    /// Against some rows of weights, `ldw` apart.
    ///
    /// # Safety
    /// `w` must be good for those rows of as many numbers as there are columns, the target for as many numbers
    /// in a row for each packed row.
    pub(crate) unsafe fn against(&self, w: *const f32, ldw: usize, outputs: Range<usize>, target: Target) {
        for from in (0..self.columns).step_by(RUN) {
            for first in outputs.clone().step_by(STRIP) {
                // SAFETY: as the caller promises.
                unsafe {
                    let outputs = STRIP.min(outputs.end - first);
                    let weights = std::array::from_fn(|row| w.add((first + row.min(outputs - 1)) * ldw + from));
                    let next = w.wrapping_add((first + STRIP) * ldw + from);
                    let strip = Strip { weights, outputs, next, next_stride: ldw };
                    self.strip(from, strip, target.at(first, from));
                }
            }
        }
    }

    /// As [`Panels::against`], for weights that cannot be read in place.
    unsafe fn widened(&self, w: &Matrix, outputs: Range<usize>, target: Target) {
        let mut scratch = vec![0.0; STRIP * RUN.min(self.columns)];
        for from in (0..self.columns).step_by(RUN) {
            let run = from..self.columns.min(from + RUN);
            for first in outputs.clone().step_by(STRIP) {
                let outputs = STRIP.min(outputs.end - first);
                for (row, wide) in scratch.chunks_exact_mut(run.len()).take(outputs).enumerate() {
                    w.read(first + row, run.clone(), wide);
                }
                let weights = std::array::from_fn(|row| scratch[row.min(outputs - 1) * run.len()..].as_ptr());
                let strip = Strip { weights, outputs, next: scratch.as_ptr(), next_stride: 0 };
                // SAFETY: the scratch has `outputs` rows of the run; the target is as the caller promises.
                unsafe { self.strip(from, strip, target.at(first, from)) };
            }
        }
    }

    /// All rows against a strip, over the run that begins at column `from`.
    unsafe fn strip(&self, from: usize, strip: Strip, target: Target) {
        let run = RUN.min(self.columns - from);
        // SAFETY: as the callers promise.
        unsafe { all_panels(self.lines.as_ptr().cast(), self.rows, self.columns, from, run, strip, target) }
    }
}

on_lanes! {
    unsafe fn pack(x: *const f32, stride: usize, rows: usize, columns: usize, to: *mut f32) = pack_on
}

#[inline(always)]
unsafe fn pack_on<L: Lanes>(x: *const f32, stride: usize, rows: usize, columns: usize, to: *mut f32) {
    // SAFETY: as the caller promises.
    unsafe {
        for first in (0..rows).step_by(8) {
            let panel = first - first % PANEL;
            let width = PANEL.min((rows - panel).next_multiple_of(8));
            let to = to.add(panel * columns + first - panel);
            let x = x.add(first * stride);
            let live = 8.min(rows - first);
            let whole = if live == 8 { columns - columns % 8 } else { 0 };
            for column in (0..whole).step_by(8) {
                for half in [0, 4] {
                    let four = std::array::from_fn(|row| L::load(x.add((half + row) * stride + column)));
                    L::store_quads(to.add(column * width + half), width, four);
                }
            }
            for column in whole..columns {
                for row in 0..8 {
                    let number = if row < live { *x.add(row * stride + column) } else { 0.0 };
                    *to.add(column * width + row) = number;
                }
            }
        }
    }
}

on_lanes! {
    unsafe fn all_panels(
        x: *const f32, rows: usize, columns: usize, from: usize, run: usize, strip: Strip, target: Target,
    ) = all_panels_on
}

#[inline(always)]
unsafe fn all_panels_on<L: Lanes>(
    x: *const f32,
    rows: usize,
    columns: usize,
    from: usize,
    run: usize,
    strip: Strip,
    target: Target,
) {
    // SAFETY: as the callers of `strip` promise.
    unsafe {
        // The next weights are asked for, a few lines of each row with each panel.
        let lines = (run * 4).div_ceil(64).div_ceil(rows.div_ceil(PANEL));
        for (panel, first) in (0..rows).step_by(PANEL).enumerate() {
            for line in panel * lines..(panel + 1) * lines {
                for row in 0..STRIP {
                    L::prefetch(strip.next.wrapping_add(row * strip.next_stride + line * 16).cast());
                }
            }
            let live = PANEL.min(rows - first);
            let width = live.next_multiple_of(8);
            let x = x.add(first * columns + from * width);
            let target = Target { to: target.to.add(first * target.stride), ..target };
            let mut sums = [[[0.0; 8]; 2]; STRIP];
            let [a, b, c, d, e, f, g, h, i, j, k, l] = strip.weights;
            if width == PANEL {
                let (left, right) = sums.split_at_mut(6);
                tile::<L, 2, 6>(x, run, [a, b, c, d, e, f], left);
                if strip.outputs > 6 {
                    tile::<L, 2, 6>(x, run, [g, h, i, j, k, l], right);
                }
            } else {
                tile::<L, 1, STRIP>(x, run, strip.weights, &mut sums);
            }
            for (eight, row) in (0..live).step_by(8).enumerate() {
                for output in (0..strip.outputs).step_by(4) {
                    let four = std::array::from_fn(|one| L::load(sums[output + one][eight].as_ptr()));
                    let to = target.to.add(row * target.stride + output);
                    put::<L>(four, 8.min(live - row), 4.min(strip.outputs - output), Target { to, ..target });
                }
            }
        }
    }
}

/// `V` times eight packed rows against `N` rows of weights: `sums[output][v]`.
#[inline(always)]
// Indices keep the sums in registers; iterators over rows of them do not.
#[allow(clippy::needless_range_loop)]
unsafe fn tile<L: Lanes, const V: usize, const N: usize>(
    x: *const f32,
    run: usize,
    w: [*const f32; N],
    out: &mut [[[f32; 8]; 2]],
) {
    // SAFETY: as the callers of `strip` promise.
    unsafe {
        let mut sums = [[L::splat(0.0); V]; N];
        for at in 0..run {
            let mut eights = [L::splat(0.0); V];
            for v in 0..V {
                eights[v] = L::load(x.add((at * V + v) * 8));
            }
            for output in 0..N {
                // Weights lie where their file has them.
                let weight = L::splat(w[output].add(at).read_unaligned());
                for v in 0..V {
                    sums[output][v] = L::fma(eights[v], weight, sums[output][v]);
                }
            }
        }
        for output in 0..N {
            for v in 0..V {
                L::store(out[output][v].as_mut_ptr(), sums[output][v]);
            }
        }
    }
}

/// Sums of four outputs, of eight rows, to where they go: so many rows and outputs of them.
#[inline(always)]
unsafe fn put<L: Lanes>(sums: [L::V; 4], rows: usize, outputs: usize, target: Target) {
    // SAFETY: as the callers of `strip` promise.
    unsafe {
        if rows == 8 && outputs == 4 && !target.add {
            return L::store_quads(target.to, target.stride, sums);
        }
        let mut quads = [[0.0; 4]; 8];
        L::store_quads(quads.as_mut_ptr().cast(), 4, sums);
        for (row, quad) in quads.iter().enumerate().take(rows) {
            for (output, sum) in quad.iter().enumerate().take(outputs) {
                let to = target.to.add(row * target.stride + output);
                *to = if target.add { *to + sum } else { *sum };
            }
        }
    }
}

#[cfg(test)]
mod tests;
