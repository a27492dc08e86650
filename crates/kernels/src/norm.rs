//! RMSNorm and its gradient, for training: of rows in any [`Stored`] kind, computed in f32 and rounded once.

use rayon::prelude::*;

use crate::{
    Stored,
    lanes::{Lanes, on_lanes},
    rows::rms_norm,
};

/// Rows whose part of the weight's gradient is one sum.
const ROWS: usize = 64;

/// Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a> {
    /// One number a column, at least one.
    pub weight: &'a [f32],
    /// Added to the mean square.
    pub epsilon: f32,
}

impl Norm<'_> {
    /// Of each row of `x` into `out`, `[n, h]` both, on up to `threads` threads.
    ///
    /// # Panics
    /// Where these are no rows of as many numbers as the weight has.
    pub fn forward<T: Stored>(&self, x: &[T], out: &mut [T], threads: usize) {
        let width = self.check(x.len(), out.len());
        let part = self.part(x.len(), threads);
        x.par_chunks(part).zip(out.par_chunks_mut(part)).for_each(|(x, out)| {
            let mut scratch = vec![0.0; 2 * width];
            let (wide, normed) = scratch.split_at_mut(width);
            for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
                T::widen(x, wide);
                rms_norm(wide, self.weight, self.epsilon, normed);
                T::narrow(normed, out);
            }
        });
    }

    /// Adds to `grad` the gradient in `x` of a loss whose gradient in [`Norm::forward`]'s rows is `grad_normed`, and
    /// gives that in the weight. The same numbers on any number of threads.
    ///
    /// # Panics
    /// As [`Norm::forward`].
    pub fn back<T: Stored>(&self, x: &[T], grad_normed: &[T], grad: &mut [T], threads: usize) -> Vec<f32> {
        let width = self.check(x.len(), grad.len());
        self.check(x.len(), grad_normed.len());
        let part = self.part(x.len(), threads);
        let parts = x.par_chunks(part).zip(grad_normed.par_chunks(part)).zip(grad.par_chunks_mut(part));
        let sums: Vec<Vec<Vec<f32>>> = parts
            .map(|((x, grad_normed), grad)| {
                let mut scratch = vec![0.0; 3 * width];
                let some = ROWS * width;
                let blocks = x.chunks(some).zip(grad_normed.chunks(some)).zip(grad.chunks_mut(some));
                blocks.map(|((x, grad_normed), grad)| self.block_back(x, grad_normed, grad, &mut scratch)).collect()
            })
            .collect();
        let mut whole = vec![0.0; width];
        for block in sums.into_iter().flatten() {
            whole.iter_mut().zip(block).for_each(|(whole, block)| *whole += block);
        }
        whole
    }

    /// Of up to [`ROWS`] rows.
    fn block_back<T: Stored>(&self, x: &[T], grad_normed: &[T], grad: &mut [T], scratch: &mut [f32]) -> Vec<f32> {
        let width = self.weight.len();
        let (wide, rest) = scratch.split_at_mut(width);
        let (from, to) = rest.split_at_mut(width);
        let mut sums = vec![0.0; width];
        for ((x, grad_normed), grad) in
            x.chunks_exact(width).zip(grad_normed.chunks_exact(width)).zip(grad.chunks_exact_mut(width))
        {
            T::widen(x, wide);
            T::widen(grad_normed, from);
            T::widen(grad, to);
            let row = Row { x: wide.as_ptr(), weight: self.weight.as_ptr(), from: from.as_ptr(), width };
            // SAFETY: all hold `width` numbers.
            unsafe { back_row(row, self.epsilon, to.as_mut_ptr(), sums.as_mut_ptr()) };
            T::narrow(to, grad);
        }
        sums
    }

    /// Numbers that one of so many threads takes: whole blocks of [`ROWS`] rows.
    fn part(&self, numbers: usize, threads: usize) -> usize {
        let block = ROWS * self.weight.len();
        numbers.div_ceil(block).div_ceil(threads.max(1)).max(1) * block
    }

    fn check(&self, x: usize, other: usize) -> usize {
        let width = self.weight.len();
        assert!(width > 0 && x.is_multiple_of(width) && x == other, "{x} and {other} numbers in rows of {width}");
        width
    }
}

#[derive(Clone, Copy)]
struct Row {
    x: *const f32,
    weight: *const f32,
    from: *const f32,
    width: usize,
}

on_lanes! {
    /// With y = x / r: `grad += (weight from - y mean(weight from y)) / r`, `sums += from y`.
    unsafe fn back_row(row: Row, epsilon: f32, grad: *mut f32, sums: *mut f32) = back_row_on
}

#[inline(always)]
unsafe fn back_row_on<L: Lanes>(row: Row, epsilon: f32, grad: *mut f32, sums: *mut f32) {
    let Row { x, weight, from, width } = row;
    let whole = width - width % 8;
    // SAFETY: as the caller promises.
    unsafe {
        let (mut squares, mut dots) = (L::splat(0.0), L::splat(0.0));
        for at in (0..whole).step_by(8) {
            let number = L::load(x.add(at));
            squares = L::fma(number, number, squares);
            dots = L::fma(L::mul(L::load(weight.add(at)), L::load(from.add(at))), number, dots);
        }
        let (mut square, mut dot) = (L::sum(squares), L::sum(dots));
        for at in whole..width {
            square += *x.add(at) * *x.add(at);
            dot += *weight.add(at) * *from.add(at) * *x.add(at);
        }
        let count = width as f32;
        let inverse = 1.0 / (square / count + epsilon).sqrt();
        let slope = dot * inverse * inverse / count;
        let (inverses, slopes) = (L::splat(inverse), L::splat(slope));
        for at in (0..whole).step_by(8) {
            let (number, from) = (L::load(x.add(at)), L::load(from.add(at)));
            let straight = L::sub(L::mul(L::load(weight.add(at)), from), L::mul(number, slopes));
            L::store(grad.add(at), L::fma(straight, inverses, L::load(grad.add(at))));
            L::store(sums.add(at), L::fma(from, L::mul(number, inverses), L::load(sums.add(at))));
        }
        for at in whole..width {
            *grad.add(at) += (*weight.add(at) * *from.add(at) - *x.add(at) * slope) * inverse;
            *sums.add(at) += *from.add(at) * *x.add(at) * inverse;
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use proptest::prelude::*;

    use super::*;

    fn rows() -> impl Strategy<Value = (usize, Vec<[f32; 3]>, Vec<f32>)> {
        let numbers = || -2.0f32..2.0;
        (1usize..40, 1usize..300).prop_flat_map(move |(width, rows)| {
            let three = (numbers(), numbers(), numbers()).prop_map(|(a, b, c)| [a, b, c]);
            (Just(width), prop::collection::vec(three, width * rows), prop::collection::vec(numbers(), width))
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn values_and_gradients_are_those_of_the_definition((width, numbers, weight) in rows()) {
            let take = |which: usize| -> Vec<f32> { numbers.iter().map(|three| three[which]).collect() };
            let (x, from, before) = (take(0), take(1), take(2));
            let norm = Norm { weight: &weight, epsilon: 1e-3 };
            let (mut normed, mut grad) = (vec![f32::NAN; x.len()], before.clone());
            norm.forward(&x, &mut normed, 2);
            let grad_weight = norm.back(&x, &from, &mut grad, 3);
            for threads in [1, 2, 64] {
                let mut again = before.clone();
                prop_assert_eq!(&norm.back(&x, &from, &mut again, threads), &grad_weight);
                prop_assert_eq!(&again, &grad);
                norm.forward(&x, &mut again, threads);
                prop_assert_eq!(&again, &normed);
            }

            let mut exact_weight = vec![0.0f64; width];
            for row in 0..x.len() / width {
                let at = |of: &[f32], i: usize| f64::from(of[row * width + i]);
                let mean = (0..width).map(|i| at(&x, i).powi(2)).sum::<f64>() / width as f64;
                let root = (mean + f64::from(1e-3f32)).sqrt();
                let w = |i: usize| f64::from(weight[i]);
                let dot = (0..width).map(|i| w(i) * at(&from, i) * at(&x, i)).sum::<f64>();
                for (i, sum) in exact_weight.iter_mut().enumerate() {
                    prop_assert!((at(&normed, i) - at(&x, i) / root * w(i)).abs() < 1e-5);
                    // d(x_j / root) / d x_i = delta_ij / root - x_i x_j / (width root^3)
                    let exact = w(i) * at(&from, i) / root - at(&x, i) * dot / (width as f64 * root.powi(3));
                    prop_assert!((at(&grad, i) - at(&before, i) - exact).abs() < 1e-5 * (1.0 + exact.abs()) / root);
                    *sum += at(&from, i) * at(&x, i) / root;
                }
            }
            for (found, exact) in grad_weight.iter().zip(exact_weight) {
                prop_assert!((f64::from(*found) - exact).abs() < 1e-4);
            }
        }
    }

    #[test]
    fn rows_in_bf16_are_rounded_once() {
        let narrow = |x: f32| bf16::from_f32(x);
        let x: Vec<bf16> = (0..300).map(|i| narrow((i % 23) as f32 - 11.0)).collect();
        let wide: Vec<f32> = x.iter().map(|x| x.to_f32()).collect();
        let weight: Vec<f32> = (0..30).map(|i| i as f32 * 0.1).collect();
        let norm = Norm { weight: &weight, epsilon: 1e-5 };
        let (mut narrow_out, mut wide_out) = (vec![bf16::ZERO; 300], vec![0.0; 300]);
        norm.forward(&x, &mut narrow_out, 1);
        norm.forward(&wide, &mut wide_out, 1);
        assert!(narrow_out.iter().zip(&wide_out).all(|(a, b)| *a == narrow(*b)));
        let (mut narrow_grad, mut wide_grad) = (x.clone(), wide.clone());
        assert_eq!(norm.back(&x, &narrow_out, &mut narrow_grad, 1).len(), 30);
        let rounded: Vec<f32> = narrow_out.iter().map(|x| x.to_f32()).collect();
        norm.back(&wide, &rounded, &mut wide_grad, 1);
        assert!(narrow_grad.iter().zip(&wide_grad).all(|(a, b)| *a == narrow(*b)));
    }

    #[test]
    #[should_panic(expected = "in rows of 3")]
    fn numbers_that_are_no_rows_are_refused() {
        Norm { weight: &[1.0; 3], epsilon: 0.0 }.forward(&[1.0; 7], &mut [0.0; 7], 1);
    }
}
