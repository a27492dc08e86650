//! A contiguous range of a model's layers: what one stage of a teacher group holds and computes.
//!
//! A part reads only its own tensors. Tokens of several sequences lie one after another, without
//! padding ("packed"), as [`Piece`]s: each is a run of new positions of one sequence, whose earlier
//! positions, if any, lie in a *slot* of keys and values that the part keeps. Slots belong to *lanes*;
//! steps of different lanes may be on their way through a group at the same time.

pub mod host;
pub mod torch;

use std::ops::Range;

use tch::Kind;

use crate::{Config, Error, Result};

/// Which of a model's tensors a process holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    pub layers: Range<usize>,
    /// Token ids to hidden states; only the first part.
    pub embeds: bool,
    /// Final norm and head; only the last part.
    pub heads: bool,
}

/// New positions of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where the sequence's keys and values are kept; `None` keeps nothing and starts at position 0.
    pub slot: Option<u32>,
    /// The first new position: as many are in the slot already.
    pub start: u32,
    pub tokens: u32,
}

/// Slot `to` begins with the first `positions` of slot `from`, of the same lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    pub from: u32,
    pub to: u32,
    pub positions: u32,
}

/// Room for keys and values: `lanes x slots x capacity` positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    pub lanes: u32,
    pub slots: u32,
    pub capacity: u32,
}

/// How a part keeps the weights of its projections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Keep {
    /// As they are stored, where they are mapped.
    #[default]
    Stored,
    /// In bf16, where they are wider.
    Bf16,
    /// In signed bytes, each row with a scale of its own; widened for each product.
    Int8,
    /// In e4m3 bytes, each row with a scale of its own; widened for each product.
    F8E4m3,
}

impl Keep {
    /// Reads `stored`, `bf16`, `int8` or `fp8`.
    pub fn from_flag(flag: &str) -> Result<Self> {
        match flag {
            "stored" => Ok(Self::Stored),
            "bf16" => Ok(Self::Bf16),
            "int8" => Ok(Self::Int8),
            "fp8" => Ok(Self::F8E4m3),
            _ => Err(Error::Invalid(format!("{flag:?} is no way to keep weights: say stored, bf16, int8 or fp8"))),
        }
    }

    /// The largest number of a narrow kind, and the kind.
    pub(crate) fn narrow(self) -> Option<(f64, Kind)> {
        match self {
            Self::Stored | Self::Bf16 => None,
            Self::Int8 => Some((127.0, Kind::Int8)),
            Self::F8E4m3 => Some((448.0, Kind::Float8e4m3fn)),
        }
    }
}

impl Part {
    /// The model from embedding to head.
    pub fn whole(config: &Config) -> Self {
        Self { layers: 0..layers(config), embeds: true, heads: true }
    }

    /// The part with these layers; the first also embeds, the last also has the head.
    pub fn of_layers(config: &Config, layers: Range<usize>) -> Result<Self> {
        let count = self::layers(config);
        if layers.is_empty() || layers.end > count {
            return Err(Error::Invalid(format!("layers {layers:?} of a model with layers 0..{count}")));
        }
        Ok(Self { embeds: layers.start == 0, heads: layers.end == count, layers })
    }

    /// Name and shape of every tensor it reads, in the order of [`Config::tensors`]. A tied head is the
    /// embedding once more.
    pub fn tensors(&self, config: &Config) -> Vec<(String, Vec<i64>)> {
        let held = |name: &str| match name.strip_prefix("model.layers.") {
            Some(rest) => {
                let layer = rest.split('.').next().and_then(|layer| layer.parse().ok());
                layer.is_some_and(|layer: usize| self.layers.contains(&layer))
            }
            None if name == "model.embed_tokens.weight" => self.embeds || (self.heads && config.tie_word_embeddings),
            None => self.heads,
        };
        config.tensors().into_iter().filter(|(name, _)| held(name)).collect()
    }
}

fn layers(config: &Config) -> usize {
    usize::try_from(config.num_hidden_layers).unwrap_or(0)
}

/// Checks pieces against room and tokens; gives the number of tokens. Nothing of a step is computed
/// before all of it is known to fit.
pub(crate) fn check(config: &Config, room: &Room, lane: u32, pieces: &[Piece]) -> Result<usize> {
    let context = config.max_position_embeddings.unsigned_abs();
    let mut tokens = 0usize;
    let mut taken = std::collections::HashSet::new();
    for piece in pieces {
        let end = u64::from(piece.start) + u64::from(piece.tokens);
        if piece.tokens == 0 || end > context {
            return Err(Error::TooLong(format!(
                "positions {} to {end} do not fit the model's context of {context}",
                piece.start
            )));
        }
        match piece.slot {
            None if piece.start > 0 => {
                return Err(Error::Invalid(format!("a piece without a slot starts at position {}", piece.start)));
            }
            None => {}
            Some(slot) => {
                if lane >= room.lanes || slot >= room.slots || end > u64::from(room.capacity) {
                    return Err(Error::Invalid(format!(
                        "slot {slot} of lane {lane} up to position {end}, in room for {} lanes of {} slots of {} positions",
                        room.lanes, room.slots, room.capacity
                    )));
                }
                if !taken.insert(slot) {
                    return Err(Error::Invalid(format!("slot {slot} of lane {lane} twice in one step")));
                }
            }
        }
        tokens += piece.tokens as usize;
    }
    if tokens == 0 {
        return Err(Error::Invalid("a step without tokens".into()));
    }
    Ok(tokens)
}

/// As [`check`], of a share.
pub(crate) fn check_share(room: &Room, lane: u32, share: &Share) -> Result<()> {
    let fits = |slot: u32| lane < room.lanes && slot < room.slots;
    if fits(share.from) && fits(share.to) && share.from != share.to && share.positions <= room.capacity {
        return Ok(());
    }
    Err(Error::Invalid(format!("{share:?} of lane {lane}, in {room:?}")))
}

#[cfg(test)]
mod tests;
