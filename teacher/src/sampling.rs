//! The next token of each row: what its bounds leave of the distribution, one uniform a token.
//!
//! Shapes: b rows, v vocabulary, w candidates looked at.

use retort_core::{
    Result,
    random::{Counter, Purpose},
};
use retort_kernels::{BLOCK, Logits};
use tch::{Kind, Tensor};

use crate::{
    cdf::{Cdf, walk},
    torch::{host_f32, host_i64, torch},
};

/// Temperatures below this are greedy: the division would overflow long before it changed a choice.
const GREEDY_BELOW: f64 = 1e-4;
/// Candidates sorted at first, when the nucleus is likely small; eight times more, while it is not.
const FIRST_WIDTH: usize = 64;

/// How completions are drawn. Repetition is punished first, then come temperature, top-k, top-p over
/// what that leaves, and min-p: the order of Hugging Face transformers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampler {
    /// 0 is greedy.
    pub temperature: f64,
    /// Nucleus mass in (0, 1] (Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020).
    pub top_p: f64,
    /// Only the likeliest so many; 0 for all.
    pub top_k: u32,
    /// Only tokens at least this times as likely as the likeliest (Nguyen et al., "Turning Up the Heat:
    /// Min-p Sampling", 2024); 0 for all.
    pub min_p: f64,
    /// Divides the logits of tokens already there where positive, multiplies them where negative
    /// (Keskar et al., "CTRL", 2019); 1 leaves them.
    pub repetition_penalty: f64,
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
    /// Bounded by temperature and nucleus alone.
    pub fn new(temperature: f64, top_p: f64, seed: u64) -> Self {
        Self { temperature, top_p, top_k: 0, min_p: 0.0, repetition_penalty: 1.0, seed }
    }

    /// One token a row of `logits_bv` (any float dtype). A pure function of the logits, the seed, the
    /// places and the tokens `before` each row's: the rest of the batch does not matter.
    pub fn next(&self, logits_bv: &Tensor, places: &[Place], before: &[&[u32]]) -> Result<Vec<u32>> {
        let logits_bv = self.punished(logits_bv, before)?;
        if self.temperature < GREEDY_BELOW {
            let best_b = logits_bv.f_argmax(1, false).map_err(torch)?;
            return Ok(host_i64(&best_b)?.into_iter().map(|id| id as u32).collect());
        }
        let uniforms_b: Vec<f64> = places.iter().map(|place| self.uniform(*place)).collect();
        let scaled_bv =
            logits_bv.f_to_kind(Kind::Float).and_then(|t| t.f_div_scalar(self.temperature)).map_err(torch)?;
        if self.draws_from_all() {
            let probs_bv = scaled_bv.f_softmax(1, Kind::Float).map_err(torch)?;
            let uniforms: Vec<Vec<f64>> = uniforms_b.iter().map(|&uniform| vec![uniform]).collect();
            return Ok(Cdf::new(probs_bv)?.invert(&uniforms)?.into_iter().flatten().map(|(id, _)| id).collect());
        }
        self.cut(&scaled_bv, &uniforms_b)
    }

    /// As [`Sampler::next`], of one row in the host's memory.
    pub fn next_row(&self, logits: &Logits, place: Place, before: &[u32]) -> u32 {
        let greedy = self.temperature < GREEDY_BELOW;
        if greedy && self.repetition_penalty == 1.0 {
            return logits.largest(1).first().map_or(0, |(id, _)| *id);
        }
        let mut row = logits.row().to_vec();
        for &id in distinct(before).iter().filter(|&&id| (id as usize) < logits.len()) {
            let logit = &mut row[id as usize];
            *logit = punish(f64::from(*logit), self.repetition_penalty) as f32;
        }
        if greedy {
            return Logits::new(&row).largest(1).first().map_or(0, |(id, _)| *id);
        }
        row.iter_mut().for_each(|logit| *logit = (f64::from(*logit) / self.temperature) as f32);
        let scaled = Logits::new(&row);
        let uniform = self.uniform(place);
        if self.draws_from_all() {
            return draw(&scaled, uniform);
        }
        let mut width = self.first_width(row.len());
        loop {
            let top = scaled.largest(width);
            let logits: Vec<f32> = top.iter().map(|(_, logit)| *logit).collect();
            match self.pick(&logits, scaled.log_sum_exp(), uniform, width == row.len()) {
                Some(at) => return top.get(at).map_or(0, |(id, _)| *id),
                None => width = (width * 8).min(row.len()),
            }
        }
    }

    fn uniform(&self, place: Place) -> f64 {
        Counter::new(self.seed, Purpose::Sample, place.row, place.position).next_f64()
    }

    fn draws_from_all(&self) -> bool {
        self.top_p >= 1.0 && self.top_k == 0 && self.min_p <= 0.0
    }

    fn first_width(&self, vocab: usize) -> usize {
        FIRST_WIDTH.max(self.top_k as usize).min(vocab)
    }

    fn punished(&self, logits_bv: &Tensor, before: &[&[u32]]) -> Result<Tensor> {
        if self.repetition_penalty == 1.0 {
            return Ok(logits_bv.shallow_clone());
        }
        let punished_bv = logits_bv.f_to_dtype(Kind::Float, false, true).map_err(torch)?;
        for (row, before) in before.iter().enumerate() {
            let ids: Vec<i64> = distinct(before).into_iter().map(i64::from).collect();
            if ids.is_empty() {
                continue;
            }
            let one = || -> std::result::Result<(), tch::TchError> {
                let ids = Tensor::f_from_slice(&ids)?.f_to_device(punished_bv.device())?;
                let mut row_v = punished_bv.f_select(0, row as i64)?;
                let told = row_v.f_index_select(0, &ids)?;
                let down = told.f_div_scalar(self.repetition_penalty)?;
                let up = told.f_mul_scalar(self.repetition_penalty)?;
                let told = down.f_where_self(&told.f_gt(0.0)?, &up)?;
                let _ = row_v.f_index_copy_(0, &ids, &told)?;
                Ok(())
            };
            one().map_err(torch)?;
        }
        Ok(punished_bv)
    }

    /// Draws from the likeliest tokens that the bounds leave.
    fn cut(&self, scaled_bv: &Tensor, uniforms_b: &[f64]) -> Result<Vec<u32>> {
        let (_, vocab) = scaled_bv.size2().map_err(torch)?;
        let log_sum_b = host_f32(&scaled_bv.f_logsumexp([1i64].as_slice(), false).map_err(torch)?)?;
        let mut tokens = vec![0; uniforms_b.len()];
        let mut open: Vec<i64> = (0..uniforms_b.len() as i64).collect();
        let mut width = self.first_width(vocab as usize) as i64;
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
                match self.pick(top_w, log_sum_b[at], uniforms_b[at], width == vocab) {
                    Some(place) => tokens[at] = ids_w[place] as u32,
                    None => wider.push(row),
                }
            }
            open = wider;
            width = (width * 8).min(vocab);
        }
        Ok(tokens)
    }

    /// Where in the sorted candidates the uniform falls; `None` when they are too few to tell and more
    /// exist (`all` is false).
    fn pick(&self, top_w: &[f32], log_sum: f32, uniform: f64, all: bool) -> Option<usize> {
        let most = if self.top_k == 0 { usize::MAX } else { self.top_k as usize };
        let within = &top_w[..most.min(top_w.len())];
        let complete = all || top_w.len() >= most;
        let mass = |logit: &f32| (f64::from(*logit) - f64::from(log_sum)).exp();
        // Of what top-k leaves, where it leaves something out.
        let whole = if self.top_k == 0 { 1.0 } else { within.iter().map(mass).sum() };
        let least = within.first().map_or(0.0, mass) * self.min_p;
        let mut nucleus = 0.0;
        let mut size = 0;
        let mut reached = false;
        for logit in within {
            if size > 0 && mass(logit) < least {
                reached = true;
                break;
            }
            nucleus += mass(logit);
            size += 1;
            if nucleus >= self.top_p * whole {
                reached = true;
                break;
            }
        }
        if !reached && !complete {
            return None;
        }
        let target = uniform * nucleus;
        let mut running = 0.0;
        for (place, logit) in within[..size].iter().enumerate() {
            running += mass(logit);
            if running > target {
                return Some(place);
            }
        }
        // Rounding, or logits that are no numbers: the capture that follows refuses those.
        Some(size.saturating_sub(1))
    }
}

/// A draw from the whole distribution.
fn draw(logits: &Logits, uniform: f64) -> u32 {
    let masses: Vec<f64> = logits.block_masses().collect();
    let wanted = uniform * masses.iter().sum::<f64>();
    let mut before = 0.0;
    let mut block = 0;
    for (at, mass) in masses.iter().enumerate().filter(|(_, mass)| **mass > 0.0) {
        block = at;
        if before + mass > wanted {
            break;
        }
        before += mass;
    }
    let mut probabilities = [0.0; BLOCK];
    let count = logits.probabilities(block, &mut probabilities);
    (block * BLOCK + walk(&probabilities[..count], wanted - before).0) as u32
}

fn punish(logit: f64, penalty: f64) -> f64 {
    if logit > 0.0 { logit / penalty } else { logit * penalty }
}

fn distinct(ids: &[u32]) -> Vec<u32> {
    let mut ids = ids.to_vec();
    ids.sort_unstable();
    ids.dedup();
    ids
}

#[cfg(test)]
mod tests;
