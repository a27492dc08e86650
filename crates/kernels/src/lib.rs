//! A Llama's arithmetic on the CPU, in f32: what PyTorch does between a checkpoint and soft targets,
//! with fewer passes over memory and the same bits in any company.
//!
//! A row's result depends on that row alone: not on the rows beside it, the number of threads, or how a
//! prompt was cut into pieces. So a shard computed again is the same bytes whatever else a worker did,
//! and a group of stages gives what one process gives. Weights are read where they lie, in the format
//! they are stored in. All is safe to call but [`multiply`]; `unsafe` stays in the loops, behind checks of lengths.
//!
//! Training has no need of the same bits in any company: [`Documents`], [`Norm`] and [`multiply`] are for it.

mod attention;
mod gemm;
mod lanes;
mod matrix;
mod norm;
mod product;
mod rows;
mod softmax;

pub use attention::{Asked, Documents, Kept, POSITIONS, Projected, Scratch, Stored};
pub use gemm::{Strided, multiply};
pub use matrix::{Bytes, Matrix, Storage};
pub use norm::Norm;
pub use product::{Into, Panels};
pub use rows::{narrow_bf16, rms_norm, rotate, scale, swiglu, widen_bf16};
pub use softmax::{BLOCK, Logits, exponentiate};
