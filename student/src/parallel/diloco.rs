//! DiLoCo: workers train by themselves for many steps, and then exchange how far their weights came, through
//! the object store (Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models",
//! 2023, arXiv 2311.08105).
//!
//! A *round*: the lead publishes the weights and who trains which batches; each worker takes its inner steps
//! with its own AdamW; replicas publish the difference; the lead takes an outer Nesterov step along the mean
//! of those that came in time. Batches of a worker that did not deliver go out again. Whoever says hello
//! takes part from the next round on, whoever misses one is given half as much, and nothing until it
//! is heard of again.

mod crew;
mod exchange;
mod inner;
mod lead;
mod ledger;
pub(crate) mod outer;
mod replica;

pub(crate) use lead::lead;
pub(crate) use replica::replica;

#[cfg(test)]
mod tests;
