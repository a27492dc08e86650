//! A Llama's arithmetic on the CPU, in f32: what PyTorch does between a checkpoint and soft targets,
//! with fewer passes over memory and the same bits in any company.
//!
//! A row's result depends on that row alone: not on the rows beside it, the number of threads, or how a
//! prompt was cut into pieces. So a shard computed again is the same bytes whatever else a worker did,
//! and a group of stages gives what one process gives. Weights are read where they lie, in the format
//! they are stored in. All is safe to call; `unsafe` stays in the loops, behind checks of lengths.

mod attention;
mod lanes;
mod matrix;
mod product;
mod rows;
mod softmax;

pub use attention::{Asked, Kept, POSITIONS, Scratch};
pub use matrix::{Bytes, Matrix, Storage};
pub use product::{Into, Panels};
pub use rows::{narrow_bf16, rms_norm, rotate, scale, swiglu, widen_bf16};
pub use softmax::{BLOCK, Logits, exponentiate};
