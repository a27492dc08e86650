//! Rotary position embedding (Su et al., "RoFormer", 2021), in the half-split layout that Hugging
//! Face checkpoints are stored for, with Llama 3.1's stretched wavelengths where configured.

use std::f64::consts::TAU;

use tch::{Device, Kind, Tensor};

use crate::{Config, Llama3Scaling, Result};

/// Frequencies of a head's pairs, f32 `[d / 2]`.
#[derive(Debug)]
pub(crate) struct Rope {
    inverse_wavelengths: Tensor,
}

/// Cosine and sine of each position's angles, `[..., d]` in the model's kind: for both halves of a
/// head, and the sine negative in the first.
pub(crate) struct Angles {
    cos: Tensor,
    sin: Tensor,
}

/// As [`Rope`], on the host.
pub(crate) struct Frequencies(pub(crate) Vec<f32>);

impl Frequencies {
    pub(crate) fn new(config: &Config) -> Self {
        let size = config.head_dim as f32;
        let base = (0..config.head_dim).step_by(2).map(|at| 1.0 / (config.rope_theta as f32).powf(at as f32 / size));
        let Some(scaling) = &config.rope_scaling else { return Self(base.collect()) };
        let context = scaling.original_max_position_embeddings as f32;
        let (low, high) = (scaling.low_freq_factor as f32, scaling.high_freq_factor as f32);
        let factor = scaling.factor as f32;
        let stretched = base.map(|frequency| {
            let wavelength = std::f32::consts::TAU / frequency;
            if wavelength > context / low {
                frequency / factor
            } else if wavelength < context / high {
                frequency
            } else {
                let share = (context / wavelength - low) / (high - low);
                (1.0 - share) * frequency / factor + share * frequency
            }
        });
        Self(stretched.collect())
    }
}

impl Rope {
    /// Follows the reference's order of f32 operations: far along a text, a frequency that differs
    /// in its last bit is an angle that differs visibly.
    pub(crate) fn new(config: &Config, device: Device) -> Result<Self> {
        let dims = Tensor::f_arange_start_step(0, config.head_dim, 2, (Kind::Float, Device::Cpu))?;
        let exponents = dims.f_div_scalar(config.head_dim)?;
        let frequencies = Tensor::f_pow_scalar(config.rope_theta, &exponents)?.f_reciprocal()?;
        let frequencies = match &config.rope_scaling {
            Some(scaling) => stretch(&frequencies, scaling)?,
            None => frequencies,
        };
        Ok(Self { inverse_wavelengths: frequencies.f_to_device(device)? })
    }

    /// Angles of positions, int64 of any shape `[...]`.
    pub(crate) fn angles(&self, positions: &Tensor, kind: Kind) -> Result<Angles> {
        let angles = positions.f_to_kind(Kind::Float)?.f_unsqueeze(-1)?.f_mul(&self.inverse_wavelengths)?;
        let (cos, sin) = (angles.f_cos()?.f_to_kind(kind)?, angles.f_sin()?.f_to_kind(kind)?);
        Ok(Angles { cos: Tensor::f_cat(&[&cos, &cos], -1)?, sin: Tensor::f_cat(&[&sin.f_neg()?, &sin], -1)? })
    }
}

impl Angles {
    /// Gives `[b, t, d]` angles a heads axis, so that they meet `[b, heads, t, d]`.
    pub(crate) fn over_heads(&self) -> Result<Self> {
        Ok(Self { cos: self.cos.f_unsqueeze(-3)?, sin: self.sin.f_unsqueeze(-3)? })
    }

    /// Turns each pair `(i, i + d / 2)` of the last axis by its angle.
    pub(crate) fn rotate(&self, heads: &Tensor) -> Result<Tensor> {
        let half = heads.size().last().copied().unwrap_or(0) / 2;
        // With the halves exchanged, each half of the head needs one product more: half the passes
        // over memory that turning the halves apart takes.
        let exchanged = heads.f_roll([half], [-1])?;
        Ok(heads.f_mul(&self.cos)?.f_addcmul(&exchanged, &self.sin)?)
    }
}

/// Divides the frequency of long waves by the factor, keeps that of short ones, and goes from one
/// to the other between.
fn stretch(frequencies: &Tensor, scaling: &Llama3Scaling) -> Result<Tensor> {
    let context = scaling.original_max_position_embeddings as f64;
    let (low, high) = (scaling.low_freq_factor, scaling.high_freq_factor);
    let wavelengths = frequencies.f_reciprocal()?.f_mul_scalar(TAU)?;
    let stretched = frequencies.f_div_scalar(scaling.factor)?;
    let share = wavelengths.f_reciprocal()?.f_mul_scalar(context)?.f_sub_scalar(low)?.f_div_scalar(high - low)?;
    let rest = share.f_neg()?.f_add_scalar(1.0)?;
    let between = rest.f_mul(frequencies)?.f_div_scalar(scaling.factor)?.f_add(&share.f_mul(frequencies)?)?;
    let long = wavelengths.f_gt(context / low)?;
    let short = wavelengths.f_lt(context / high)?;
    // `a.where_self(condition, b)` picks a where the condition holds.
    let not_long = frequencies.f_where_self(&short, &between)?;
    Ok(stretched.f_where_self(&long, &not_long)?)
}
