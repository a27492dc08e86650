//! Attention of packed documents and its gradient on a CPU, by our own kernel: libtorch's multiplies bf16 as f32 on
//! processors that are not Intel's, and prepares each small product anew (docs/decisions/020).

use half::bf16;
use retort_kernels::{Documents, Projected};
use tch::{Kind, Tensor};

use crate::{
    Result,
    memory::{Number, read, threads, write},
};

/// What a document's positions look at, and how far back.
#[derive(Clone, Copy)]
pub(crate) struct Extent<'a> {
    /// Of each document, positions.
    pub(crate) lengths: &'a [usize],
    pub(crate) window: Option<usize>,
}

/// Rotated queries `[n, q, d]` and keys `[n, k, d]`, and values `[n, k, d]`, of a kind that
/// [`crate::memory::is_host`], position after position.
pub(crate) struct Heads {
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
}

impl Heads {
    /// Of `[1, heads, n, d]` each.
    pub(crate) fn of([query_1qnd, key_1knd, value_1knd]: [&Tensor; 3]) -> Result<Self> {
        let positions = |heads_1hnd: &Tensor| -> Result<Tensor> {
            Ok(heads_1hnd.f_detach()?.f_squeeze_dim(0)?.f_transpose(0, 1)?.f_contiguous()?)
        };
        Ok(Self { queries: positions(query_1qnd)?, keys: positions(key_1knd)?, values: positions(value_1knd)? })
    }

    /// The heads' outputs one after another, `[1, n, q * d]`.
    pub(crate) fn attend(&self, extent: Extent) -> Result<Tensor> {
        let mut mixed = self.queries.f_empty_like()?;
        match self.queries.kind() {
            Kind::BFloat16 => self.attend_in::<bf16>(extent, &mut mixed)?,
            _ => self.attend_in::<f32>(extent, &mut mixed)?,
        }
        Ok(mixed.f_flatten(1, 2)?.f_unsqueeze(0)?)
    }

    /// Gradients in what [`Heads::of`] was given, in that shape, of a loss whose gradient in what [`Heads::attend`]
    /// gives is `grad_mixed`, `[1, n, q * d]`.
    pub(crate) fn gradients(&self, extent: Extent, grad_mixed: &Tensor) -> Result<[Tensor; 3]> {
        let mut grads = [self.queries.f_empty_like()?, self.keys.f_empty_like()?, self.values.f_empty_like()?];
        let grad_mixed = grad_mixed.f_contiguous()?;
        match self.queries.kind() {
            Kind::BFloat16 => self.gradients_in::<bf16>(extent, &grad_mixed, &mut grads)?,
            _ => self.gradients_in::<f32>(extent, &grad_mixed, &mut grads)?,
        }
        let [queries, keys, values] = grads;
        let back = |grad: Tensor| -> Result<Tensor> { Ok(grad.f_transpose(0, 1)?.f_unsqueeze(0)?) };
        Ok([back(queries)?, back(keys)?, back(values)?])
    }

    fn attend_in<T: Number>(&self, extent: Extent, mixed: &mut Tensor) -> Result<()> {
        // SAFETY: it was made for this, and nobody else has it.
        let mixed = unsafe { write(mixed)? };
        self.documents(extent)?.attend(&self.projected::<T>()?, mixed, threads());
        Ok(())
    }

    fn gradients_in<T: Number>(&self, extent: Extent, grad_mixed: &Tensor, grads: &mut [Tensor; 3]) -> Result<()> {
        let [queries, keys, values] = grads;
        // SAFETY: the three were made for this, and nobody else has them.
        let into = unsafe { Projected { queries: write(queries)?, keys: write(keys)?, values: write(values)? } };
        self.documents(extent)?.gradients(&self.projected::<T>()?, read(grad_mixed)?, into, threads());
        Ok(())
    }

    fn documents<'a>(&self, extent: Extent<'a>) -> Result<Documents<'a>> {
        let ((_, query_heads, head_dim), (_, key_heads, _)) = (self.queries.size3()?, self.keys.size3()?);
        let [query_heads, key_heads, head_dim] = [query_heads, key_heads, head_dim].map(|count| count as usize);
        Ok(Documents { lengths: extent.lengths, query_heads, key_heads, head_dim, window: extent.window })
    }

    fn projected<T: Number>(&self) -> Result<Projected<&[T]>> {
        Ok(Projected { queries: read(&self.queries)?, keys: read(&self.keys)?, values: read(&self.values)? })
    }
}
