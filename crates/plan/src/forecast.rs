//! What more target tokens would bring: one run's held-out curve, continued.
//!
//! `KL(D) = E + A * D^-alpha`, with `D` the target tokens trained at: the power law with a floor of Hoffmann
//! et al., "Training Compute-Optimal Large Language Models", 2022 (arXiv 2203.15556), which Busbridge et al.,
//! "Distillation Scaling Laws", 2025 (arXiv 2502.08606), find for students too. As there, the sum of
//! Huber's function of the log residuals is made small. The intervals come from a bootstrap of the
//! residuals (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993). `docs/forecast.md` says what
//! a curve from inside one run is worth.

mod fit;

use std::fmt;

use retort_core::random::{Counter, Purpose};
use serde::{Deserialize, Serialize};

/// Fewest points that a law of three numbers is fitted to.
pub const LEAST_POINTS: usize = 5;
/// Share of curves whose law lies inside the interval, about.
pub const CONFIDENCE: f64 = 0.8;
/// Where forecasts are made, in multiples of the tokens trained at.
const FACTORS: [f64; 2] = [2.0, 10.0];
/// Curves that are made up for the intervals.
const RESAMPLES: u64 = 200;
/// Of a longer curve so many points are taken, evenly, its ends among them.
const MOST_POINTS: usize = 64;
/// The fall over the whole curve is at least so many times what a point lies off.
const LEAST_FALL: f64 = 3.0;

/// A student judged on the way.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// Target tokens that it was trained at.
    pub tokens: u64,
    /// Held-out KL, nats a token.
    pub kl: f64,
}

/// `floor + scale * tokens^-exponent`, nats a token.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Law {
    pub floor: f64,
    pub scale: f64,
    pub exponent: f64,
}

impl Law {
    pub fn at(&self, tokens: f64) -> f64 {
        // In logarithms: the power of many tokens alone may be no number.
        self.floor + (self.scale.ln() - self.exponent * tokens.ln()).exp()
    }
}

/// The law, further out than the curve goes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// Of the curve's last tokens.
    pub factor: f64,
    pub tokens: f64,
    pub kl: f64,
    /// Ends of the interval.
    pub low: f64,
    pub high: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Forecast {
    pub law: Law,
    /// Points that it was fitted to.
    pub points: usize,
    /// How far a point lies off, as a share of its KL: root of the mean square.
    pub scatter: f64,
    pub predictions: Vec<Prediction>,
}

/// Why a curve bears no forecast.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Unfit {
    TooFew {
        points: usize,
    },
    /// The student ended worse than it began.
    Worse,
    NoFall,
    TooSlow,
    TooFast,
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooFew { points } => write!(
                f,
                "the held-out curve has {points} of the {LEAST_POINTS} points that a fit needs; a smaller \
                 train.checkpoint_steps gives more"
            ),
            Self::Worse => f.write_str("the student's held-out KL ended above where it began"),
            Self::NoFall => f.write_str("the held-out KL did not fall more than its points scatter"),
            Self::TooSlow => f.write_str("the held-out KL falls too slowly to tell where it goes"),
            Self::TooFast => f.write_str("the held-out KL fell at the beginning alone, which no power law describes"),
        }
    }
}

/// Fits the law and says what it comes to at twice and ten times the tokens. Points without tokens, the one before
/// training among them, have no place in a power law and are left out, as is what is no positive number; of two
/// with the same tokens the later one counts. The same curve and `seed` give the same bits.
pub fn forecast(points: &[Point], seed: u64) -> Result<Forecast, Unfit> {
    let before = points.iter().find(|point| point.tokens == 0);
    let last = points.iter().filter(|point| point.kl.is_finite()).max_by_key(|point| point.tokens);
    if let (Some(before), Some(last)) = (before, last)
        && last.kl > before.kl
    {
        return Err(Unfit::Worse);
    }
    let points = usable(points);
    if points.len() < LEAST_POINTS {
        return Err(Unfit::TooFew { points: points.len() });
    }
    let last = points[points.len() - 1].tokens as f64;
    let reach: Vec<f64> = points.iter().map(|point| (point.tokens as f64 / last).ln()).collect();
    let logs: Vec<f64> = points.iter().map(|point| point.kl.ln()).collect();
    let fitted = fit::fit(&reach, &logs);
    let residuals: Vec<f64> = reach.iter().zip(&logs).map(|(&reach, log)| log - fitted.at(reach).ln()).collect();
    // Three numbers were fitted: what is left is smaller than it would be without them.
    let spare = residuals.len() as f64 / (residuals.len() - 3) as f64;
    let scatter = (spare * residuals.iter().map(|r| r * r).sum::<f64>() / residuals.len() as f64).sqrt();
    let fall = (fitted.at(reach[0]) / fitted.at(0.0)).ln();
    if !(fall > LEAST_FALL * scatter && fall > 1e-6) {
        return Err(Unfit::NoFall);
    }
    match fitted.bound() {
        Some(fit::Bound::Least) => return Err(Unfit::TooSlow),
        Some(fit::Bound::Most) => return Err(Unfit::TooFast),
        None => {}
    }
    let samples: Vec<fit::Curve> = (0..RESAMPLES)
        .map(|round| fit::fit(&reach, &resample(&fitted, &reach, &residuals, spare, seed, round)))
        .collect();
    let predictions = FACTORS.map(|factor| {
        let kl = fitted.at(factor.ln());
        let mut kls: Vec<f64> = samples.iter().map(|sample| sample.at(factor.ln())).collect();
        kls.sort_by(f64::total_cmp);
        let quantile = |share: f64| kls[((kls.len() - 1) as f64 * share).round() as usize];
        let tail = (1.0 - CONFIDENCE) / 2.0;
        Prediction {
            factor,
            tokens: factor * last,
            kl,
            low: quantile(tail).min(kl),
            high: quantile(1.0 - tail).max(kl),
        }
    });
    let law = Law {
        floor: fitted.floor,
        scale: (fitted.excess.ln() + fitted.exponent * last.ln()).exp(),
        exponent: fitted.exponent,
    };
    Ok(Forecast { law, points: points.len(), scatter, predictions: predictions.to_vec() })
}

/// Rising in tokens, each once.
fn usable(points: &[Point]) -> Vec<Point> {
    let sound = |point: &Point| point.tokens > 0 && (1e-9..1e9).contains(&point.kl);
    let mut sound: Vec<Point> = points.iter().copied().filter(sound).rev().collect();
    sound.sort_by_key(|point| point.tokens);
    sound.dedup_by_key(|point| point.tokens);
    let most = sound.len().min(MOST_POINTS);
    (0..most).map(|i| sound[i * (sound.len() - 1) / (most - 1).max(1)]).collect()
}

/// Logarithms of a curve as it might have been measured.
fn resample(fitted: &fit::Curve, reach: &[f64], residuals: &[f64], spare: f64, seed: u64, round: u64) -> Vec<f64> {
    let mut random = Counter::new(seed, Purpose::Resample, round, 0);
    let mean = residuals.iter().sum::<f64>() / residuals.len() as f64;
    let mut draw = || residuals[random.below(residuals.len() as u64) as usize] - mean;
    reach.iter().map(|&reach| fitted.at(reach).ln() + spare.sqrt() * draw()).collect()
}

#[cfg(test)]
mod tests;
