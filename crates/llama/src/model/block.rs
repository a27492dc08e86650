//! One decoder block: attention and feed-forward, each after a norm and around a residual.

use tch::{Kind, Tensor};

use crate::{Config, Error, Result, rope::Angles};

#[derive(Debug)]
pub(crate) struct Block {
    input_norm_h: Tensor,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    post_norm_h: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// `x weight^T + bias`; the weight is `[outputs, inputs]`.
#[derive(Debug)]
struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Block {
    pub(crate) fn assemble(layer: i64, find: &dyn Fn(&str) -> Option<Tensor>) -> Result<Self> {
        let take = |name: &str| {
            let name = format!("model.layers.{layer}.{name}");
            find(&name).ok_or_else(|| Error::Invalid(format!("no tensor {name:?}")))
        };
        let linear = |name: &str| {
            let bias = find(&format!("model.layers.{layer}.{name}.bias"));
            Ok::<_, Error>(Linear { weight: take(&format!("{name}.weight"))?, bias })
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
    /// values `[b, k, t, d]`, and gives `[b, q, t, d]`.
    pub(crate) fn forward(
        &self,
        config: &Config,
        hidden_bth: &Tensor,
        angles: &Angles,
        attend: impl FnOnce(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let (rows, tokens, _) = hidden_bth.size3()?;
        let split = |projected: Tensor, heads: i64| -> Result<Tensor> {
            Ok(projected.f_view([rows, tokens, heads, config.head_dim])?.f_transpose(1, 2)?)
        };
        let normed_bth = norm(hidden_bth, &self.input_norm_h, config.rms_norm_eps)?;
        let query_bqtd = angles.rotate(&split(self.query.forward(&normed_bth)?, config.num_attention_heads)?)?;
        let key_bktd = angles.rotate(&split(self.key.forward(&normed_bth)?, config.num_key_value_heads)?)?;
        let value_bktd = split(self.value.forward(&normed_bth)?, config.num_key_value_heads)?;
        let mixed_bqtd = attend(&query_bqtd, &key_bktd, &value_bktd)?;
        let mixed = mixed_bqtd.f_transpose(1, 2)?.f_reshape([rows, tokens, -1])?;
        let hidden_bth = hidden_bth.f_add(&self.output.forward(&mixed)?)?;

        let normed_bth = norm(&hidden_bth, &self.post_norm_h, config.rms_norm_eps)?;
        let gate = self.gate.forward(&normed_bth)?.f_silu()?;
        let inner = gate.f_mul(&self.up.forward(&normed_bth)?)?;
        Ok(hidden_bth.f_add(&self.down.forward(&inner)?)?)
    }
}

impl Linear {
    fn forward(&self, input: &Tensor) -> Result<Tensor> {
        Ok(input.f_linear(&self.weight, self.bias.as_ref())?)
    }
}

/// RMSNorm over the last axis (Zhang and Sennrich, 2019), in f32 whatever the model's kind.
pub(crate) fn norm(hidden: &Tensor, weight_h: &Tensor, epsilon: f64) -> Result<Tensor> {
    let wide = hidden.f_to_kind(Kind::Float)?;
    let mean_square = wide.f_square()?.f_mean_dim(-1, true, Kind::Float)?;
    let scaled = wide.f_mul(&mean_square.f_add_scalar(epsilon)?.f_rsqrt()?)?;
    Ok(scaled.f_to_kind(hidden.kind())?.f_mul(weight_h)?)
}
