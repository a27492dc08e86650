//! A contiguous range of a model's layers.
pub mod pipeline;
pub mod step;
