//! A lane: sequences that take their steps together, and the slots they live in.
//!
//! A step either begins prompts or adds a token to every sequence that is being written.

use retort_core::Result;
use retort_llama::{Piece as Run, Share};

use super::{Writing, prompts::Prompts};
use crate::{
    engine::{Text, native::limits},
    stage::step::{Ask, Piece, Step, Taken, stream},
};

pub(super) struct Lane {
    lane: u32,
    free: Vec<u32>,
    /// Sequences being written, in the order in which they began.
    open: Vec<Open>,
    /// Further completions of prompts that the step before began: their slot is to share that one's.
    followers: Vec<Follower>,
    /// Tokens that all prompts begin with, and whether they are in the slot behind the others.
    shared: u32,
    shared_slot: u32,
    shared_done: bool,
    flight: Option<Flight>,
}

#[derive(Clone, Copy)]
struct Open {
    /// Index of the completion.
    sequence: usize,
    slot: u32,
}

#[derive(Clone, Copy)]
struct Follower {
    sequence: usize,
    text: usize,
    from: u32,
}

/// The step on its way.
enum Flight {
    Shared,
    /// These begin; the token each draws is its first.
    Begin(Vec<Open>),
    /// All of `open`.
    Write,
}

impl Lane {
    pub(super) fn new(lane: u32, slots: u32, shared: u32) -> Self {
        // Slots are taken from the end: the lowest first.
        let free = (0..slots).rev().collect();
        let (open, followers) = (Vec::new(), Vec::new());
        Self { lane, free, open, followers, shared, shared_slot: slots, shared_done: shared == 0, flight: None }
    }

    pub(super) fn on_its_way(&self) -> bool {
        self.flight.is_some()
    }

    /// Takes in what the step on its way has given.
    pub(super) fn apply(&mut self, taken: Vec<Taken>, writing: &mut Writing) -> Result<()> {
        let members = match self.flight.take() {
            None => return Ok(()),
            Some(Flight::Shared) => {
                self.shared_done = true;
                return Ok(());
            }
            Some(Flight::Begin(members)) => members,
            Some(Flight::Write) => std::mem::take(&mut self.open),
        };
        for (member, taken) in members.into_iter().zip(taken) {
            if writing.push(member.sequence, taken)? {
                self.open.push(member);
            } else {
                self.free.push(member.slot);
            }
        }
        // The lowest free slot is the next to be taken.
        self.free.sort_unstable_by(|a, b| b.cmp(a));
        Ok(())
    }

    /// The lane's next step; `None` when it has nothing left to do.
    pub(super) fn next(&mut self, texts: &[Text], prompts: &mut Prompts, writing: &Writing) -> Option<Step> {
        if !self.shared_done {
            let first = prompts.peek()?.text;
            self.flight = Some(Flight::Shared);
            return Some(self.shared_step(&texts[first]));
        }
        if let Some(step) = self.begin(texts, prompts, writing) {
            return Some(step);
        }
        if self.open.is_empty() {
            return None;
        }
        self.flight = Some(Flight::Write);
        let mut step = self.step();
        for open in &self.open {
            let written = &writing.sequences[open.sequence];
            let text = &texts[written.text];
            let start = (text.token_ids.len() + written.tokens.len() - 1) as u32;
            step.token_ids.extend(written.tokens.last());
            step.pieces.push(Piece {
                run: Run { slot: Some(open.slot), start, tokens: 1 },
                stream: stream(text.row, written.completion),
                ask: Ask::Next,
            });
        }
        Some(step)
    }

    fn shared_step(&self, text: &Text) -> Step {
        let run = Run { slot: Some(self.shared_slot), start: 0, tokens: self.shared };
        let mut step = self.step();
        step.token_ids.extend(&text.token_ids[..self.shared as usize]);
        step.pieces.push(Piece { run, stream: 0, ask: Ask::Nothing });
        step
    }

    /// Begins as many prompts as there are slots for and a step may hold.
    fn begin(&mut self, texts: &[Text], prompts: &mut Prompts, writing: &Writing) -> Option<Step> {
        let mut step = self.step();
        let mut begun = Vec::new();
        for follower in std::mem::take(&mut self.followers) {
            // Room was kept for it when its prompt began.
            let Some(slot) = self.free.pop() else { break };
            let text = &texts[follower.text];
            let start = text.token_ids.len() as u32 - 1;
            // One that ended with its first token has left its slot, and its prompt in it.
            if start > 0 && slot != follower.from {
                step.shares.push(Share { from: follower.from, to: slot, positions: start });
            }
            begun.push(Open { sequence: follower.sequence, slot });
            self.piece(&mut step, text, writing.sequences[follower.sequence].completion, slot, start);
        }
        while let Some(&prompt) = prompts.peek() {
            let tokens = step.token_ids.len() + texts[prompt.text].token_ids.len();
            let room = self.free.len().saturating_sub(self.followers.len());
            if room < prompt.count as usize || (!begun.is_empty() && tokens > limits::FORWARD_TOKENS) {
                break;
            }
            let Some(slot) = self.free.pop() else { break };
            prompts.pop();
            if self.shared > 0 {
                step.shares.push(Share { from: self.shared_slot, to: slot, positions: self.shared });
            }
            begun.push(Open { sequence: prompt.sequence, slot });
            self.piece(&mut step, &texts[prompt.text], prompt.first, slot, self.shared);
            let follower =
                |more: u32| Follower { sequence: prompt.sequence + more as usize, text: prompt.text, from: slot };
            self.followers.extend((1..prompt.count).map(follower));
        }
        if begun.is_empty() {
            return None;
        }
        self.flight = Some(Flight::Begin(begun));
        Some(step)
    }

    fn piece(&self, step: &mut Step, text: &Text, completion: u32, slot: u32, start: u32) {
        let new = &text.token_ids[start as usize..];
        step.token_ids.extend(new);
        step.pieces.push(Piece {
            run: Run { slot: Some(slot), start, tokens: new.len() as u32 },
            stream: stream(text.row, completion),
            ask: Ask::Next,
        });
    }

    fn step(&self) -> Step {
        Step { lane: self.lane, shares: Vec::new(), pieces: Vec::new(), token_ids: Vec::new() }
    }
}
