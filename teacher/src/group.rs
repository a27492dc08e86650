//! A teacher group: one copy of the teacher, its layers spread over N processes.
//!
//! Stage 0 is the worker: it claims shards, embeds, and schedules steps; the last stage has the head and
//! computes targets; keys and values live with the layers that made them. The stages stand in a ring:
//! each passes a step with its activations to the next, the last answers stage 0. Steps never overtake
//! each other, so what a stage's cache holds when a step arrives is what stage 0 had in mind.
//!
//! A group lives once. Stage 0 joins the others under an incarnation number that it makes up, and keeps
//! those streams open; frames of another incarnation are refused. Every stream carries a heartbeat each
//! second both ways, from threads that do not compute, so a busy stage is not a dead one. Whatever
//! breaks (a process dies, hangs, a link is cut) is seen by a neighbour and by stage 0 within
//! [`dial::SILENCE`], the attempt fails with `group-broken`, and **every** stage's process ends, so that
//! whoever started them starts the whole group again. Nothing is mended in place: no stage could know
//! which steps its neighbours' caches have seen.
//!
//! ```text
//!            join (hello, open, load, beats, stats)
//!     ┌──────────────┬──────────────┬───────────────┐
//!  stage 0 ──pass──▶ stage 1 ──pass──▶ stage 2 ──▶ … stage N-1
//!     ▲                                                │
//!     └───────────────── pass (targets) ───────────────┘
//! ```

mod computer;
mod dial;
mod door;
mod formed;
mod frames;
mod health;
mod identity;
mod layers;
mod lead;
mod link;
mod measure;
mod member;
mod place;
mod split;
mod stats;
mod stats_command;
mod wire;

use std::{
    collections::{BTreeMap, VecDeque},
    ops::Range,
    path::{Path, PathBuf},
    sync::PoisonError,
};

use retort_core::{Code, Error, Result};
use retort_llama::Part;
use retort_proto as proto;
use tokio::sync::mpsc;

pub use computer::{Computer, Loaded, Opened};
pub use formed::{Formed, Keeper, Parts, Pulse};
pub use layers::Layers;
pub use member::serve;
pub use place::{GroupArgs, LeaderWorkerSet, Place};
pub use retort_worker::peer::TlsArgs;
pub use stats_command::{StatsArgs, show_stats};
pub(crate) use wire::MAX_CONTEXT;

use frames::Work;
use health::Health;
use identity::{all_tensors, given_layers, same_model};
use lead::{Peer, PeerStats};
use stats::{Meter, Spent, busy_share, since};

use crate::stage::{
    pipeline::Pipeline,
    step::{Begin, Output, Step, Taken},
};

/// The whole group as stage 0 sees it; lives on stage 0's model thread.
pub struct Group {
    place: Place,
    health: Health,
    computer: Box<dyn Computer>,
    peers: Vec<Peer>,
    outgoing: mpsc::Sender<Work>,
    incoming: mpsc::Receiver<Work>,
    model: Option<(PathBuf, Model)>,
    run: u64,
    submitted: u64,
    /// Steps on their way: number, and targets asked for.
    under_way: VecDeque<(u64, usize)>,
    meter: Meter,
    peer_stats: PeerStats,
    reported: Vec<proto::StageStats>,
}

/// What the stages have loaded between them.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    pub opened: Opened,
    /// What each stage holds.
    pub parts: Vec<Part>,
    /// Bytes each stage read.
    pub bytes_read: Vec<u64>,
    /// Every tensor's shape and SHA-256, by name.
    pub tensors: BTreeMap<String, (String, Vec<u8>)>,
}

impl Group {
    pub fn new(parts: Parts, computer: Box<dyn Computer>) -> Self {
        let Parts { place, health, peers, outgoing, incoming, meter, peer_stats } = parts;
        Self {
            place,
            health,
            computer,
            peers,
            outgoing,
            incoming,
            model: None,
            run: 0,
            submitted: 0,
            under_way: VecDeque::new(),
            meter,
            peer_stats,
            reported: Vec::new(),
        }
    }

    /// Has every stage load its layers of `model`, unless they are loaded. Blocks until all have.
    ///
    /// Errors: `stage-mismatch` when a stage's folder is not stage 0's, with both sides named.
    pub fn load(&mut self, model: &Path) -> Result<&Model> {
        if self.model.as_ref().is_none_or(|(loaded, _)| loaded != model) {
            self.drain()?;
            self.model = None;
            let loaded = self.load_anew(model)?;
            self.model = Some((model.to_owned(), loaded));
        }
        match &self.model {
            Some((_, model)) => Ok(model),
            None => Err(Error::internal("the group's model was loaded and is gone")),
        }
    }

    /// Loads again at the next [`Group::load`], even the same folder: its files have changed.
    pub fn forget(&mut self) {
        self.model = None;
    }

    fn load_anew(&mut self, model: &Path) -> Result<Model> {
        for peer in &self.peers {
            peer.ask_open(model)?;
        }
        let own = self.computer.open(model);
        let others = all_answers(&mut self.peers, Peer::opened);
        let opened = own?;
        let own = opened.to_proto(self.place.layers.as_ref());
        let others = others?;
        let place = &self.place;
        for (index, other) in others.iter().enumerate() {
            same_model((&place.name(0), &own), (&place.name(index + 1), other))?;
        }
        let all: Vec<&proto::ModelOpened> = std::iter::once(&own).chain(&others).collect();
        let given: Vec<_> =
            all.iter().map(|one| one.given_layers.as_ref().map(|range| range.first_layer..range.end_layer)).collect();
        let ranges = match given_layers(&given, opened.layers, |stage| place.name(stage))? {
            Some(given) => given,
            None => split::balanced(&all, opened.layers)?,
        };
        let last = place.stages() - 1;
        let part = |(stage, layers): (usize, Range<u32>)| Part {
            layers: layers.start as usize..layers.end as usize,
            embeds: stage == 0,
            heads: stage == last,
        };
        let parts: Vec<Part> = ranges.into_iter().enumerate().map(part).collect();

        for (peer, part) in self.peers.iter().zip(&parts[1..]) {
            peer.ask_load(model, &part.layers)?;
        }
        let own = self.computer.load(model, &parts[0]);
        let others = all_answers(&mut self.peers, Peer::loaded);
        let own = own?;
        self.meter.loaded(&parts[0].layers, own.bytes_read);
        let loaded: Vec<_> = std::iter::once(own.to_proto(0.0)).chain(others?).collect();
        let tensors = all_tensors(&loaded, |stage| self.place.name(stage))?;
        let bytes_read: Vec<u64> = loaded.iter().map(|loaded| loaded.bytes_read).collect();
        for (stage, (part, bytes_read)) in parts.iter().zip(&bytes_read).enumerate() {
            let layers = format!("{}-{}", part.layers.start, part.layers.end.saturating_sub(1));
            tracing::info!(stage, layers, bytes_read, "stage loaded");
        }
        Ok(Model { opened, parts, bytes_read, tensors })
    }

    /// What every stage did since the last report, one line of the log each.
    pub fn report(&mut self) {
        let asked = self.peers.iter().try_for_each(Peer::ask_report);
        if asked.is_err() || self.peers.iter_mut().try_for_each(Peer::reported).is_err() {
            // The group is breaking, and that is told elsewhere.
            return;
        }
        let now = all_stats(&self.meter, &self.peer_stats);
        for (stage, stats) in now.iter().enumerate() {
            let spent = self.reported.get(stage).map_or_else(|| stats.clone(), |before| since(before, stats));
            tracing::info!(
                stage,
                address = spent.address,
                layers = format!("{}-{}", spent.first_layer, i64::from(spent.end_layer) - 1),
                steps = spent.steps,
                tokens = spent.tokens,
                busy = format!("{:.3}", busy_share(&spent)),
                busy_seconds = spent.busy_seconds,
                waiting_for_input_seconds = spent.waiting_for_input_seconds,
                waiting_for_output_seconds = spent.waiting_for_output_seconds,
                "stage utilisation"
            );
        }
        self.reported = now;
    }

    /// Takes what is still under way of a run that nobody waits for any more.
    fn drain(&mut self) -> Result<()> {
        while !self.under_way.is_empty() {
            // A step that failed has arrived too; what it failed of was told when it was waited for.
            let _ = self.take_oldest();
            if let Some(error) = self.health.error() {
                return Err(error);
            }
        }
        Ok(())
    }

    fn take_oldest(&mut self) -> Result<Vec<Taken>> {
        let Some((expected, asked)) = self.under_way.pop_front() else {
            return Err(Error::internal("targets were waited for and no step is under way"));
        };
        let arrived = self.meter.spend(Spent::WaitingForInput, || self.incoming.blocking_recv());
        if let Some(error) = self.health.error() {
            return Err(error);
        }
        let wrong = |what: String| {
            let error = wire::wrong(&what);
            self.health.break_with(&error);
            Err(error)
        };
        match arrived {
            None => Err(self.health.why()),
            Some(Work::Taken { run, index, taken }) => {
                if (run, index) != (self.run, expected) || taken.len() != asked {
                    return wrong(format!(
                        "{} targets of step {index}, run {run}, arrived; {asked} of step {expected}, run {}, come next",
                        taken.len(),
                        self.run
                    ));
                }
                Ok(taken)
            }
            Some(Work::Failed { run, index, stage, error }) => {
                if (run, index) != (self.run, expected) {
                    return wrong(format!("step {index} of run {run} failed; {expected} of {} comes next", self.run));
                }
                Err(Error::new(error.code, format!("{}: {}", self.place.name(stage as usize), error.message)))
            }
            Some(_) => wrong("a step came back to stage 0".to_owned()),
        }
    }

    fn send(&self, work: Work) -> Result<()> {
        let sent = self.meter.spend(Spent::WaitingForOutput, || self.outgoing.blocking_send(work).is_ok());
        if sent { Ok(()) } else { Err(self.health.why()) }
    }
}

impl Drop for Group {
    /// Without the thread that schedules, nothing is left to do for the others.
    fn drop(&mut self) {
        self.health.break_quietly(&Error::new(Code::GroupBroken, "stage 0's model thread has ended"));
    }
}

impl Pipeline for Group {
    fn begin(&mut self, begin: &Begin) -> Result<()> {
        self.drain()?;
        if self.model.is_none() {
            return Err(Error::internal("a run begins and the group has no model"));
        }
        self.run += 1;
        self.submitted = 0;
        self.meter.spend(Spent::Busy, || self.computer.begin(begin))?;
        self.send(Work::Begin { run: self.run, begin: begin.clone() })
    }

    fn depth(&self) -> usize {
        // One step in each stage, and one on its way into and out of the ring.
        self.place.stages() + 2
    }

    fn submit(&mut self, step: Step) -> Result<()> {
        if self.under_way.len() > self.depth() + self.place.stages() {
            return Err(Error::internal(format!("{} steps are under way already", self.under_way.len())));
        }
        let tokens = step.token_ids.len();
        let output = self.meter.spend(Spent::Busy, || self.computer.run(&step, None))?;
        let Output::Activations(activations) = output else {
            return Err(Error::internal("stage 0 computed targets, which the last stage should"));
        };
        self.meter.step(tokens, activations.bytes.len());
        let (index, asked) = (self.submitted, step.wanted());
        self.send(Work::Step { run: self.run, index, step, activations })?;
        self.submitted += 1;
        self.under_way.push_back((index, asked));
        Ok(())
    }

    fn next(&mut self) -> Result<Vec<Taken>> {
        self.take_oldest()
    }
}

/// Every peer's answer; all are heard even when one refuses, so that none lies about later.
fn all_answers<T>(peers: &mut [Peer], hear: impl Fn(&mut Peer) -> Result<T>) -> Result<Vec<T>> {
    let answers: Vec<Result<T>> = peers.iter_mut().map(hear).collect();
    answers.into_iter().collect()
}

fn all_stats(own: &Meter, others: &PeerStats) -> Vec<proto::StageStats> {
    let others = others.lock().unwrap_or_else(PoisonError::into_inner);
    std::iter::once(own.read()).chain(others.iter().cloned()).collect()
}

#[cfg(test)]
mod tests;
