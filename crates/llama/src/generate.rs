//! One completion, token by token: for chat and for tests. A teacher batches for itself.

use std::ops::ControlFlow;

use tch::{Device, Kind, Tensor};

use crate::{Error, KvCache, Model, Result};

/// How to choose and when to stop.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    pub max_new_tokens: usize,
    /// Zero takes the likeliest token each time.
    pub temperature: f32,
    /// Draws from the smallest set of tokens that holds this mass (Holtzman et al., "The Curious
    /// Case of Neural Text Degeneration", 2020). One draws from all.
    pub top_p: f32,
    pub seed: u64,
    /// Any of these ends the completion and is not part of it.
    pub stop_ids: Vec<u32>,
}

impl GenerateOptions {
    /// Greedy, ending at the model's own end tokens.
    pub fn greedy(model: &Model, max_new_tokens: usize) -> Self {
        let stop_ids = model.config().eos_token_ids.clone();
        Self { max_new_tokens, temperature: 0.0, top_p: 1.0, seed: 0, stop_ids }
    }
}

/// Generates after `prompt`, telling each token to `on_token` as it comes; `Break` ends there.
/// Gives the new tokens. Stops short of `max_new_tokens` where the model's context ends.
pub fn generate(
    model: &Model,
    prompt: &[u32],
    options: &GenerateOptions,
    on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Result<Vec<u32>> {
    let context = model.config().max_position_embeddings;
    let length = prompt.len() as i64;
    if prompt.is_empty() || length >= context {
        return Err(Error::TooLong(format!(
            "a prompt of {length} tokens does not fit the model's context of {context} with room for an answer"
        )));
    }
    let wanted = i64::try_from(options.max_new_tokens).unwrap_or(i64::MAX).min(context - length);
    let mut cache = KvCache::new(model.config(), 1, length + wanted, model.device(), model.kind())?;
    let mut sampler = Sampler::new(options.temperature, options.top_p, options.seed)?;
    let ids: Vec<i64> = prompt.iter().map(|&id| i64::from(id)).collect();
    let mut hidden_bh = model.prefill(&Tensor::f_from_slice(&ids)?.f_unsqueeze(0)?, &[length], &mut cache)?;
    let mut tokens = Vec::new();
    while (tokens.len() as i64) < wanted {
        let logits_v = tch::no_grad(|| model.head(&hidden_bh))?.f_squeeze_dim(0)?;
        let token = sampler.pick(&logits_v)?;
        if options.stop_ids.contains(&token) {
            break;
        }
        tokens.push(token);
        if on_token(token).is_break() || tokens.len() as i64 == wanted {
            break;
        }
        hidden_bh = model.decode(&Tensor::f_from_slice(&[i64::from(token)])?, &mut cache)?;
    }
    Ok(tokens)
}

/// Up to `max_new_tokens` of the likeliest tokens, without the end token.
pub fn greedy(model: &Model, prompt: &[u32], max_new_tokens: usize) -> Result<Vec<u32>> {
    generate(model, prompt, &GenerateOptions::greedy(model, max_new_tokens), &mut |_| ControlFlow::Continue(()))
}

/// Chooses tokens from logits.
#[derive(Debug)]
pub struct Sampler {
    temperature: f32,
    top_p: f32,
    state: u64,
}

impl Sampler {
    pub fn new(temperature: f32, top_p: f32, seed: u64) -> Result<Self> {
        if !(temperature.is_finite() && temperature >= 0.0) {
            return Err(Error::Invalid(format!("temperature {temperature} must be a number of at least 0")));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(Error::Invalid(format!("top-p {top_p} must be above 0 and at most 1")));
        }
        Ok(Self { temperature, top_p, state: seed })
    }

    /// A token id from logits `[v]`.
    pub fn pick(&mut self, logits_v: &Tensor) -> Result<u32> {
        let logits_v = logits_v.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?;
        // One number that is none makes the largest one too.
        if !logits_v.f_max()?.f_double_value(&[])?.is_finite() {
            return Err(Error::Invalid("the model's logits are not finite; its weights are damaged".into()));
        }
        if self.temperature == 0.0 {
            return token_id(logits_v.f_argmax(-1, false)?.f_int64_value(&[])?);
        }
        let masses_v = logits_v.f_div_scalar(f64::from(self.temperature))?.f_softmax(-1, Kind::Float)?;
        let (masses_v, ids_v) = masses_v.f_sort(-1, true)?;
        let masses = Vec::<f32>::try_from(&masses_v)?;
        let mut kept = 0;
        let mut sum = 0.0_f64;
        while kept < masses.len() && (kept == 0 || sum < f64::from(self.top_p)) {
            sum += f64::from(masses[kept]);
            kept += 1;
        }
        let mut left = self.uniform() * sum;
        let chosen = masses[..kept].iter().position(|&mass| {
            left -= f64::from(mass);
            left < 0.0
        });
        token_id(ids_v.f_int64_value(&[chosen.unwrap_or(kept.saturating_sub(1)) as i64])?)
    }

    /// SplitMix64 (Steele, Lea and Flood, 2014), as a number from 0 to 1.
    fn uniform(&mut self) -> f64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        (mixed >> 11) as f64 / (1_u64 << 53) as f64
    }
}

fn token_id(id: i64) -> Result<u32> {
    u32::try_from(id).map_err(|_| Error::Invalid(format!("token id {id} is out of range")))
}

#[cfg(test)]
mod tests;
