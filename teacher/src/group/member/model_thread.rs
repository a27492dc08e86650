//! The thread of a member that owns its layers.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use retort_core::{Code, Error, Result, wire::error_to_proto};
use retort_llama::Part;
use retort_proto::{self as proto, join_response};
use tokio::sync::mpsc;

use super::super::{
    computer::{Computer, Opened},
    frames::Work,
    place::Place,
    stats::{Meter, Spent},
    wire::wrong,
};
use crate::stage::step::Output;

/// What the model thread is given to do.
pub(super) enum Task {
    Open(PathBuf),
    Load(PathBuf, Part),
    Work(Work),
}

/// The thread that owns the stage's layers.
pub(super) struct ModelThread {
    pub(super) place: Place,
    pub(super) meter: Meter,
    pub(super) row_bytes: Arc<AtomicU64>,
    pub(super) outgoing: mpsc::Sender<Work>,
    pub(super) answers: mpsc::Sender<Result<proto::JoinResponse, tonic::Status>>,
    /// Why the present run is not computed any further.
    pub(super) failed: Option<(Code, String)>,
}

impl ModelThread {
    /// Until there is nobody to work for.
    pub(super) fn run(&mut self, computer: &mut dyn Computer, mut inbox: mpsc::Receiver<Task>) -> Result<()> {
        let mut opened = Opened::default();
        while let Some(task) = self.meter.spend(Spent::WaitingForInput, || inbox.blocking_recv()) {
            match task {
                Task::Open(model) => {
                    let answer = computer.open(&model).map(|now| {
                        opened = now;
                        join_response::What::Opened(opened.to_proto(self.place.layers.as_ref()))
                    });
                    self.answer(answer);
                }
                Task::Load(model, part) => {
                    self.row_bytes.store(0, Ordering::Release);
                    let started = Instant::now();
                    let loaded = computer.load(&model, &part);
                    if let Ok(loaded) = &loaded {
                        self.meter.loaded(&part.layers, loaded.bytes_read);
                        self.row_bytes.store(opened.row_bytes, Ordering::Release);
                    }
                    let seconds = started.elapsed().as_secs_f64();
                    self.answer(loaded.map(|loaded| join_response::What::Loaded(loaded.to_proto(seconds))));
                }
                Task::Work(work) => {
                    let done = self.compute(computer, work)?;
                    let Some(done) = done else { continue };
                    let sent = self.meter.spend(Spent::WaitingForOutput, || self.outgoing.blocking_send(done).is_ok());
                    if !sent {
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }

    /// What goes on to the next stage, if anything does.
    fn compute(&mut self, computer: &mut dyn Computer, work: Work) -> Result<Option<Work>> {
        let last = self.place.stage + 1 == self.place.stages();
        match work {
            Work::Begin { run, begin } => {
                let begun = self.meter.spend(Spent::Busy, || computer.begin(&begin));
                self.failed = begun.err().map(|error| (error.code, error.chain()));
                Ok((!last).then_some(Work::Begin { run, begin }))
            }
            Work::Step { run, index, step, activations } => {
                let stage = self.place.stage as u32;
                if let Some((code, message)) = &self.failed {
                    return Ok(Some(Work::Failed { run, index, stage, error: Error::new(*code, message.clone()) }));
                }
                let tokens = step.token_ids.len();
                match self.meter.spend(Spent::Busy, || computer.run(&step, Some(activations))) {
                    Ok(Output::Activations(activations)) if !last => {
                        self.meter.step(tokens, activations.bytes.len());
                        Ok(Some(Work::Step { run, index, step, activations }))
                    }
                    Ok(Output::Taken(taken)) if last => {
                        self.meter.step(tokens, 0);
                        Ok(Some(Work::Taken { run, index, taken }))
                    }
                    Ok(_) => Err(Error::internal("a stage computed what another one should")),
                    Err(error) => {
                        self.failed = Some((error.code, error.chain()));
                        Ok(Some(Work::Failed { run, index, stage, error }))
                    }
                }
            }
            failed @ Work::Failed { .. } => Ok(Some(failed)),
            Work::Taken { .. } => Err(wrong("targets came to a stage that is not the first")),
        }
    }

    fn answer(&self, answer: Result<join_response::What>) {
        let what = answer.unwrap_or_else(|error| join_response::What::Refused(error_to_proto(&error)));
        // Stage 0 may have gone meanwhile; then the group is ending.
        let _ = self.answers.blocking_send(Ok(proto::JoinResponse { what: Some(what) }));
    }
}
