//! Which stage of a pipeline holds which layers.
//!
//! A pipeline is as fast as its slowest stage, so the split makes that one as fast as it can be: the
//! linear partition problem, solved by a search over the bottleneck. Many splits often share one;
//! of these the evenest is taken (the least sum of squares), and of equally even ones the one whose
//! early stages hold fewer layers. So 126 equal layers on 16 stages are 2 of 7 and then 14 of 8.
//!
//! Costs are compared as whole multiples of about 2⁻⁴⁰ of the largest, the unit a power of two: equal
//! costs and whole ones tie exactly, whatever the last bit of a sum of doubles says, and every process
//! of a group works out the same split.

use std::ops::Range;

use retort_core::{Code, Error, Result};

use crate::Config;

/// The finest difference between two costs, as a part of the power of two below the largest.
const STEPS: f64 = (1_u64 << 40) as f64;

/// Floating-point operations a token, a multiplication and an addition counted as two.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenFlops {
    /// One layer's seven weight products.
    pub layer_products: f64,
    /// One layer's scores and weighted sums over the context.
    pub layer_attention: f64,
    /// The head, at a position whose logits are wanted.
    pub head: f64,
}

impl TokenFlops {
    /// One layer, all together.
    pub fn layer(&self) -> f64 {
        self.layer_products + self.layer_attention
    }
}

/// Splits `layers` into `stages` runs so that the most expensive stage costs as little as can be.
/// `first` is what stage 0 does besides its layers (the embedding), `last` what the last one does
/// (norm, head, soft targets). Any unit serves; every stage gets at least one layer.
///
/// `SpecInvalid` where there are more stages than layers, none at all, or a cost is negative or not
/// finite.
pub fn balance_layers(layers: &[f64], first: f64, last: f64, stages: usize) -> Result<Vec<Range<usize>>> {
    check(layers, first, last, stages)?;
    let costs = whole(layers, first, last)?;
    let mut sums = vec![0; costs.len() + 1];
    for (layer, cost) in costs.iter().enumerate() {
        sums[layer + 1] = sums[layer] + cost;
    }
    Ok(evenest(&sums, stages, bottleneck(&costs, stages)))
}

/// What a token costs by arithmetic, where nothing was measured; `mean_context` is the number of
/// positions that one attends to on average (half the length of a text that is scored).
pub fn token_flops(config: &Config, mean_context: f64) -> TokenFlops {
    let [hidden, inner, vocabulary] =
        [config.hidden_size, config.intermediate_size, config.vocab_size].map(|size| size as f64);
    let queries = (config.num_attention_heads * config.head_dim) as f64;
    let keys = (config.num_key_value_heads * config.head_dim) as f64;
    let context = config.sliding_window.map_or(mean_context, |window| mean_context.min(window as f64));
    TokenFlops {
        layer_products: 2.0 * hidden * (2.0 * queries + 2.0 * keys + 3.0 * inner),
        layer_attention: 4.0 * queries * context,
        head: 2.0 * hidden * vocabulary,
    }
}

fn check(layers: &[f64], first: f64, last: f64, stages: usize) -> Result<()> {
    let invalid = |message: String| Err(Error::new(Code::SpecInvalid, message));
    if stages == 0 {
        return invalid("0 stages cannot hold a model; name at least 1".to_owned());
    }
    if stages > layers.len() {
        return invalid(format!(
            "{stages} stages for {} layers: each holds at least one, so take at most {} stages",
            layers.len(),
            layers.len()
        ));
    }
    let named = layers.iter().enumerate().map(|(layer, &cost)| (format!("layer {layer}"), cost));
    let ends = [("the first stage".to_owned(), first), ("the last stage".to_owned(), last)];
    for (place, cost) in named.chain(ends) {
        if !(cost.is_finite() && cost >= 0.0) {
            return invalid(format!("the cost of {place} is {cost}; it must be a finite number of at least 0"));
        }
    }
    Ok(())
}

/// The costs as whole numbers, the largest between 2⁴⁰ and 2⁴¹. The first layer is always with stage 0 and the last
/// one always with the last stage, so what these do besides is added there.
fn whole(layers: &[f64], first: f64, last: f64) -> Result<Vec<u64>> {
    let mut costs = layers.to_vec();
    if let Some(cost) = costs.first_mut() {
        *cost += first;
    }
    if let Some(cost) = costs.last_mut() {
        *cost += last;
    }
    let largest = costs.iter().copied().fold(0.0, f64::max);
    if !largest.is_finite() {
        return Err(Error::new(
            Code::SpecInvalid,
            format!("a layer and what its stage does besides add up to more than {:e}; use a larger unit", f64::MAX),
        ));
    }
    // The exponent's bits alone: the power of two below.
    let unit = f64::from_bits(largest.to_bits() & f64::INFINITY.to_bits()).max(f64::MIN_POSITIVE);
    Ok(costs.into_iter().map(|cost| (cost / unit * STEPS).round() as u64).collect())
}

/// The least cost within which `stages` runs hold every layer.
fn bottleneck(costs: &[u64], stages: usize) -> u64 {
    let fits = |limit: u64| {
        let (mut runs, mut run) = (1, 0);
        for &cost in costs {
            if run + cost > limit {
                (runs, run) = (runs + 1, 0);
            }
            run += cost;
        }
        runs <= stages
    };
    let mut low = costs.iter().copied().max().unwrap_or(0);
    let mut high = costs.iter().sum();
    while low < high {
        let middle = low + (high - low) / 2;
        if fits(middle) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    low
}

/// Of the splits within `limit`, the one of least squares; `sums[i]` is what the first `i` cost.
fn evenest(sums: &[u64], stages: usize, limit: u64) -> Vec<Range<usize>> {
    let layers = sums.len() - 1;
    // least[start]: the squares of the layers from `start` on, in as many stages as were added so
    // far; ends[stage][start]: where the first of these stages ends.
    let mut least = vec![None; layers + 1];
    least[layers] = Some(0_u128);
    let mut ends = Vec::with_capacity(stages);
    for _ in 0..stages {
        let mut next = vec![None; layers + 1];
        let mut end_of = vec![layers; layers + 1];
        for start in 0..layers {
            for end in start + 1..=layers {
                let cost = sums[end] - sums[start];
                if cost > limit {
                    break;
                }
                let Some(rest) = least[end] else { continue };
                let squares = rest + u128::from(cost) * u128::from(cost);
                if next[start].is_none_or(|best| squares < best) {
                    (next[start], end_of[start]) = (Some(squares), end);
                }
            }
        }
        least = next;
        ends.push(end_of);
    }
    let mut start = 0;
    let stage = |end_of: &Vec<usize>| {
        let range = start..end_of[start];
        start = range.end;
        range
    };
    ends.iter().rev().map(stage).collect()
}

#[cfg(test)]
mod tests;
