//! The law that fits a curve best. For each exponent the two other numbers follow from weighted least
//! squares; exponents are tried over their whole range, so that no start can lead astray.

/// Exponents that are tried, and beyond which a curve is no power law.
const EXPONENTS: (f64, f64) = (0.02, 5.0);
const GRID: usize = 32;
/// Halvings of the bracket around the grid's best, by the golden ratio.
const SECTIONS: usize = 16;
const REFINEMENTS: usize = 12;
/// Log residuals above this weigh by their size, not by its square: Huber's function.
const HUBER: f64 = 0.02;

/// `floor + excess * exp(-exponent * reach)`, with `reach` the logarithm of tokens over the curve's last.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Curve {
    pub floor: f64,
    /// Above the floor at the curve's end.
    pub excess: f64,
    pub exponent: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bound {
    Least,
    Most,
}

impl Curve {
    pub fn at(&self, reach: f64) -> f64 {
        self.floor + self.excess * (-self.exponent * reach).exp()
    }

    /// The end of the tried exponents that this one lies at.
    pub fn bound(&self) -> Option<Bound> {
        match self.exponent {
            exponent if exponent < EXPONENTS.0 * 1.01 => Some(Bound::Least),
            exponent if exponent > EXPONENTS.1 / 1.01 => Some(Bound::Most),
            _ => None,
        }
    }
}

/// The curve with the least sum of Huber's function over log residuals. `logs` are finite.
pub(super) fn fit(reach: &[f64], logs: &[f64]) -> Curve {
    let (least, most) = (EXPONENTS.0.ln(), EXPONENTS.1.ln());
    let step = (most - least) / (GRID - 1) as f64;
    let at = |log_exponent: f64| fit_at(log_exponent.exp(), reach, logs);
    let mut best = (0, at(least));
    for i in 1..GRID {
        let candidate = at(least + step * i as f64);
        if candidate.1 < best.1.1 {
            best = (i, candidate);
        }
    }
    let middle = least + step * best.0 as f64;
    let (mut low, mut high) = ((middle - step).max(least), (middle + step).min(most));
    let golden = (5f64.sqrt() - 1.0) / 2.0;
    let mut best = best.1;
    for _ in 0..SECTIONS {
        let (left, right) = (high - golden * (high - low), low + golden * (high - low));
        let (at_left, at_right) = (at(left), at(right));
        let better = if at_left.1 <= at_right.1 {
            high = right;
            at_left
        } else {
            low = left;
            at_right
        };
        if better.1 < best.1 {
            best = better;
        }
    }
    best.0
}

/// The best floor and excess at this exponent, and what is made small.
fn fit_at(exponent: f64, reach: &[f64], logs: &[f64]) -> (Curve, f64) {
    let powers: Vec<f64> = reach.iter().map(|reach| (-exponent * reach).exp()).collect();
    let residual = |curve: &Curve, i: usize| logs[i] - (curve.floor + curve.excess * powers[i]).ln();
    let cost = |curve: &Curve| (0..logs.len()).map(|i| huber(residual(curve, i))).sum::<f64>();
    let of = |(floor, excess)| Curve { floor, excess, exponent };
    // Of shares of the values themselves: a straight problem, and near enough to go on from.
    let start = logs.iter().zip(&powers).map(|(log, &power)| (power, log.exp(), (-2.0 * log).exp()));
    let mut curve = of(least_squares(start));
    let mut least = cost(&curve);
    for _ in 0..REFINEMENTS {
        // One step of Gauss and Newton: residuals in a straight line, weighed as Huber's function has it.
        let terms = (0..logs.len()).map(|i| {
            let value = curve.floor + curve.excess * powers[i];
            let residual = residual(&curve, i);
            let weight = (HUBER / residual.abs()).min(1.0);
            (powers[i], value * (1.0 + residual), weight / (value * value))
        });
        let next = of(least_squares(terms));
        let mut share = 1.0;
        let mut taken = None;
        while share > 1e-3 && taken.is_none() {
            let part = |from: f64, to: f64| from + share * (to - from);
            let tried = of((part(curve.floor, next.floor), part(curve.excess, next.excess)));
            taken = Some((tried, cost(&tried))).filter(|(_, cost)| *cost < least);
            share /= 2.0;
        }
        let Some((better, cost)) = taken else { break };
        let gain = least - cost;
        (curve, least) = (better, cost);
        if gain <= 1e-9 * least {
            break;
        }
    }
    (curve, if least.is_finite() { least } else { f64::INFINITY })
}

pub(super) fn huber(residual: f64) -> f64 {
    let size = residual.abs();
    if size <= HUBER { 0.5 * size * size } else { HUBER * (size - 0.5 * HUBER) }
}

/// `a` and `b`, neither below 0, with the least sum of `w (y - a - b x)^2` over terms `(x, y, w)`.
fn least_squares(terms: impl Iterator<Item = (f64, f64, f64)>) -> (f64, f64) {
    let (mut sw, mut sx, mut sy, mut sxx, mut sxy) = (0.0, 0.0, 0.0, 0.0, 0.0);
    for (x, y, w) in terms {
        sw += w;
        sx += w * x;
        sy += w * y;
        sxx += w * x * x;
        sxy += w * x * y;
    }
    let determinant = sw * sxx - sx * sx;
    let (a, b) = ((sxx * sy - sx * sxy) / determinant, (sw * sxy - sx * sy) / determinant);
    if !(a.is_finite() && b.is_finite()) || b < 0.0 {
        (sy / sw, 0.0)
    } else if a < 0.0 {
        (0.0, sxy / sxx)
    } else {
        (a, b)
    }
}
