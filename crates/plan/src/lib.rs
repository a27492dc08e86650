//! What a teacher needs and how fast it will be, worked out before anyone pays for a GPU; what a student's [`training`]
//! takes; and, in [`forecast`], what a student would gain from more tokens.
//!
//! [`plan`] is a pure function of a model's config, a cluster and the work. It counts bytes exactly
//! (weights, KV cache) or from above (activations), and time from three rates of the hardware:
//! products, memory, links. Scoring and generating are worked out apart, for they are bound by
//! different ones: a scored micro-batch has thousands of tokens for each weight it reads, a
//! generated one as many as it has sequences. `docs/planning.md` has the equations and says where
//! the rates come from; which figures were measured is said there too.
//!
//! Nothing here reads a file or a clock, and nothing links libtorch.

mod estimate;
pub mod forecast;
mod gpu;
mod input;
mod layout;
mod memory;
mod models;
mod outcome;
mod planner;
mod speed;
pub mod training;
mod ways_out;
mod weights;

pub use gpu::Gpu;
pub use input::{Assumptions, Cluster, Mode, Work};
pub use layout::{Engine, Layout};
pub use models::Model;
pub use outcome::{Bound, Estimate, Hop, Job, Plan, Route, Section, Smallest, Speed, Stage, Teacher};
pub use planner::plan;
pub use weights::{Format, Weights};
