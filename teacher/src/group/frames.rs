//! What goes along a link: work cut into messages of at most a mebibyte or so, and put together again.
//!
//! Activations are large and heartbeats must not wait behind them, so they travel in chunks; every
//! chunk counts as a sign of life.

use retort_core::{
    Error, Result,
    wire::{error_from_proto, error_to_proto},
};
use retort_llama::Room;
use retort_proto::{self as proto, pass_request::What};

use super::wire::{
    MAX_STEP_TOKENS, begin_from_proto, begin_to_proto, step_from_proto, step_to_proto, taken_from_proto,
    taken_to_proto, wrong,
};
use crate::stage::step::{Activations, Begin, Step, Taken};

/// Bytes of activations in one message.
const CHUNK: usize = 1 << 20;
/// Numbers of targets in one message, unless one target alone has more.
const TAKEN_NUMBERS: usize = 1 << 17;
/// Most bytes of a message: a target of a whole vocabulary of half a million fits.
pub(super) const MAX_MESSAGE: usize = 8 << 20;

/// One piece of work on its way from a stage to the next.
#[derive(Debug)]
pub(super) enum Work {
    Begin { run: u64, begin: Begin },
    Step { run: u64, index: u64, step: Step, activations: Activations },
    Taken { run: u64, index: u64, taken: Vec<Taken> },
    Failed { run: u64, index: u64, stage: u32, error: Error },
}

impl Work {
    /// The messages that carry it, in order.
    pub(super) fn into_messages(self) -> Box<dyn Iterator<Item = What> + Send> {
        match self {
            Self::Begin { run, begin } => Box::new(std::iter::once(What::Begin(begin_to_proto(run, &begin)))),
            Self::Step { run, index, step, activations } => {
                let bytes = tokio_util::bytes::Bytes::from(activations.bytes);
                let head = What::Step(step_to_proto(run, index, &step, bytes.len()));
                let chunks = (0..bytes.len()).step_by(CHUNK).map(move |at| {
                    let end = (at + CHUNK).min(bytes.len());
                    What::Chunk(bytes.slice(at..end))
                });
                Box::new(std::iter::once(head).chain(chunks))
            }
            Self::Taken { run, index, taken } => Box::new(taken_messages(run, index, taken)),
            Self::Failed { run, index, stage, error } => {
                let error = Some(error_to_proto(&error));
                Box::new(std::iter::once(What::Failed(proto::StepFailed { run, step: index, stage, error })))
            }
        }
    }
}

fn taken_messages(run: u64, index: u64, taken: Vec<Taken>) -> impl Iterator<Item = What> + Send {
    let mut rest = taken.into_iter().peekable();
    let mut done = false;
    std::iter::from_fn(move || {
        if done {
            return None;
        }
        let mut positions = Vec::new();
        let mut numbers = 0;
        while let Some(next) = rest.peek() {
            let size = 8 + 2 * next.position.head.len() + 3 * next.position.tail.len();
            if !positions.is_empty() && numbers + size > TAKEN_NUMBERS {
                break;
            }
            numbers += size;
            positions.extend(rest.next().map(taken_to_proto));
        }
        let more = rest.peek().is_some();
        done = !more;
        Some(What::Taken(proto::StepTaken { run, step: index, positions, more }))
    })
}

/// Puts a link's messages together again.
#[derive(Debug, Default)]
pub(super) struct Assembly {
    /// The run that steps belong to.
    run: Option<(u64, Room)>,
    step: Option<(u64, u64, Step, u64, Vec<u8>)>,
    taken: Option<(u64, u64, Vec<Taken>)>,
}

impl Assembly {
    /// Takes the next message; `Some` once a piece of work is whole. `row_bytes` is what one token's
    /// activations take, in the layers that are loaded now.
    pub(super) fn take(&mut self, what: What, row_bytes: u64) -> Result<Option<Work>> {
        match (&mut self.step, &mut self.taken, what) {
            (_, _, What::Beat(_)) => Ok(None),
            (step @ Some(_), _, What::Chunk(bytes)) => {
                let Some((_, _, _, expected, have)) = step.as_mut() else { return Ok(None) };
                if bytes.is_empty() || have.len() as u64 + bytes.len() as u64 > *expected {
                    return Err(wrong(&format!("a step's activations are not the {expected} bytes that it announced")));
                }
                have.extend_from_slice(&bytes);
                if (have.len() as u64) < *expected {
                    return Ok(None);
                }
                let whole = step.take();
                Ok(whole.map(|(run, index, step, _, bytes)| {
                    let activations = Activations { tokens: step.token_ids.len() as u32, bytes };
                    Work::Step { run, index, step, activations }
                }))
            }
            (Some(_), _, _) => Err(wrong("a step's activations are interrupted by another message")),
            (None, None, What::Begin(begin)) => {
                let (run, begin) = begin_from_proto(begin)?;
                self.run = Some((run, begin.room));
                Ok(Some(Work::Begin { run, begin }))
            }
            (None, None, What::Step(step)) => self.announce(step, row_bytes),
            (None, taken, What::Taken(more)) => {
                let (run, index, have) = taken.get_or_insert_with(|| (more.run, more.step, Vec::new()));
                if (*run, *index) != (more.run, more.step) {
                    return Err(wrong("a step's targets are interrupted by another's"));
                }
                if have.len() + more.positions.len() > MAX_STEP_TOKENS {
                    return Err(wrong(&format!("a step has more than {MAX_STEP_TOKENS} targets")));
                }
                for position in more.positions {
                    have.push(taken_from_proto(position)?);
                }
                if more.more {
                    return Ok(None);
                }
                Ok(taken.take().map(|(run, index, taken)| Work::Taken { run, index, taken }))
            }
            (None, None, What::Failed(failed)) => {
                let error = failed.error.ok_or_else(|| wrong("a step failed without an error"))?;
                let error = error_from_proto(error);
                Ok(Some(Work::Failed { run: failed.run, index: failed.step, stage: failed.stage, error }))
            }
            (None, None, What::Chunk(_)) => Err(wrong("activations arrive that no step announced")),
            (None, Some(_), _) => Err(wrong("a step's targets are interrupted by another message")),
            (None, None, What::Link(_)) => Err(wrong("a link says twice who it is")),
        }
    }

    fn announce(&mut self, step: proto::StageStep, row_bytes: u64) -> Result<Option<Work>> {
        let Some((run, room)) = self.run.filter(|(run, _)| *run == step.run) else {
            return Err(wrong(&format!("a step of run {}, which has not begun", step.run)));
        };
        let (index, bytes) = (step.step, step.activation_bytes);
        let step = step_from_proto(step, &room)?;
        let expected = row_bytes.saturating_mul(step.token_ids.len() as u64);
        if bytes != expected || expected == 0 {
            return Err(wrong(&format!(
                "a step of {} tokens announces {bytes} bytes of activations, and {expected} are expected",
                step.token_ids.len()
            )));
        }
        self.step = Some((run, index, step, bytes, Vec::new()));
        Ok(None)
    }
}
