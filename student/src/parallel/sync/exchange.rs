//! Trained weights and gradients as bytes: f32, little endian, all parameters one after another in the
//! optimiser's order.

use retort_artifact::sha256_hex;
use retort_core::{Error, Result};
use tch::{Device, Kind, TchError, Tensor, no_grad};
use tokio_util::bytes::Bytes;

use super::wrong;
use crate::{failure::torch, optimizer::AdamW, parallel};

const _: () = assert!(cfg!(target_endian = "little"), "tensors are sent as they lie in memory");

/// What weights or gradients take, bytes.
pub(super) fn bytes(optimizer: &AdamW) -> u64 {
    optimizer.trained().map(|(_, master, _)| 4 * master.numel() as u64).sum()
}

/// SHA-256 over name and shape of every trained parameter.
pub(super) fn print(optimizer: &AdamW) -> String {
    let lines = optimizer.trained().map(|(name, master, _)| format!("{name} {:?}\n", master.size()));
    sha256_hex(lines.collect::<String>().as_bytes())
}

pub(super) fn weights(optimizer: &AdamW) -> Result<Bytes> {
    copied(optimizer, optimizer.trained().map(|(_, master, _)| master))
}

pub(super) fn gradient(optimizer: &AdamW) -> Result<Bytes> {
    copied(optimizer, optimizer.trained().map(|(_, _, gradient)| gradient))
}

/// Takes over what [`weights`] gave.
pub(super) fn set_weights(optimizer: &mut AdamW, bytes: &[u8]) -> Result<()> {
    let set = || -> Result<()> {
        for (master, new) in parts(optimizer, bytes)? {
            master.shallow_clone().f_copy_(&new.map_err(failed())?).map_err(failed())?;
        }
        Ok(())
    };
    no_grad(set)?;
    optimizer.refresh()
}

/// Euclidean norm of the gradient collected so far.
pub(super) fn norm(optimizer: &AdamW) -> Result<f64> {
    parallel::norm(optimizer.trained().map(|(_, _, gradient)| gradient)).map_err(failed())
}

/// Adds what [`gradient`] gave elsewhere, where such a part has about the norm `here`; or says why it cannot be a
/// part of the same step, and nothing is added.
pub(super) fn add_gradient(optimizer: &AdamW, bytes: &[u8], here: f64) -> Result<Result<(), String>> {
    let parts = parts(optimizer, bytes)?.map(|(_, part)| part).collect::<Result<Vec<Tensor>, _>>().map_err(failed())?;
    let theirs = parallel::norm(parts.iter()).map_err(failed())?;
    if let Some(why) = parallel::implausible("gradient's norm", theirs, here) {
        return Ok(Err(why));
    }
    let add = || -> Result<(), TchError> {
        for ((_, _, gradient), part) in optimizer.trained().zip(&parts) {
            let _ = gradient.shallow_clone().f_add_(part)?;
        }
        Ok(())
    };
    no_grad(add).map_err(failed()).map(Ok)
}

/// Each master, and its part of `bytes` as a tensor of its shape and device.
fn parts<'a>(
    optimizer: &'a AdamW,
    bytes: &'a [u8],
) -> Result<impl Iterator<Item = (&'a Tensor, Result<Tensor, TchError>)>> {
    if bytes.len() as u64 != self::bytes(optimizer) {
        return Err(wrong(&format!("{} bytes came for {} of parameters", bytes.len(), self::bytes(optimizer))));
    }
    let mut rest = bytes;
    Ok(optimizer.trained().map(move |(_, master, _)| {
        let (head, tail) = rest.split_at(4 * master.numel());
        rest = tail;
        let part = Tensor::f_from_data_size(head, &master.size(), Kind::Float);
        (master, part.and_then(|part| part.f_to(master.device())))
    }))
}

fn copied<'a>(optimizer: &AdamW, tensors: impl Iterator<Item = &'a Tensor>) -> Result<Bytes> {
    let size = usize::try_from(bytes(optimizer)).map_err(|_| Error::internal("more parameters than can be counted"))?;
    let mut bytes = vec![0; size];
    let mut rest = &mut bytes[..];
    for tensor in tensors {
        let (head, tail) = rest.split_at_mut(4 * tensor.numel());
        rest = tail;
        let copy = || tensor.f_detach()?.f_to(Device::Cpu)?.f_contiguous()?.f_copy_data_u8(head, tensor.numel());
        no_grad(copy).map_err(failed())?;
    }
    Ok(bytes.into())
}

fn failed() -> impl FnOnce(TchError) -> Error {
    torch("cannot exchange weights and gradients")
}
