//! Attention of whole documents and its gradient, for training: block after block of queries, so that no matrix of
//! positions by positions is kept, and computed once more on the way back instead of remembered (Dao et al.,
//! "FlashAttention", 2022).
//!
//! All is computed in f32, whatever numbers are stored in; products are [`multiply`]'s, and the last bits with them.

use std::sync::atomic::{AtomicUsize, Ordering};

use half::bf16;
use rayon::prelude::*;

use crate::{
    gemm::{Strided, multiply},
    lanes::{Lanes, on_lanes},
    narrow_bf16, scale,
    softmax::exponentiate,
    widen_bf16,
};

/// Scores of a block of queries, numbers, where that is not fewer than [`ROWS`] rows: two such arrays stay in a core's
/// second level of cache.
const SCORES: usize = 96 << 10;
/// Rows of a block: fewer starve the products.
const ROWS: usize = 64;

/// Documents one after another, each of which sees itself alone, no position one after it.
#[derive(Clone, Copy, Debug)]
pub struct Documents<'a> {
    /// Positions of each.
    pub lengths: &'a [usize],
    /// A multiple of `key_heads`.
    pub query_heads: usize,
    pub key_heads: usize,
    pub head_dim: usize,
    /// How many positions back a query looks, itself included; all where `None`.
    pub window: Option<usize>,
}

/// Of all positions, one after another: `[n, query heads, head_dim]`, and `[n, key heads, head_dim]` twice.
#[derive(Debug)]
pub struct Projected<T> {
    pub queries: T,
    pub keys: T,
    pub values: T,
}

/// A kind of number that a student's activations are stored in.
pub trait Stored: Copy + Send + Sync {
    /// As many as both hold.
    fn widen(from: &[Self], to: &mut [f32]);
    /// As many as both hold, rounded to the nearest.
    fn narrow(from: &[f32], to: &mut [Self]);
}

impl Stored for f32 {
    fn widen(from: &[f32], to: &mut [f32]) {
        to.copy_from_slice(from);
    }

    fn narrow(from: &[f32], to: &mut [f32]) {
        to.copy_from_slice(from);
    }
}

impl Stored for bf16 {
    fn widen(from: &[bf16], to: &mut [f32]) {
        widen_bf16(from, to);
    }

    fn narrow(from: &[f32], to: &mut [bf16]) {
        narrow_bf16(from, to);
    }
}

impl Documents<'_> {
    /// Softmax of the scaled scores over the values: `mixed` is `[n, query heads, head_dim]`.
    ///
    /// # Panics
    /// Where a slice has another length than that.
    pub fn attend<T: Stored>(&self, projected: &Projected<&[T]>, mixed: &mut [T], threads: usize) {
        self.check(projected, mixed.len());
        let mixed = Heads::of(mixed, self.query_heads * self.head_dim);
        self.each(threads, |scratch, one, threads| {
            one.take(self, projected, scratch);
            for block in one.blocks(self) {
                scratch.weigh(self, &one, &block, projected.queries, threads);
                scratch.mix(self, &block, threads);
                for (row, &sum) in scratch.sums[..block.rows].iter().enumerate() {
                    scale(&mut scratch.mixed[row * self.head_dim..][..self.head_dim], 1.0 / sum);
                }
                // SAFETY: no two threads have a document and a key head in common.
                unsafe { one.put(self, &block, &scratch.mixed, mixed) };
            }
        });
    }

    /// Gradients in queries, keys and values of a loss whose gradient in what [`Documents::attend`] gives is
    /// `grad_mixed`, in the shapes of those.
    ///
    /// # Panics
    /// As [`Documents::attend`].
    pub fn gradients<T: Stored>(
        &self,
        projected: &Projected<&[T]>,
        grad_mixed: &[T],
        into: Projected<&mut [T]>,
        threads: usize,
    ) {
        self.check(projected, grad_mixed.len());
        assert!(into.queries.len() == projected.queries.len() && into.keys.len() == projected.keys.len());
        assert!(into.values.len() == projected.values.len());
        let (queries, kept) = (self.query_heads * self.head_dim, self.key_heads * self.head_dim);
        let into = Projected {
            queries: Heads::of(into.queries, queries),
            keys: Heads::of(into.keys, kept),
            values: Heads::of(into.values, kept),
        };
        self.each(threads, |scratch, one, threads| {
            one.take(self, projected, scratch);
            scratch.grad_keys.clear();
            scratch.grad_keys.resize(one.length * self.head_dim, 0.0);
            scratch.grad_values.clear();
            scratch.grad_values.resize(one.length * self.head_dim, 0.0);
            for block in one.blocks(self) {
                scratch.weigh(self, &one, &block, projected.queries, threads);
                one.gather(self, &block, grad_mixed, &mut scratch.grad_mixed);
                scratch.back(self, &block, threads);
                // SAFETY: no two threads have a document and a key head in common.
                unsafe { one.put(self, &block, &scratch.mixed, into.queries) };
            }
            // SAFETY: as above.
            unsafe {
                into.keys.put(one.first, one.key_head * self.head_dim, self.head_dim, &scratch.grad_keys);
                into.values.put(one.first, one.key_head * self.head_dim, self.head_dim, &scratch.grad_values);
            }
        });
    }

    fn check<T>(&self, projected: &Projected<&[T]>, mixed: usize) {
        let positions: usize = self.lengths.iter().sum();
        assert!(self.key_heads > 0 && self.query_heads.is_multiple_of(self.key_heads) && self.head_dim > 0);
        assert!(self.window != Some(0), "a window of nothing");
        let (queries, keys) = (self.query_heads * self.head_dim, self.key_heads * self.head_dim);
        for (found, wanted) in [
            (projected.queries.len(), queries),
            (mixed, queries),
            (projected.keys.len(), keys),
            (projected.values.len(), keys),
        ] {
            assert!(positions.checked_mul(wanted) == Some(found), "{found} numbers for {positions} times {wanted}");
        }
    }

    /// Does `work` for each key head of each document on up to `threads` threads, and says on how many its products may
    /// run.
    fn each(&self, threads: usize, work: impl Fn(&mut Scratch, One, usize) + Sync) {
        let mut first = 0;
        let mut all = Vec::with_capacity(self.lengths.len() * self.key_heads);
        for &length in self.lengths {
            all.extend((0..self.key_heads).map(|key_head| One { first, length, key_head }));
            first += length;
        }
        if threads <= 1 || all.len() < threads {
            let mut scratch = Scratch::default();
            return all.into_iter().for_each(|one| work(&mut scratch, one, threads));
        }
        let next = AtomicUsize::new(0);
        (0..threads).into_par_iter().for_each(|_| {
            let mut scratch = Scratch::default();
            while let Some(&one) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
                work(&mut scratch, one, 1);
            }
        });
    }

    /// Query heads that share a key head.
    fn group(&self) -> usize {
        self.query_heads / self.key_heads
    }
}

/// One key head of one document.
#[derive(Clone, Copy)]
struct One {
    first: usize,
    length: usize,
    key_head: usize,
}

/// Some positions of a document as queries, counted from its beginning, and the keys that they see.
struct Block {
    from: usize,
    positions: usize,
    /// Positions times the heads of a group.
    rows: usize,
    /// First key that any of them sees, and how many there are to the last.
    start: usize,
    span: usize,
}

impl One {
    fn blocks(self, documents: &Documents) -> impl Iterator<Item = Block> {
        let (group, window) = (documents.group(), documents.window);
        let window_or_all = window.unwrap_or(self.length);
        // Of a window's length a block sees fewer keys than two windows have.
        let rows = (SCORES / self.length.min(window_or_all.saturating_mul(2)).max(1)).max(ROWS);
        let step = rows.div_ceil(group).min(window_or_all.max(ROWS.div_ceil(group))).next_multiple_of(8);
        (0..self.length).step_by(step).map(move |from| {
            let positions = step.min(self.length - from);
            let start = window.map_or(0, |window| (from + 1).saturating_sub(window));
            Block { from, positions, rows: positions * group, start, span: from + positions - start }
        })
    }

    /// Keys and values of the whole document.
    fn take<T: Stored>(&self, documents: &Documents, projected: &Projected<&[T]>, scratch: &mut Scratch) {
        let (d, stride) = (documents.head_dim, documents.key_heads * documents.head_dim);
        for (from, to) in [(projected.keys, &mut scratch.keys), (projected.values, &mut scratch.values)] {
            to.resize(self.length * d, 0.0);
            for (position, to) in to.chunks_exact_mut(d).enumerate() {
                T::widen(&from[(self.first + position) * stride + self.key_head * d..][..d], to);
            }
        }
    }

    /// A block's rows of something laid out as queries are.
    fn gather<T: Stored>(&self, documents: &Documents, block: &Block, from: &[T], to: &mut Vec<f32>) {
        let width = documents.group() * documents.head_dim;
        to.resize(block.positions * width, 0.0);
        for (position, to) in to.chunks_exact_mut(width).enumerate() {
            let row = self.first + block.from + position;
            T::widen(&from[row * documents.key_heads * width + self.key_head * width..][..width], to);
        }
    }

    /// The reverse of [`One::gather`].
    ///
    /// # Safety
    /// As [`Heads::put`].
    unsafe fn put<T: Stored>(&self, documents: &Documents, block: &Block, from: &[f32], to: Heads<T>) {
        let width = documents.group() * documents.head_dim;
        // SAFETY: as the caller promises.
        unsafe { to.put(self.first + block.from, self.key_head * width, width, &from[..block.positions * width]) };
    }
}

/// Where the heads of all positions go, each thread's to its own.
#[derive(Clone, Copy)]
struct Heads<T> {
    at: *mut T,
    count: usize,
    stride: usize,
}

// SAFETY: whoever writes through it promises that nobody else writes the same numbers.
unsafe impl<T: Send> Send for Heads<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Heads<T> {}

impl<T: Stored> Heads<T> {
    fn of(numbers: &mut [T], stride: usize) -> Self {
        Self { at: numbers.as_mut_ptr(), count: numbers.len(), stride }
    }

    /// `width` numbers at `offset` of each position from `first` on.
    ///
    /// # Safety
    /// Nobody else may touch these numbers meanwhile.
    unsafe fn put(self, first: usize, offset: usize, width: usize, from: &[f32]) {
        for (position, from) in from.chunks_exact(width).enumerate() {
            let at = (first + position) * self.stride + offset;
            assert!(at + width <= self.count);
            // SAFETY: measured just now, and nobody else's as the caller promises.
            T::narrow(from, unsafe { std::slice::from_raw_parts_mut(self.at.add(at), width) });
        }
    }
}

/// Memory that one thread uses again for each block.
#[derive(Default)]
struct Scratch {
    keys: Vec<f32>,
    values: Vec<f32>,
    queries: Vec<f32>,
    /// Of each row, over the keys that the block sees.
    weights: Vec<f32>,
    sums: Vec<f32>,
    /// What attention gives, or the gradient in queries.
    mixed: Vec<f32>,
    grad_mixed: Vec<f32>,
    grad_weights: Vec<f32>,
    grad_keys: Vec<f32>,
    grad_values: Vec<f32>,
}

impl Scratch {
    /// `exp(score - the row's largest)` of each row, nothing where a key is not seen; and each row's sum.
    fn weigh<T: Stored>(&mut self, documents: &Documents, one: &One, block: &Block, queries: &[T], threads: usize) {
        one.gather(documents, block, queries, &mut self.queries);
        self.weights.resize(block.rows * block.span, 0.0);
        self.sums.resize(block.rows, 0.0);
        let scale = 1.0 / (documents.head_dim as f32).sqrt();
        let scores = Strided::rows(self.weights.as_mut_ptr(), block.rows, block.span, block.span);
        let queries = rows(&mut self.queries, 0, block.rows, documents.head_dim);
        let keys = rows(&mut self.keys, block.start, block.span, documents.head_dim);
        // SAFETY: three arrays of their own, of these shapes.
        unsafe { multiply(scores, 0.0, scale, queries, keys.transposed(), threads) };
        for (row, weights) in self.weights[..block.rows * block.span].chunks_exact_mut(block.span).enumerate() {
            let seen = block.from + row / documents.group() + 1;
            let hidden =
                documents.window.map_or(0, |window| seen.saturating_sub(window)).max(block.start) - block.start;
            let seen = seen - block.start;
            weights[..hidden].fill(0.0);
            weights[seen..].fill(0.0);
            self.sums[row] = exponentiate(&mut weights[hidden..seen], 1.0).1 as f32;
        }
    }

    /// `mixed = weights values`.
    fn mix(&mut self, documents: &Documents, block: &Block, threads: usize) {
        let d = documents.head_dim;
        self.mixed.resize(block.rows * d, 0.0);
        let weights = rows(&mut self.weights, 0, block.rows, block.span);
        let values = rows(&mut self.values, block.start, block.span, d);
        // SAFETY: three arrays of their own, of these shapes.
        unsafe { multiply(rows(&mut self.mixed, 0, block.rows, d), 0.0, 1.0, weights, values, threads) };
    }

    /// From `weights` that are not divided yet and `grad_mixed`: the gradient in queries, to `mixed`, and what this
    /// block adds to those in keys and values.
    fn back(&mut self, documents: &Documents, block: &Block, threads: usize) {
        let Block { rows: count, start, span, .. } = *block;
        let d = documents.head_dim;
        let scale = 1.0 / (d as f32).sqrt();
        self.grad_weights.resize(count * span, 0.0);
        self.mixed.resize(count * d, 0.0);
        let grad_mixed = rows(&mut self.grad_mixed, 0, count, d);
        let values = rows(&mut self.values, start, span, d);
        let grad_weights = rows(&mut self.grad_weights, 0, count, span);
        // SAFETY: three arrays of their own, of these shapes.
        unsafe { multiply(grad_weights, 0.0, 1.0, grad_mixed, values.transposed(), threads) };
        for ((weights, grads), sum) in
            self.weights.chunks_exact_mut(span).zip(self.grad_weights.chunks_exact_mut(span)).zip(&self.sums)
        {
            // SAFETY: both rows hold `span` numbers.
            unsafe { through_softmax(weights.as_mut_ptr(), grads.as_mut_ptr(), span, 1.0 / sum, scale) };
        }
        let weights = rows(&mut self.weights, 0, count, span);
        let grad_scores = rows(&mut self.grad_weights, 0, count, span);
        let (queries, keys) = (rows(&mut self.queries, 0, count, d), rows(&mut self.keys, start, span, d));
        let grad_mixed = rows(&mut self.grad_mixed, 0, count, d);
        // SAFETY: each time three arrays of their own, of these shapes; the gradients' are zero in the beginning.
        unsafe {
            multiply(rows(&mut self.grad_values, start, span, d), 1.0, 1.0, weights.transposed(), grad_mixed, threads);
            multiply(rows(&mut self.mixed, 0, count, d), 0.0, 1.0, grad_scores, keys, threads);
            multiply(rows(&mut self.grad_keys, start, span, d), 1.0, 1.0, grad_scores.transposed(), queries, threads);
        }
    }
}

/// Some rows of an array.
fn rows(of: &mut [f32], first: usize, count: usize, width: usize) -> Strided {
    Strided::rows(of[first * width..(first + count) * width].as_mut_ptr(), count, width, width)
}

on_lanes! {
    /// `weights *= share`, and `grads = weights * (grads - sum of weights * grads) * scale`.
    unsafe fn through_softmax(weights: *mut f32, grads: *mut f32, count: usize, share: f32, scale: f32) = through_softmax_on
}

#[inline(always)]
unsafe fn through_softmax_on<L: Lanes>(weights: *mut f32, grads: *mut f32, count: usize, share: f32, scale: f32) {
    // SAFETY: as the caller promises.
    unsafe {
        let whole = count - count % 8;
        let shares = L::splat(share);
        let mut sum = L::splat(0.0);
        for at in (0..whole).step_by(8) {
            let weight = L::mul(L::load(weights.add(at)), shares);
            L::store(weights.add(at), weight);
            sum = L::fma(weight, L::load(grads.add(at)), sum);
        }
        let mut sum = L::sum(sum);
        for at in whole..count {
            *weights.add(at) *= share;
            sum += *weights.add(at) * *grads.add(at);
        }
        let (sums, scales) = (L::splat(sum), L::splat(scale));
        for at in (0..whole).step_by(8) {
            let weight = L::mul(L::load(weights.add(at)), scales);
            L::store(grads.add(at), L::mul(weight, L::sub(L::load(grads.add(at)), sums)));
        }
        for at in whole..count {
            *grads.add(at) = *weights.add(at) * scale * (*grads.add(at) - sum);
        }
    }
}

#[cfg(test)]
mod tests;
