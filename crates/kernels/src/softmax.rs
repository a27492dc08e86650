//! What is asked of a row of logits: its log-sum-exp, its largest numbers, its mass in blocks.

use crate::{
    attention::exponentials,
    lanes::{Lanes, on_lanes},
};

/// Numbers of a block.
pub const BLOCK: usize = 256;
/// Numbers whose maxima guide the search for the largest.
const GROUP: usize = 64;

/// A row of logits, looked at once.
pub struct Logits<'a> {
    row: &'a [f32],
    /// The largest of each group of [`GROUP`].
    maxima: Vec<f32>,
    max: f32,
    log_sum_exp: f32,
    /// Sums over blocks of [`BLOCK`] of exp(x - max).
    sums: Vec<f32>,
}

impl<'a> Logits<'a> {
    /// Reads the row twice, and keeps one number for each 64 and 256 of it.
    pub fn new(row: &'a [f32]) -> Self {
        let maxima: Vec<f32> = row.chunks(GROUP).map(largest).collect();
        let max = maxima.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sums: Vec<f32> = row.chunks(BLOCK).map(|block| mass(block, max, 1.0)).collect();
        let total: f64 = sums.iter().map(|&sum| f64::from(sum)).sum();
        let log_sum_exp = (f64::from(max) + total.ln()) as f32;
        Self { row, maxima, max, log_sum_exp, sums }
    }

    /// Size of the vocabulary.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.row.len()
    }

    pub fn row(&self) -> &[f32] {
        self.row
    }

    /// Natural logarithm of the sum of exponentials; not finite where a logit is not.
    pub fn log_sum_exp(&self) -> f32 {
        // A not-a-number is lost in comparisons but not in sums.
        if self.sums.iter().all(|sum| sum.is_finite()) { self.log_sum_exp } else { f32::NAN }
    }

    /// log sum_v exp(logprob_v / temperature).
    pub fn tempered_log_sum_exp(&self, temperature: f64) -> f32 {
        let scale = (1.0 / temperature) as f32;
        let total: f64 = self.row.chunks(BLOCK).map(|block| f64::from(mass(block, self.max, scale))).sum();
        ((f64::from(self.max) - f64::from(self.log_sum_exp)) / temperature + total.ln()) as f32
    }

    /// Log-probability of a token.
    pub fn logprob(&self, id: usize) -> f32 {
        self.row[id] - self.log_sum_exp
    }

    /// Probability of each block of [`BLOCK`] tokens.
    pub fn block_masses(&self) -> impl Iterator<Item = f64> {
        let scale = (f64::from(self.max) - f64::from(self.log_sum_exp)).exp();
        self.sums.iter().map(move |&sum| f64::from(sum) * scale)
    }

    /// Probabilities of the tokens of one block; how many there are.
    pub fn probabilities(&self, block: usize, out: &mut [f32; BLOCK]) -> usize {
        let start = block * BLOCK;
        let row = &self.row[start..(start + BLOCK).min(self.row.len())];
        out[..row.len()].copy_from_slice(row);
        // SAFETY: the slice's own bounds.
        unsafe { exponentials(out.as_mut_ptr(), row.len(), self.log_sum_exp) };
        row.len()
    }

    /// The `count` largest, `(id, logit)`, the largest first, the lower id first where two are equal.
    pub fn largest(&self, count: usize) -> Vec<(u32, f32)> {
        let count = count.min(self.row.len());
        if count == 0 {
            return Vec::new();
        }
        let least = if count <= self.maxima.len() {
            // As many groups have a maximum of at least this, so as many numbers have it too.
            let mut maxima = self.maxima.clone();
            *maxima.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a)).1
        } else {
            f32::NEG_INFINITY
        };
        let mut found = Vec::with_capacity(count * 4);
        for (group, max) in self.maxima.iter().enumerate() {
            if *max >= least {
                let start = group * GROUP;
                let row = &self.row[start..(start + GROUP).min(self.row.len())];
                // SAFETY: the row's own bounds.
                unsafe { at_least(row.as_ptr(), row.len(), least, start as u32, &mut found) };
            }
        }
        let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if found.len() > count {
            found.select_nth_unstable_by(count - 1, order);
            found.truncate(count);
        }
        found.sort_unstable_by(order);
        found
    }
}

/// Turns a row into `exp((x - max) * scale)`; answers the largest number there was, and the sum of what there is
/// now, which is not finite where a number was not.
pub fn exponentiate(row: &mut [f32], scale: f32) -> (f32, f64) {
    let max = row.chunks(GROUP).map(largest).fold(f32::NEG_INFINITY, f32::max);
    let mut total = 0.0;
    for block in row.chunks_mut(BLOCK) {
        // SAFETY: the block's own bounds.
        total += f64::from(unsafe { exponentiate_run(block.as_mut_ptr(), block.len(), max, scale) });
    }
    (max, total)
}

pub(crate) fn largest(row: &[f32]) -> f32 {
    // SAFETY: the row's own bounds.
    unsafe { largest_of(row.as_ptr(), row.len()) }
}

/// Sum of exp((x - max) * scale).
fn mass(row: &[f32], max: f32, scale: f32) -> f32 {
    // SAFETY: the row's own bounds.
    unsafe { mass_of(row.as_ptr(), row.len(), max, scale) }
}

on_lanes! {
    unsafe fn largest_of(row: *const f32, count: usize) -> f32 = largest_on
}

#[inline(always)]
unsafe fn largest_on<L: Lanes>(row: *const f32, count: usize) -> f32 {
    // SAFETY: as the caller promises.
    unsafe {
        let mut most = L::splat(f32::NEG_INFINITY);
        let whole = count - count % 8;
        for at in (0..whole).step_by(8) {
            most = L::max(L::load(row.add(at)), most);
        }
        if whole < count {
            most = L::max(L::load_part(row.add(whole), count - whole, f32::NEG_INFINITY), most);
        }
        L::to_array(most).into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}

on_lanes! {
    unsafe fn mass_of(row: *const f32, count: usize, max: f32, scale: f32) -> f32 = mass_on
}

#[inline(always)]
unsafe fn mass_on<L: Lanes>(row: *const f32, count: usize, max: f32, scale: f32) -> f32 {
    // SAFETY: as the caller promises.
    unsafe {
        let (maxes, scales) = (L::splat(max), L::splat(scale));
        let mut sum = L::splat(0.0);
        let whole = count - count % 8;
        for at in (0..whole).step_by(8) {
            sum = L::add(sum, L::exp(L::mul(L::sub(L::load(row.add(at)), maxes), scales)));
        }
        let mut sum = L::sum(sum);
        if whole < count {
            let rest = L::load_part(row.add(whole), count - whole, max);
            let rest = L::to_array(L::exp(L::mul(L::sub(rest, maxes), scales)));
            sum += rest[..count - whole].iter().sum::<f32>();
        }
        sum
    }
}

on_lanes! {
    unsafe fn exponentiate_run(row: *mut f32, count: usize, max: f32, scale: f32) -> f32 = exponentiate_run_on
}

#[inline(always)]
unsafe fn exponentiate_run_on<L: Lanes>(row: *mut f32, count: usize, max: f32, scale: f32) -> f32 {
    // SAFETY: as the caller promises.
    unsafe {
        let (maxes, scales) = (L::splat(max), L::splat(scale));
        let mut sum = L::splat(0.0);
        let whole = count - count % 8;
        for at in (0..whole).step_by(8) {
            let grown = L::exp(L::mul(L::sub(L::load(row.add(at)), maxes), scales));
            L::store(row.add(at), grown);
            sum = L::add(sum, grown);
        }
        let mut sum = L::sum(sum);
        if whole < count {
            let rest = L::load_part(row.add(whole), count - whole, max);
            let rest = L::to_array(L::exp(L::mul(L::sub(rest, maxes), scales)));
            std::ptr::copy_nonoverlapping(rest.as_ptr(), row.add(whole), count - whole);
            sum += rest[..count - whole].iter().sum::<f32>();
        }
        sum
    }
}

on_lanes! {
    unsafe fn at_least(row: *const f32, count: usize, least: f32, first: u32, found: &mut Vec<(u32, f32)>) = at_least_on
}

#[inline(always)]
unsafe fn at_least_on<L: Lanes>(row: *const f32, count: usize, least: f32, first: u32, found: &mut Vec<(u32, f32)>) {
    // SAFETY: as the caller promises.
    unsafe {
        let leasts = L::splat(least);
        let whole = count - count % 8;
        for at in (0..whole).step_by(8) {
            let mut bits = L::at_least(L::load(row.add(at)), leasts);
            while bits != 0 {
                let at = at + bits.trailing_zeros() as usize;
                found.push((first + at as u32, *row.add(at)));
                bits &= bits - 1;
            }
        }
        for at in whole..count {
            if *row.add(at) >= least {
                found.push((first + at as u32, *row.add(at)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn row() -> impl Strategy<Value = Vec<f32>> {
        prop::collection::vec((-40i32..40).prop_map(|x| x as f32 * 0.37), 1..900)
    }

    proptest! {
        #[test]
        fn a_row_is_what_the_definitions_say(row in row(), count in 1usize..80) {
            let logits = Logits::new(&row);
            let max = f64::from(row.iter().copied().fold(f32::MIN, f32::max));
            let exact = max + row.iter().map(|&x| (f64::from(x) - max).exp()).sum::<f64>().ln();
            prop_assert!((f64::from(logits.log_sum_exp()) - exact).abs() < 1e-5 * exact.abs().max(1.0));
            prop_assert!((logits.block_masses().sum::<f64>() - 1.0).abs() < 1e-5);
            for temperature in [0.5, 1.0, 3.0] {
                let tempered = row.iter().map(|&x| ((f64::from(x) - exact) / temperature).exp()).sum::<f64>().ln();
                prop_assert!((f64::from(logits.tempered_log_sum_exp(temperature)) - tempered).abs() < 1e-4);
            }

            let mut sorted: Vec<(u32, f32)> = row.iter().enumerate().map(|(id, &x)| (id as u32, x)).collect();
            sorted.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            sorted.truncate(count);
            prop_assert_eq!(logits.largest(count), sorted);
        }
    }

    proptest! {
        #[test]
        fn exponentials_and_their_sum_are_those_of_the_definition(row in row(), scale in 0.1f32..3.0) {
            let mut grown = row.clone();
            let (max, sum) = exponentiate(&mut grown, scale);
            prop_assert_eq!(max, row.iter().copied().fold(f32::MIN, f32::max));
            let mut exact_sum = 0.0;
            for (&x, &grown) in row.iter().zip(&grown) {
                let exact = (f64::from(x - max) * f64::from(scale)).exp();
                exact_sum += exact;
                prop_assert!((f64::from(grown) - exact).abs() < 1e-6 + 1e-5 * exact, "{} {}", grown, exact);
            }
            prop_assert!((sum - exact_sum).abs() < 1e-5 * exact_sum);
        }
    }

    #[test]
    fn what_is_not_finite_is_seen() {
        let mut row = vec![0.5f32; 300];
        assert!(Logits::new(&row).log_sum_exp().is_finite());
        for bad in [f32::NAN, f32::INFINITY] {
            row[277] = bad;
            assert!(!Logits::new(&row).log_sum_exp().is_finite(), "{bad}");
            assert!(!exponentiate(&mut row.clone(), 1.0).1.is_finite(), "{bad}");
        }
        row[277] = f32::NEG_INFINITY;
        assert!(Logits::new(&row).log_sum_exp().is_finite());
    }
}
