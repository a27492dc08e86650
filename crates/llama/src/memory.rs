//! Where the numbers of tensors lie.

use half::bf16;
use retort_kernels::Stored;
use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

/// Where the numbers of a contiguous tensor lie that is on the CPU and of this kind, which is `T`'s, row after row.
pub fn numbers<T>(tensor: &Tensor, kind: Kind) -> Option<*mut T> {
    let plain = tensor.device() == Device::Cpu && tensor.kind() == kind && tensor.is_contiguous();
    plain.then(|| tensor.data_ptr().cast())
}

/// A kind that the kernels compute with.
pub(crate) trait Number: Stored {
    const KIND: Kind;
}

impl Number for f32 {
    const KIND: Kind = Kind::Float;
}

impl Number for bf16 {
    const KIND: Kind = Kind::BFloat16;
}

/// Whether the kernels compute with tensors like this one.
pub(crate) fn is_host(tensor: &Tensor) -> bool {
    tensor.device() == Device::Cpu && matches!(tensor.kind(), Kind::Float | Kind::BFloat16)
}

/// The numbers of a contiguous tensor of at least one.
///
/// # Errors
/// [`Error::Invalid`] where the tensor is empty, elsewhere or of another kind.
pub(crate) fn read<T: Number>(tensor: &Tensor) -> Result<&[T]> {
    let at = place(tensor)?;
    // SAFETY: so many numbers of the kind lie at the tensor's address, and it is borrowed as long as they are.
    Ok(unsafe { std::slice::from_raw_parts(at, tensor.numel()) })
}

/// As [`read`], to be written.
///
/// # Safety
/// No other tensor that shares the memory may be used as long as the slice is.
pub(crate) unsafe fn write<T: Number>(tensor: &mut Tensor) -> Result<&mut [T]> {
    let at = place(tensor)?;
    // SAFETY: as above, and nobody else's as the caller promises.
    Ok(unsafe { std::slice::from_raw_parts_mut(at, tensor.numel()) })
}

fn place<T: Number>(tensor: &Tensor) -> Result<*mut T> {
    let at = numbers::<T>(tensor, T::KIND).filter(|_| tensor.numel() > 0);
    at.ok_or_else(|| {
        Error::Invalid(format!(
            "a tensor of shape {:?} and kind {:?} on {:?}; the kernels take numbers in {:?}, row after row, on the CPU",
            tensor.size(),
            tensor.kind(),
            tensor.device(),
            T::KIND
        ))
    })
}

/// Threads that the kernels take: as many as libtorch's own operators.
pub(crate) fn threads() -> usize {
    tch::get_num_threads().max(1) as usize
}
