//! Where steps go and targets come from.
use retort_core::Result;

use super::step::{Begin, Step, Taken};

pub trait Pipeline {
    fn begin(&mut self, begin: &Begin) -> Result<()>;
    fn depth(&self) -> usize;
    fn submit(&mut self, step: Step) -> Result<()>;
    fn next(&mut self) -> Result<Vec<Taken>>;
}
