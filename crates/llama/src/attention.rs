//! Scaled dot-product attention with grouped queries: here on libtorch's fused kernel, in [`host`] on ours.

use tch::{Device, Kind, Tensor};

use crate::Result;

pub(crate) mod host;

/// Which positions a query may look at.
pub(crate) enum Mask<'a> {
    /// Itself and all before; queries and keys are the same positions.
    Causal,
    /// Every key there is.
    All,
    /// Zero where it may, minus infinity where not: broadcasts to `[b, heads, t, s]`.
    Bias(&'a Tensor),
}

/// Attention of many positions at once: `query_bqtd` over `key_bksd` and `value_bksd`, giving
/// `[b, q, t, d]`. The number of query heads is a multiple of that of key heads.
pub(crate) fn attend(query_bqtd: &Tensor, key_bksd: &Tensor, value_bksd: &Tensor, mask: &Mask) -> Result<Tensor> {
    let (query_heads, key_heads) = (query_bqtd.size4()?.1, key_bksd.size4()?.1);
    let (bias, causal) = match mask {
        Mask::Causal => (None, true),
        Mask::All => (None, false),
        Mask::Bias(bias) => (Some(*bias), false),
    };
    let grouped = query_heads != key_heads;
    Ok(Tensor::f_scaled_dot_product_attention(query_bqtd, key_bksd, value_bksd, bias, 0.0, causal, None, grouped)?)
}

/// Attention of one position a row. The query heads that share a key head stand where positions
/// would, so that keys and values are read once a group and never repeated.
///
/// `query_bq1d` over `key_bksd`; a bias is `[b, 1, 1, s]`. Gives `[b, q, 1, d]`.
pub(crate) fn attend_one(query_bq1d: &Tensor, key_bksd: &Tensor, value_bksd: &Tensor, mask: &Mask) -> Result<Tensor> {
    let (rows, query_heads, _, size) = query_bq1d.size4()?;
    let key_heads = key_bksd.size4()?.1;
    let bias = match mask {
        Mask::Bias(bias) => Some(*bias),
        Mask::Causal | Mask::All => None,
    };
    let query_bkgd = query_bq1d.f_reshape([rows, key_heads, query_heads / key_heads, size])?;
    let mixed_bkgd =
        Tensor::f_scaled_dot_product_attention(&query_bkgd, key_bksd, value_bksd, bias, 0.0, false, None, false)?;
    Ok(mixed_bkgd.f_reshape([rows, query_heads, 1, size])?)
}

/// The bias that lets queries at `position_bt` (int64 `[b, t]`, or `[1, t]`) see keys at positions
/// `0..keys` up to their own, no further back than `window - 1`: `[b, 1, t, s]`.
pub(crate) fn bias(
    position_bt: &Tensor,
    keys: i64,
    window: Option<i64>,
    (kind, device): (Kind, Device),
) -> Result<Tensor> {
    let key_s = Tensor::f_arange(keys, (Kind::Int64, device))?;
    let position_bt1 = position_bt.f_unsqueeze(-1)?;
    let mut hidden_bts = key_s.f_gt_tensor(&position_bt1)?;
    if let Some(window) = window {
        let too_far_bts = key_s.f_le_tensor(&position_bt1.f_sub_scalar(window)?)?;
        hidden_bts = hidden_bts.f_logical_or(&too_far_bts)?;
    }
    let bias_bts = Tensor::f_zeros(hidden_bts.size(), (kind, device))?.f_masked_fill(&hidden_bts, f64::NEG_INFINITY)?;
    Ok(bias_bts.f_unsqueeze(1)?)
}
