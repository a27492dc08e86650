//! Soft-target shards through the public interface: what goes in comes out, what is broken is
//! refused, and no number in a file decides how much memory is taken.

mod golden;
mod hostile;
mod round_trip;
mod sample;
mod size;
