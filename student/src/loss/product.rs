//! The head's three matrix products. In f32 on a CPU they are `gemm`'s, whose kernels follow the processor; else
//! libtorch's (docs/decisions/018).

use retort_kernels::{Strided, multiply};
use retort_llama::numbers;
use tch::{Device, Kind, TchError, Tensor};

/// `logits_nv = hidden_nh weight_vh^T`, all of one kind.
pub(super) fn logits(hidden_nh: &Tensor, weight_vh: &Tensor, logits_nv: &Tensor) -> Result<(), TchError> {
    match [matrix(logits_nv), matrix(hidden_nh), matrix(weight_vh)] {
        // This way round, both here and below: a third to a half faster at these shapes.
        [Some(logits), Some(hidden), Some(weight)] => {
            product(logits.transposed(), 0.0, 1.0, weight, hidden.transposed());
        }
        _ => {
            let _ = hidden_nh.f_matmul_out(logits_nv, &weight_vh.f_tr()?)?;
        }
    }
    Ok(())
}

/// `into_nh = scale * grad_nv weight_vh`, all of one kind.
pub(super) fn hidden_gradient(
    grad_nv: &Tensor,
    weight_vh: &Tensor,
    scale: f64,
    into_nh: &mut Tensor,
) -> Result<(), TchError> {
    match [matrix(into_nh), matrix(grad_nv), matrix(weight_vh)] {
        [Some(into), Some(grad), Some(weight)] => {
            product(into.transposed(), 0.0, scale as f32, weight.transposed(), grad.transposed());
        }
        _ => into_nh.f_copy_(&grad_nv.f_matmul(weight_vh)?.f_to_kind(Kind::Float)?.f_mul_scalar(scale)?)?,
    }
    Ok(())
}

/// What a product in another kind than f32 may take until it is added to its sum, bytes: as much as stays near.
const PIECE_BYTES: i64 = 4 << 20;

/// `into_vh += scale * grad_nv^T hidden_nh`; `into_vh` is f32, the others have one kind. What is computed in another
/// kind is computed some rows of the vocabulary at a time: whole it would be a second array of that size.
pub(super) fn add_head_gradient(
    grad_nv: &Tensor,
    hidden_nh: &Tensor,
    scale: f64,
    into_vh: &mut Tensor,
) -> Result<(), TchError> {
    if let [Some(into), Some(grad), Some(hidden)] = [matrix(into_vh), matrix(grad_nv), matrix(hidden_nh)] {
        product(into, 1.0, scale as f32, grad.transposed(), hidden);
        return Ok(());
    }
    let (kind, grad_vn) = (hidden_nh.kind(), grad_nv.f_tr()?);
    let scaled_nh = hidden_nh.f_to_kind(Kind::Float)?.f_mul_scalar(scale)?.f_to_kind(kind)?;
    if kind == Kind::Float {
        let _ = into_vh.f_addmm_(&grad_vn, &scaled_nh)?;
        return Ok(());
    }
    let (vocab, hidden) = into_vh.size2()?;
    let most =
        if into_vh.device() == Device::Cpu { (PIECE_BYTES / (2 * hidden.max(1))).max(256) } else { vocab.max(1) };
    for start in (0..vocab).step_by(most as usize) {
        let rows = most.min(vocab - start);
        let piece = grad_vn.f_narrow(0, start, rows)?.f_matmul(&scaled_nh)?;
        let _ = into_vh.f_narrow(0, start, rows)?.f_add_(&piece)?;
    }
    Ok(())
}

/// That of a contiguous f32 tensor of two dimensions that lies on the CPU.
fn matrix(tensor: &Tensor) -> Option<Strided> {
    let &[rows, columns] = &tensor.size()[..] else { return None };
    Some(Strided::rows(numbers(tensor, Kind::Float)?, rows as usize, columns as usize, columns as usize))
}

/// `out = keep * out + scale * left right`. `out` shares no memory with the others.
fn product(out: Strided, keep: f32, scale: f32, left: Strided, right: Strided) {
    let threads = tch::get_num_threads().max(1) as usize;
    // SAFETY: the three lie in the memory of tensors that the callers hold, with these shapes and strides.
    unsafe { multiply(out, keep, scale, left, right, threads) };
}

#[cfg(test)]
mod tests {
    use retort_llama::normal;

    use super::*;

    /// The same numbers on the CPU in f64: what no path of ours takes.
    fn wide(tensor: &Tensor) -> Tensor {
        tensor.to_kind(Kind::Double)
    }

    #[test]
    fn all_three_are_libtorchs_in_double_precision() {
        for (n, v, h) in [(1, 1, 1), (3, 37, 8), (65, 1031, 24), (130, 515, 33)] {
            for kind in [Kind::Float, Kind::BFloat16] {
                let random = |shape, stream| normal(shape, 1.0, (0, stream)).unwrap().to_kind(kind);
                let (hidden_nh, weight_vh, grad_nv) = (random(&[n, h], 0), random(&[v, h], 1), random(&[n, v], 2));
                let far = |found: &Tensor, exact: Tensor| {
                    let exact_scale = exact.abs().max().double_value(&[]).max(1.0);
                    (wide(found) - exact).abs().max().double_value(&[]) / exact_scale
                };
                let rounding = if kind == Kind::Float { 1e-6 * (v.max(n) as f64).sqrt() } else { 1e-2 };

                let logits_nv = grad_nv.empty_like();
                logits(&hidden_nh, &weight_vh, &logits_nv).unwrap();
                assert!(far(&logits_nv, wide(&hidden_nh).matmul(&wide(&weight_vh).tr())) < rounding);

                let mut into_nh = hidden_nh.full_like(f64::NAN);
                hidden_gradient(&grad_nv, &weight_vh, 0.3, &mut into_nh).unwrap();
                assert!(far(&into_nh, wide(&grad_nv).matmul(&wide(&weight_vh)) * 0.3) < rounding);

                let mut into_vh = Tensor::ones([v, h], (Kind::Float, Device::Cpu));
                add_head_gradient(&grad_nv, &hidden_nh, 0.3, &mut into_vh).unwrap();
                assert!(far(&into_vh, wide(&grad_nv).tr().matmul(&wide(&hidden_nh)) * 0.3 + 1.0) < rounding);
            }
        }
    }
}
