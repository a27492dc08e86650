//! One decoder block: attention and feed-forward, each after a norm and around a residual.

use retort_core::spec::LoraTarget;
use tch::{Kind, Tensor};

use super::adapter::{Adapter, Masks};
use crate::{Config, Error, Keep, Result, rope::Angles};

#[derive(Debug)]
pub(crate) struct Block {
    pub(super) input_norm_h: Tensor,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    pub(super) post_norm_h: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// `x weight^T + bias`, and what an adapter adds; the weight is `[outputs, inputs]`.
#[derive(Debug)]
pub(super) struct Linear {
    pub(super) weight: Weight,
    bias: Option<Tensor>,
    pub(super) adapter: Option<Adapter>,
}

/// What a block computes on the way, in this order.
pub(crate) enum Seen<'a> {
    /// What the norm before attention gives, `[b, t, h]`.
    InputNorm(&'a Tensor),
    /// The heads' outputs one after another, `[b, t, q * d]`.
    Mixed(&'a Tensor),
    /// What the norm before the feed-forward block gives, `[b, t, h]`.
    PostNorm(&'a Tensor),
    /// The activations inside the feed-forward block, `[b, t, inner]`.
    Inner(&'a Tensor),
}

impl Block {
    pub(crate) fn assemble(layer: i64, find: &dyn Fn(&str) -> Result<Option<Weight>>) -> Result<Self> {
        let needed = |name: &str| {
            let name = format!("model.layers.{layer}.{name}");
            find(&name)?.ok_or_else(|| Error::Invalid(format!("no tensor {name:?}")))
        };
        let take = |name: &str| needed(name)?.plain();
        let linear = |name: &str| {
            let bias = find(&format!("model.layers.{layer}.{name}.bias"))?.map(Weight::plain).transpose()?;
            Ok::<_, Error>(Linear { weight: needed(&format!("{name}.weight"))?, bias, adapter: None })
        };
        Ok(Self {
            input_norm_h: take("input_layernorm.weight")?,
            query: linear("self_attn.q_proj")?,
            key: linear("self_attn.k_proj")?,
            value: linear("self_attn.v_proj")?,
            output: linear("self_attn.o_proj")?,
            post_norm_h: take("post_attention_layernorm.weight")?,
            gate: linear("mlp.gate_proj")?,
            up: linear("mlp.up_proj")?,
            down: linear("mlp.down_proj")?,
        })
    }

    /// `[b, t, h]` to `[b, t, h]`. `attend` takes rotated queries `[b, q, t, d]`, rotated keys and
    /// values `[b, k, t, d]`, and gives `[b, q, t, d]`. `masks` are of its adapters' inputs, in training.
    pub(crate) fn forward(
        &self,
        config: &Config,
        hidden_bth: &Tensor,
        angles: &Angles,
        masks: Option<Masks>,
        attend: impl FnOnce(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        self.forward_seen(config, hidden_bth, angles, masks, attend, |_| Ok(()))
    }

    /// As [`Block::forward`]; `see` is shown what it computes on the way.
    pub(crate) fn forward_seen(
        &self,
        config: &Config,
        hidden_bth: &Tensor,
        angles: &Angles,
        masks: Option<Masks>,
        attend: impl FnOnce(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
        mut see: impl FnMut(Seen) -> Result<()>,
    ) -> Result<Tensor> {
        let normed_bth = norm(hidden_bth, &self.input_norm_h, config.rms_norm_eps)?;
        see(Seen::InputNorm(&normed_bth))?;
        let [query_bqtd, key_bktd, value_bktd] = self.project(config, &normed_bth, angles, masks)?;
        let mixed_bqtd = attend(&query_bqtd, &key_bktd, &value_bktd)?;
        let mixed = mixed_bqtd.f_transpose(1, 2)?.f_flatten(2, 3)?;
        see(Seen::Mixed(&mixed))?;
        let hidden_bth = hidden_bth.f_add(&self.output.forward(&mixed, masks)?)?;

        let normed_bth = norm(&hidden_bth, &self.post_norm_h, config.rms_norm_eps)?;
        see(Seen::PostNorm(&normed_bth))?;
        let inner = self.gated(&normed_bth, masks)?;
        see(Seen::Inner(&inner))?;
        Ok(hidden_bth.f_add(&self.down.forward(&inner, masks)?)?)
    }

    /// Queries `[b, q, t, d]` and keys `[b, k, t, d]`, both rotated, and values `[b, k, t, d]`, of `[b, t, h]`.
    pub(super) fn project(
        &self,
        config: &Config,
        normed_bth: &Tensor,
        angles: &Angles,
        masks: Option<Masks>,
    ) -> Result<[Tensor; 3]> {
        let (rows, tokens, _) = normed_bth.size3()?;
        let split = |of: &Linear, heads: i64| -> Result<Tensor> {
            let projected = of.forward(normed_bth, masks)?;
            Ok(projected.f_view([rows, tokens, heads, config.head_dim])?.f_transpose(1, 2)?)
        };
        let query_bqtd = angles.rotate(&split(&self.query, config.num_attention_heads)?)?;
        let key_bktd = angles.rotate(&split(&self.key, config.num_key_value_heads)?)?;
        Ok([query_bqtd, key_bktd, split(&self.value, config.num_key_value_heads)?])
    }

    /// What attention adds, `[b, t, h]`, of the heads' outputs `[b, t, q * d]`.
    pub(super) fn attended(&self, mixed: &Tensor, masks: Option<Masks>) -> Result<Tensor> {
        self.output.forward(mixed, masks)
    }

    /// What the feed-forward block adds, `[b, t, h]` of the same.
    pub(super) fn fed(&self, normed_bth: &Tensor, masks: Option<Masks>) -> Result<Tensor> {
        self.down.forward(&self.gated(normed_bth, masks)?, masks)
    }

    /// The activations inside the feed-forward block, `[b, t, inner]` of `[b, t, h]` (SwiGLU).
    fn gated(&self, normed_bth: &Tensor, masks: Option<Masks>) -> Result<Tensor> {
        let gate = self.gate.forward(normed_bth, masks)?.f_silu()?;
        Ok(gate.f_mul(&self.up.forward(normed_bth, masks)?)?)
    }

    pub(super) fn projection(&self, target: LoraTarget) -> &Linear {
        match target {
            LoraTarget::QProj => &self.query,
            LoraTarget::KProj => &self.key,
            LoraTarget::VProj => &self.value,
            LoraTarget::OProj => &self.output,
            LoraTarget::GateProj => &self.gate,
            LoraTarget::UpProj => &self.up,
            LoraTarget::DownProj => &self.down,
        }
    }

    pub(super) fn projection_mut(&mut self, target: LoraTarget) -> &mut Linear {
        match target {
            LoraTarget::QProj => &mut self.query,
            LoraTarget::KProj => &mut self.key,
            LoraTarget::VProj => &mut self.value,
            LoraTarget::OProj => &mut self.output,
            LoraTarget::GateProj => &mut self.gate,
            LoraTarget::UpProj => &mut self.up,
            LoraTarget::DownProj => &mut self.down,
        }
    }
}

/// The weight of a projection, as it is kept.
#[derive(Debug)]
pub(crate) enum Weight {
    Plain(Tensor),
    /// Narrow numbers, int8, e4m3 or bf16; row `i` stands for `bytes[i] * scale[i]`.
    Scaled {
        bytes_oi: Tensor,
        scale_o1: Tensor,
    },
}

impl Weight {
    /// The numbers that are kept, `[o, i]`.
    pub(super) fn stored(&self) -> &Tensor {
        match self {
            Self::Plain(tensor) => tensor,
            Self::Scaled { bytes_oi, .. } => bytes_oi,
        }
    }

    /// The same weight, sharing its memory.
    pub(super) fn shallow_clone(&self) -> Self {
        match self {
            Self::Plain(tensor) => Self::Plain(tensor.shallow_clone()),
            Self::Scaled { bytes_oi, scale_o1 } => {
                Self::Scaled { bytes_oi: bytes_oi.shallow_clone(), scale_o1: scale_o1.shallow_clone() }
            }
        }
    }

    pub(crate) fn plain(self) -> Result<Tensor> {
        match self {
            Self::Plain(tensor) => Ok(tensor),
            scaled => scaled.widened(Kind::Float),
        }
    }

    pub(crate) fn widened(&self, kind: Kind) -> Result<Tensor> {
        match self {
            Self::Plain(tensor) => Ok(tensor.f_to_kind(kind)?),
            // The scale is f32: its product with a byte is rounded once.
            Self::Scaled { bytes_oi, scale_o1 } => {
                Ok(bytes_oi.f_to_kind(Kind::Float)?.f_mul(scale_o1)?.f_to_kind(kind)?)
            }
        }
    }

    /// As little as `keep` says of a wide weight; a scale a row.
    pub(crate) fn keep(self, keep: Keep) -> Result<Self> {
        let Self::Plain(wide_oi) = &self else { return Ok(self) };
        let Some((most, kind)) = keep.narrow() else {
            if keep == Keep::Stored || wide_oi.kind() != Kind::Float {
                return Ok(self);
            }
            let scale_o1 = Tensor::f_ones([wide_oi.size2()?.0, 1], (Kind::Float, wide_oi.device()))?;
            return Ok(Self::Scaled { bytes_oi: wide_oi.f_to_kind(Kind::BFloat16)?, scale_o1 });
        };
        let wide_oi = wide_oi.f_to_kind(Kind::Float)?;
        let largest_o1 = wide_oi.f_abs()?.f_amax([1i64].as_slice(), true)?;
        if !bool::try_from(largest_o1.f_isfinite()?.f_all()?)? {
            return Err(Error::Invalid("a weight that is not finite cannot be kept in bytes".into()));
        }
        let one_o1 = largest_o1.f_ones_like()?;
        let scale_o1 = largest_o1.f_div_scalar(most)?.f_where_self(&largest_o1.f_gt(0.0)?, &one_o1)?;
        let scaled_oi = wide_oi.f_div(&scale_o1)?;
        let scaled_oi = if kind == Kind::Int8 { scaled_oi.f_round()? } else { scaled_oi };
        Ok(Self::Scaled { bytes_oi: scaled_oi.f_to_kind(kind)?, scale_o1 })
    }
}

impl Linear {
    fn forward(&self, input: &Tensor, masks: Option<Masks>) -> Result<Tensor> {
        let output = match &self.weight {
            Weight::Plain(weight) => input.f_linear(weight, self.bias.as_ref())?,
            // Wide for as long as one product takes, or a graph over it lives.
            narrow => input.f_linear(&narrow.widened(input.kind())?, self.bias.as_ref())?,
        };
        match &self.adapter {
            Some(adapter) => Ok(output.f_add(&adapter.forward(input, masks)?)?),
            None => Ok(output),
        }
    }
}

/// RMSNorm over the last axis (Zhang and Sennrich, 2019), in f32 whatever the model's kind.
pub(crate) fn norm(hidden: &Tensor, weight_h: &Tensor, epsilon: f64) -> Result<Tensor> {
    let wide = hidden.f_to_kind(Kind::Float)?;
    let mean_square = wide.f_square()?.f_mean_dim(-1, true, Kind::Float)?;
    let scaled = wide.f_mul(&mean_square.f_add_scalar(epsilon)?.f_rsqrt()?)?;
    Ok(scaled.f_to_kind(hidden.kind())?.f_mul(weight_h)?)
}
