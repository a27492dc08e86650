//! Soft-target shards through the public interface: what goes in comes out, what is broken is
//! refused, and no number in a file decides how much memory is taken.

#![allow(clippy::unwrap_used)] // helpers of tests unwrap as tests do

mod corpus;
mod export;
mod golden;
mod hostile;
mod round_trip;
mod sample;
mod size;
