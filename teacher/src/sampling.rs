//! The next token of each row: temperature, then nucleus, one uniform a token.
//!
//! Shapes: b rows, v vocabulary, w candidates looked at.

use retort_core::{
    Result,
    random::{Counter, Purpose},
};
use tch::{Kind, Tensor};

use crate::{
    cdf::Cdf,
    torch::{host_f32, host_i64, torch},
};

/// Temperatures below this are greedy: the division would overflow long before it changed a choice.
const GREEDY_BELOW: f64 = 1e-4;
/// Candidates sorted at first, when the nucleus is likely small; eight times more, while it is not.
const FIRST_WIDTH: i64 = 64;

/// How completions are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampler {
    /// 0 is greedy.
    pub temperature: f64,
    /// Nucleus mass in (0, 1] (Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020).
    pub top_p: f64,
    pub seed: u64,
}

/// Names a draw's random stream: the line of the prompt set, and the index of the token in its
/// sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub row: u64,
    pub position: u64,
}

impl Sampler {
    /// One token a row of `logits_bv` (any float dtype). A pure function of the logits, the seed and
    /// the places: the rest of the batch does not matter.
    pub fn next(&self, logits_bv: &Tensor, places: &[Place]) -> Result<Vec<u32>> {
        if self.temperature < GREEDY_BELOW {
            let best_b = logits_bv.f_argmax(1, false).map_err(torch)?;
            return Ok(host_i64(&best_b)?.into_iter().map(|id| id as u32).collect());
        }
        let uniforms_b: Vec<f64> = places
            .iter()
            .map(|place| Counter::new(self.seed, Purpose::Sample, place.row, place.position).next_f64())
            .collect();
        let scaled_bv =
            logits_bv.f_to_kind(Kind::Float).and_then(|t| t.f_div_scalar(self.temperature)).map_err(torch)?;
        if self.top_p >= 1.0 {
            let probs_bv = scaled_bv.f_softmax(1, Kind::Float).map_err(torch)?;
            let uniforms: Vec<Vec<f64>> = uniforms_b.iter().map(|&uniform| vec![uniform]).collect();
            return Ok(Cdf::new(probs_bv)?.invert(&uniforms)?.into_iter().flatten().map(|(id, _)| id).collect());
        }
        self.nucleus(&scaled_bv, &uniforms_b)
    }

    /// The smallest set of most likely tokens whose mass reaches `top_p`, renormalised.
    fn nucleus(&self, scaled_bv: &Tensor, uniforms_b: &[f64]) -> Result<Vec<u32>> {
        let (_, vocab) = scaled_bv.size2().map_err(torch)?;
        let log_sum_b = host_f32(&scaled_bv.f_logsumexp([1i64].as_slice(), false).map_err(torch)?)?;
        let mut tokens = vec![0; uniforms_b.len()];
        let mut open: Vec<i64> = (0..uniforms_b.len() as i64).collect();
        let mut width = FIRST_WIDTH.min(vocab);
        while !open.is_empty() {
            let rows_bv = if open.len() == tokens.len() {
                scaled_bv.shallow_clone()
            } else {
                let open_b = Tensor::from_slice(&open).f_to_device(scaled_bv.device()).map_err(torch)?;
                scaled_bv.f_index_select(0, &open_b).map_err(torch)?
            };
            let (top_bw, ids_bw) = rows_bv.f_topk(width, 1, true, true).map_err(torch)?;
            let (top_bw, ids_bw) = (host_f32(&top_bw)?, host_i64(&ids_bw)?);
            let mut wider = Vec::new();
            let rows = top_bw.chunks_exact(width as usize).zip(ids_bw.chunks_exact(width as usize));
            for (&row, (top_w, ids_w)) in open.iter().zip(rows) {
                let at = row as usize;
                match pick(top_w, log_sum_b[at], self.top_p, uniforms_b[at], width == vocab) {
                    Some(place) => tokens[at] = ids_w[place] as u32,
                    None => wider.push(row),
                }
            }
            open = wider;
            width = (width * 8).min(vocab);
        }
        Ok(tokens)
    }
}

/// Where in the sorted candidates the uniform falls; `None` when they do not reach `top_p` and more
/// exist.
fn pick(top_w: &[f32], log_sum: f32, top_p: f64, uniform: f64, all: bool) -> Option<usize> {
    let mass = |logit: &f32| (f64::from(*logit) - f64::from(log_sum)).exp();
    let mut nucleus = 0.0;
    let mut size = 0;
    for logit in top_w {
        nucleus += mass(logit);
        size += 1;
        if nucleus >= top_p {
            break;
        }
    }
    if nucleus < top_p && !all {
        return None;
    }
    let target = uniform * nucleus;
    let mut running = 0.0;
    for (place, logit) in top_w[..size].iter().enumerate() {
        running += mass(logit);
        if running > target {
            return Some(place);
        }
    }
    // Rounding, or logits that are no numbers: the capture that follows refuses those.
    Some(size.saturating_sub(1))
}

#[cfg(test)]
mod tests;
