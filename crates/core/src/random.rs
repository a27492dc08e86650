//! Counter-based randomness: a draw is a pure function of its key, so a shard computed twice, in
//! any batch order and on any worker, draws the same numbers.

/// A stream of numbers named by `(seed, purpose, row, position)`.
///
/// Mixing is SplitMix64's finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom number
/// generators", OOPSLA 2014) folded over the parts of the key.
#[derive(Clone, Copy, Debug)]
pub struct Counter {
    key: u64,
    draw: u64,
}

/// What a stream is for; two purposes never share numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Purpose {
    /// The next token of a completion.
    Sample = 1,
    /// Draws from a soft target's tail.
    Tail = 2,
    /// Order of the training rows.
    Shuffle = 3,
    /// Initial weights.
    Init = 4,
    /// Which rows are held out.
    Split = 5,
    /// Initial weights of adapters.
    Adapter = 6,
    /// Which inputs of an adapter are dropped.
    Dropout = 7,
    /// Curves made up for the interval of a forecast.
    Resample = 16,
}

impl Counter {
    pub fn new(seed: u64, purpose: Purpose, row: u64, position: u64) -> Self {
        let mut key = mix(seed ^ 0x9e37_79b9_7f4a_7c15);
        for part in [purpose as u64, row, position] {
            key = mix(key ^ part.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(0x632b_e59b_d9b4_e019));
        }
        Self { key, draw: 0 }
    }

    pub fn next_u64(&mut self) -> u64 {
        self.draw += 1;
        mix(self.key.wrapping_add(self.draw.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
    }

    /// Uniform in [0, 1), 53 bits.
    pub fn next_f64(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in 0..n (Lemire's multiply-shift; the bias is below n / 2^64).
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next_u64()) * u128::from(n)) >> 64) as u64
    }

    /// Fisher-Yates.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64 + 1) as usize);
        }
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_key_same_numbers_and_another_position_others() {
        let mut a = Counter::new(7, Purpose::Tail, 3, 9);
        let mut b = Counter::new(7, Purpose::Tail, 3, 9);
        let mut c = Counter::new(7, Purpose::Tail, 3, 10);
        let (x, y, z) = (a.next_u64(), b.next_u64(), c.next_u64());
        assert_eq!(x, y);
        assert_ne!(x, z);
    }

    #[test]
    fn uniform_enough_over_positions() {
        // First draws of 20,000 streams: a counter generator must be uniform across keys, not only within one.
        let n = 20_000;
        let mean = (0..n).map(|p| Counter::new(1, Purpose::Sample, 0, p).next_f64()).sum::<f64>() / n as f64;
        assert!((mean - 0.5).abs() < 0.01, "{mean}");
        let mut buckets = [0u32; 16];
        for p in 0..n {
            buckets[Counter::new(1, Purpose::Sample, 0, p).below(16) as usize] += 1;
        }
        let expected = n as f64 / 16.0;
        let chi2: f64 = buckets.iter().map(|&b| (f64::from(b) - expected).powi(2) / expected).sum();
        assert!(chi2 < 40.0, "chi-squared with 15 degrees of freedom: {chi2}");
    }
}
