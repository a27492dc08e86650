//! Synchronous data parallelism: the workers of one training compute one optimiser step together, and the
//! weights after it are one worker's but for rounding.
//!
//! The worker of the train task leads. It alone has the moments, the guard, the checkpoints and the events,
//! and it can do without anyone. It listens, and says where in the store ([`rendezvous`]); a replica finds
//! that, dials, shows that it belongs there ([`door`]), loads the model, and from then on keeps one stream
//! ([`member`] at the lead's end, [`follow`] at its own). For each step the lead deals the rows out
//! ([`split`]), sends every replica the weights and its rows, computes its own share meanwhile, adds the
//! gradients in the order of the replicas' numbers ([`exchange`]), and updates.
//!
//! A loss is a mean over the target tokens of the whole step, so each share is divided by their number and
//! gradients add up. A replica that is lost, silent for [`SILENCE`](retort_worker::peer::SILENCE), far too slow, or
//! that answers something else than a gradient of the right size and of a plausible norm, leaves, and the lead
//! computes its rows itself: who takes part changes the speed and nothing else.

mod address;
mod door;
mod exchange;
mod follow;
mod frames;
mod lead;
mod member;
mod rendezvous;
mod split;

pub use address::{PeerArgs, Peers};
pub(crate) use follow::follow;
pub(crate) use lead::Lead;

use retort_core::{Code, Error};

/// Version of the messages between a lead and its replicas.
const PROTOCOL: u32 = 1;

/// The other end can be reached no more.
fn lost(how: &str) -> Error {
    Error::new(Code::GroupBroken, how)
}

/// A message that no worker of this version sends.
fn wrong(what: &str) -> Error {
    Error::new(Code::GroupBroken, format!("{what}; is something else than a worker of this training at the other end?"))
}

#[cfg(test)]
mod tests;
