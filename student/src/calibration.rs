//! Whether a model is right as often as it says: the expected calibration error of Guo et al., "On Calibration of
//! Modern Neural Networks", 2017 (arXiv 1706.04599), of the most likely next token.

/// Bins of equal width, `(b / BINS, (b + 1) / BINS]`; 15 as in the paper.
const BINS: usize = 15;

/// Sums in each bin; those of two sets of tokens add up.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Calibration {
    bins: [Bin; BINS],
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Bin {
    tokens: u64,
    /// Tokens that the text goes on with.
    correct: u64,
    /// Sum of the probabilities.
    confidence: f64,
}

impl Calibration {
    /// One token: the probability of the most likely one, 0 to 1, and whether the text goes on with it.
    pub fn push(&mut self, confidence: f64, correct: bool) {
        // Saturates at both ends; a NaN falls into the first bin and makes the error one.
        let bin = ((confidence * BINS as f64).ceil() as usize).clamp(1, BINS) - 1;
        let bin = &mut self.bins[bin];
        bin.tokens += 1;
        bin.correct += u64::from(correct);
        bin.confidence += confidence;
    }

    pub fn add(&mut self, other: &Self) {
        for (bin, other) in self.bins.iter_mut().zip(&other.bins) {
            bin.tokens += other.tokens;
            bin.correct += other.correct;
            bin.confidence += other.confidence;
        }
    }

    /// `sum_b n_b / n |accuracy_b - mean confidence_b|`, 0 to 1; None of no tokens.
    pub fn error(&self) -> Option<f64> {
        let tokens: u64 = self.bins.iter().map(|bin| bin.tokens).sum();
        // The bin's own number of tokens cancels out.
        let gaps: f64 = self.bins.iter().map(|bin| (bin.correct as f64 - bin.confidence).abs()).sum();
        (tokens > 0).then(|| gaps / tokens as f64)
    }
}

#[cfg(test)]
mod tests {
    use retort_core::random::{Counter, Purpose};

    use super::*;

    fn of(tokens: &[(f64, bool)]) -> Calibration {
        let mut calibration = Calibration::default();
        tokens.iter().for_each(|&(confidence, correct)| calibration.push(confidence, correct));
        calibration
    }

    /// As the paper writes it, bin by bin.
    fn reference(tokens: &[(f64, bool)]) -> f64 {
        let mut error = 0.0;
        for b in 0..15 {
            let (low, high) = (f64::from(b) / 15.0, f64::from(b + 1) / 15.0);
            let inside: Vec<_> = tokens.iter().filter(|(p, _)| *p > low && *p <= high).collect();
            if inside.is_empty() {
                continue;
            }
            let n = inside.len() as f64;
            let accuracy = inside.iter().filter(|(_, correct)| *correct).count() as f64 / n;
            let confidence = inside.iter().map(|(p, _)| p).sum::<f64>() / n;
            error += n / tokens.len() as f64 * (accuracy - confidence).abs();
        }
        error
    }

    fn random(count: usize, right: impl Fn(f64) -> f64) -> Vec<(f64, bool)> {
        let mut random = Counter::new(5, Purpose::Sample, 0, 0);
        let mut token = || {
            let confidence = 1.0 - random.next_f64();
            (confidence, random.next_f64() < right(confidence))
        };
        (0..count).map(|_| token()).collect()
    }

    #[test]
    fn it_is_the_papers_sum_and_adds_up() {
        let tokens = random(1000, |p| p * p);
        let whole = of(&tokens);
        assert!((whole.error().unwrap() - reference(&tokens)).abs() < 1e-12);
        let (mut left, right) = (of(&tokens[..333]), of(&tokens[333..]));
        left.add(&right);
        assert!((left.error().unwrap() - whole.error().unwrap()).abs() < 1e-12);
    }

    #[test]
    fn who_is_right_as_often_as_he_says_has_none() {
        assert!(of(&random(100_000, |p| p)).error().unwrap() < 0.01);
        // Sure and always wrong; in doubt and always right.
        assert_eq!(of(&[(1.0, false); 7]).error(), Some(1.0));
        assert!((of(&[(0.25, true); 4]).error().unwrap() - 0.75).abs() < 1e-12);
        // Over and under in one bin cancel out, in two they do not.
        assert!(of(&[(0.5, true), (0.5, false)]).error().unwrap() < 1e-12);
        assert!((of(&[(0.4, true), (0.6, false)]).error().unwrap() - 0.6).abs() < 1e-12);
    }

    #[test]
    fn the_ends_have_a_bin_and_what_is_no_number_shows() {
        assert_eq!(of(&[]).error(), None);
        assert_eq!(of(&[(0.0, false), (1.0, true)]).error(), Some(0.0));
        assert!(of(&[(f64::NAN, true), (0.5, true)]).error().unwrap().is_nan());
        // Rounding may lead just outside.
        assert!(of(&[(1.000_001, true), (-1e-9, false)]).error().unwrap() < 1e-5);
    }
}
