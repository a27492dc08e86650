//! The way of a step through all layers of a teacher: one stage in this process, or many on machines
//! of their own. Who schedules steps need not know which.

use std::{cell::RefCell, collections::VecDeque, rc::Rc};

use retort_core::{Error, Result};

use super::{
    Stage,
    step::{Begin, Output, Step, Taken},
};

/// A teacher from embedding to head, fed step by step. Steps come back in the order they went in.
pub trait Pipeline {
    fn begin(&mut self, begin: &Begin) -> Result<()>;

    /// How many steps should be on their way at once, so that no stage waits; at least one.
    fn depth(&self) -> usize;

    /// Starts a step. With [`Pipeline::depth`] steps on their way it may wait for room.
    fn submit(&mut self, step: Step) -> Result<()>;

    /// What the oldest step gave.
    fn next(&mut self) -> Result<Vec<Taken>>;
}

/// One that several hold: the engines of one model after another.
impl<P: Pipeline> Pipeline for Rc<RefCell<P>> {
    fn begin(&mut self, begin: &Begin) -> Result<()> {
        self.borrow_mut().begin(begin)
    }

    fn depth(&self) -> usize {
        self.borrow().depth()
    }

    fn submit(&mut self, step: Step) -> Result<()> {
        self.borrow_mut().submit(step)
    }

    fn next(&mut self) -> Result<Vec<Taken>> {
        self.borrow_mut().next()
    }
}

/// All layers in this process, on the thread that calls.
pub struct Local {
    stage: Stage,
    done: VecDeque<Vec<Taken>>,
}

impl Local {
    pub fn new(stage: Stage) -> Self {
        Self { stage, done: VecDeque::new() }
    }

    pub fn stage(&self) -> &Stage {
        &self.stage
    }
}

impl Pipeline for Local {
    fn begin(&mut self, begin: &Begin) -> Result<()> {
        self.done.clear();
        self.stage.begin(begin)
    }

    fn depth(&self) -> usize {
        1
    }

    fn submit(&mut self, step: Step) -> Result<()> {
        match self.stage.run(&step, None)? {
            Output::Taken(taken) => self.done.push_back(taken),
            Output::Activations(_) => return Err(Error::internal("the only stage of a teacher has no head")),
        }
        Ok(())
    }

    fn next(&mut self) -> Result<Vec<Taken>> {
        self.done.pop_front().ok_or_else(|| Error::internal("no step is on its way"))
    }
}
