//! What one step computes: plain data.
use retort_artifact::soft_targets::Position;

use crate::{capture::Capture, sampling::Sampler};

#[derive(Clone, Debug, PartialEq)]
pub struct Begin {
    pub capture: Capture,
    pub sampler: Option<Sampler>,
    pub lanes: u32,
    pub slots: u32,
    pub capacity: u32,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    pub lane: u32,
    pub shares: Vec<Share>,
    pub pieces: Vec<Piece>,
    pub token_ids: Vec<u32>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Share {
    pub from: u32,
    pub to: u32,
    pub positions: u32,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    pub slot: Option<u32>,
    pub start: u32,
    pub tokens: u32,
    pub stream: u64,
    pub ask: Ask,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Ask {
    Nothing,
    Score { first: u32 },
    Next,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Taken {
    pub token: u32,
    pub position: Position,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Activations {
    pub bytes: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    Activations(Activations),
    Taken(Vec<Taken>),
}
