//! What is large, cut into messages and put together again. Nothing takes more memory than was announced
//! and found to be right.

use std::sync::Arc;

use retort_core::{Error, Result};
use retort_proto::{self as proto, follow_response::What};
use tokio_util::bytes::Bytes;

use super::wrong;
use crate::{example::Example, trainer::weight};

/// Bytes of one chunk.
const CHUNK: usize = 1 << 20;
/// Most bytes of a message; the lengths of as many rows as a step may have fit.
pub(super) const MAX_MESSAGE: usize = 8 << 20;
/// Most bytes of the rows that one replica is given for a step.
pub(super) const MAX_ROWS_BYTES: u64 = 4 << 30;

/// One step's work for one replica.
#[derive(Clone)]
pub(super) struct Order {
    /// From 0.
    pub(super) step: u32,
    /// Of the whole step's target tokens together.
    pub(super) weight: f64,
    pub(super) teacher_done: bool,
    /// `None` if it has them.
    pub(super) weights: Option<Bytes>,
    pub(super) rows: Arc<Vec<Example>>,
}

impl Order {
    /// The messages that carry it, in order.
    pub(super) fn into_messages(self) -> impl Iterator<Item = What> + Send {
        let weights = self.weights.into_iter().flat_map(|weights| {
            let head = What::Weights(proto::StepWeights { bytes: weights.len() as u64 });
            std::iter::once(head).chain(chunks(weights).map(What::Chunk))
        });
        let head = proto::StepRows {
            step: self.step,
            weight: self.weight,
            row_bytes: self.rows.iter().map(|row| row.spilled_bytes() as u64).collect(),
            teacher_done: self.teacher_done,
        };
        let rows = self.rows;
        let chunks = (0..rows.len()).flat_map(move |row| chunks(Bytes::from(rows[row].to_bytes()))).map(What::Chunk);
        weights.chain(std::iter::once(What::Rows(head))).chain(chunks)
    }
}

pub(super) fn chunks(bytes: Bytes) -> impl Iterator<Item = Bytes> + Send {
    (0..bytes.len()).step_by(CHUNK).map(move |at| bytes.slice(at..(at + CHUNK).min(bytes.len())))
}

/// Bytes that were announced, as far as they have come.
#[derive(Debug)]
pub(super) struct Parcel {
    expected: u64,
    have: Vec<u8>,
}

impl Parcel {
    pub(super) fn of(expected: u64) -> Self {
        Self { expected, have: Vec::new() }
    }

    /// Takes the next chunk; true once it is whole.
    pub(super) fn take(&mut self, chunk: &Bytes) -> Result<bool> {
        let have = (self.have.len() + chunk.len()) as u64;
        if chunk.is_empty() || have > self.expected {
            return Err(wrong(&format!("chunks are not the {} bytes that were announced", self.expected)));
        }
        self.have.extend_from_slice(chunk);
        Ok(have == self.expected)
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.have
    }
}

/// What a replica checks an order against.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Of all trained parameters.
    pub(super) weight_bytes: u64,
    pub(super) vocab_size: u32,
    /// Optimiser steps of the run.
    pub(super) steps: u32,
    /// Rows of a step, at most.
    pub(super) batch_rows: u32,
}

/// An order as it arrived.
#[derive(Debug)]
pub(super) struct Received {
    pub(super) step: u32,
    pub(super) weight: f64,
    pub(super) teacher_done: bool,
    pub(super) weights: Option<Vec<u8>>,
    pub(super) rows: Vec<Example>,
}

/// Puts orders together from a lead's messages.
#[derive(Debug)]
pub(super) struct Incoming {
    bounds: Bounds,
    underway: Option<(Head, Parcel)>,
    /// Came for the rows that come next.
    weights: Option<Vec<u8>>,
    /// Some weights came ever.
    begun: bool,
}

#[derive(Debug)]
enum Head {
    Weights,
    Rows(proto::StepRows),
}

impl Incoming {
    pub(super) fn new(bounds: Bounds) -> Self {
        Self { bounds, underway: None, weights: None, begun: false }
    }

    /// Takes the next message; `Some` once an order is whole.
    pub(super) fn take(&mut self, what: What) -> Result<Option<Received>> {
        match (&mut self.underway, what) {
            (_, What::Alive(_)) => Ok(None),
            (Some((_, parcel)), What::Chunk(chunk)) => {
                if !parcel.take(&chunk)? {
                    return Ok(None);
                }
                match self.underway.take() {
                    Some((Head::Weights, parcel)) => {
                        self.weights = Some(parcel.into_bytes());
                        self.begun = true;
                        Ok(None)
                    }
                    Some((Head::Rows(head), parcel)) => self.received(head, &parcel.into_bytes()).map(Some),
                    None => Ok(None),
                }
            }
            (Some(_), _) => Err(wrong("what was announced is interrupted by another message")),
            (None, What::Weights(head)) => {
                let expected = self.bounds.weight_bytes;
                if head.bytes != expected || expected == 0 {
                    return Err(wrong(&format!("{} bytes of weights, where {expected} are expected", head.bytes)));
                }
                self.underway = Some((Head::Weights, Parcel::of(expected)));
                Ok(None)
            }
            (None, What::Rows(head)) => {
                let bytes = self.check(&head)?;
                self.underway = Some((Head::Rows(head), Parcel::of(bytes)));
                Ok(None)
            }
            (None, _) => Err(wrong("a message that does not belong here")),
        }
    }

    /// What the rows take, bytes.
    fn check(&self, head: &proto::StepRows) -> Result<u64> {
        let bytes = head.row_bytes.iter().try_fold(0u64, |sum, &row| sum.checked_add(row).filter(|_| row > 0));
        let bytes = bytes.filter(|bytes| (1..=MAX_ROWS_BYTES).contains(bytes));
        let rows = head.row_bytes.len() as u64;
        match bytes {
            Some(bytes) if self.begun && head.step < self.bounds.steps && rows <= self.bounds.batch_rows.into() => {
                Ok(bytes)
            }
            _ => Err(wrong(&format!(
                "step {} of {} with {rows} rows of {bytes:?} bytes; at most {} rows of together {MAX_ROWS_BYTES} bytes come, after weights",
                head.step, self.bounds.steps, self.bounds.batch_rows
            ))),
        }
    }

    fn received(&mut self, head: proto::StepRows, mut bytes: &[u8]) -> Result<Received> {
        let mut rows = Vec::with_capacity(head.row_bytes.len());
        for &length in &head.row_bytes {
            let read = usize::try_from(length).ok().and_then(|length| bytes.split_at_checked(length));
            let (row, rest) = read.ok_or_else(|| Error::internal("rows that were not counted"))?;
            bytes = rest;
            let row = Example::from_bytes(row).ok_or_else(|| wrong("a row that cannot be read"))?;
            row.check(self.bounds.vocab_size).map_err(|why| wrong(&format!("a row that is none: {why}")))?;
            rows.push(row);
        }
        let own = weight(&rows);
        // Sums in another order may differ by a rounding.
        if !(own > 0.0 && head.weight.is_finite() && head.weight >= own * (1.0 - 1e-9)) {
            return Err(wrong(&format!("rows whose target tokens weigh {own} of a step with {}", head.weight)));
        }
        let weights = self.weights.take();
        Ok(Received { step: head.step, weight: head.weight, teacher_done: head.teacher_done, weights, rows })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::example::tests::example;

    const VOCAB: u32 = 50;

    fn bounds() -> Bounds {
        Bounds { weight_bytes: 3 << 20, vocab_size: VOCAB, steps: 10, batch_rows: 4 }
    }

    fn order(rows: Vec<Example>) -> Order {
        let weights = Some(Bytes::from((0..3 << 20).map(|at| (at % 251) as u8).collect::<Vec<_>>()));
        Order { step: 3, weight: 100.0, teacher_done: true, weights, rows: Arc::new(rows) }
    }

    fn sound() -> Vec<Example> {
        vec![example(1, 5, 7, 4, VOCAB), example(2, 3, 9, 4, VOCAB)]
    }

    /// The last answer, or the first refusal.
    fn taken(messages: impl IntoIterator<Item = What>) -> Result<Option<Received>> {
        let mut incoming = Incoming::new(bounds());
        messages.into_iter().try_fold(None, |_, what| incoming.take(what))
    }

    #[test]
    fn an_order_arrives_as_it_was_sent() {
        let sent = order(sound());
        let mut incoming = Incoming::new(bounds());
        let mut received = Vec::new();
        let again = Order { weights: None, step: 4, ..sent.clone() };
        for what in sent.clone().into_messages().chain([What::Alive(proto::Alive {})]).chain(again.into_messages()) {
            received.extend(incoming.take(what).unwrap());
        }
        let [first, second] = &received[..] else { panic!("{} orders", received.len()) };
        assert_eq!((first.step, first.weight, first.teacher_done), (3, 100.0, true));
        assert_eq!(first.weights.as_deref(), sent.weights.as_deref());
        assert_eq!(&first.rows, &*sent.rows);
        assert_eq!((second.step, second.weights.is_none()), (4, true));
    }

    #[test]
    fn rows_that_are_none_are_refused() {
        let mut outside = sound();
        outside[1].token_ids[0] = VOCAB;
        let mut falling = sound();
        falling[0].targets[1] = 99;
        let mut bare = sound();
        bare[0].support.offsets[0] = 1;
        for (rows, why) in [(outside, "vocabulary"), (falling, "do not rise"), (bare, "offsets")] {
            let error = taken(order(rows).into_messages()).unwrap_err();
            assert!(error.message.contains(why), "{}", error.message);
        }
        let garbage = [What::Chunk(vec![7; 1000].into())];
        let head = proto::StepRows { step: 0, weight: 9.0, row_bytes: vec![400, 600], teacher_done: false };
        let weights = order(sound()).into_messages().take(4);
        assert!(
            taken(weights.chain([What::Rows(head)]).chain(garbage)).unwrap_err().message.contains("cannot be read")
        );
        let few = Order { weight: 3.0, ..order(sound()) };
        assert!(taken(few.into_messages()).unwrap_err().message.contains("weigh 16 of a step with 3"));
        let none = Order { weight: f64::NAN, ..order(sound()) };
        assert!(taken(none.into_messages()).unwrap_err().message.contains("weigh 16 of a step with NaN"));
    }

    #[test]
    fn heads_that_ask_for_too_much_are_refused_before_memory_is_taken() {
        let weights = |bytes| What::Weights(proto::StepWeights { bytes });
        assert!(taken([weights(u64::MAX)]).is_err());
        assert!(taken([weights((3 << 20) + 1)]).is_err());
        let rows = |step, row_bytes: Vec<u64>| {
            let head = proto::StepRows { step, weight: 100.0, row_bytes, teacher_done: false };
            taken(order(sound()).into_messages().take(4).chain([What::Rows(head)]))
        };
        rows(9, vec![100; 4]).unwrap();
        assert!(rows(10, vec![100; 4]).is_err());
        assert!(rows(9, vec![100; 5]).is_err());
        assert!(rows(9, vec![100, 0]).is_err());
        assert!(rows(9, vec![]).is_err());
        assert!(rows(9, vec![u64::MAX, 2]).is_err());
        assert!(rows(9, vec![MAX_ROWS_BYTES, 1]).is_err());
    }

    #[test]
    fn messages_out_of_order_are_refused() {
        let messages: Vec<What> = order(sound()).into_messages().collect();
        assert!(taken(messages[1..].to_vec()).is_err(), "a chunk that nothing announced");
        assert!(taken(messages[4..].to_vec()).is_err(), "rows before any weights");
        let [head, chunk, ..] = &messages[..] else { panic!("few messages") };
        assert!(taken([head.clone(), head.clone()]).is_err(), "an announcement inside another");
        assert!(taken([head.clone(), chunk.clone(), What::Chunk(Bytes::new())]).is_err(), "a chunk of nothing");
        let long = What::Chunk(vec![0; (3 << 20) + 1].into());
        assert!(taken([head.clone(), long]).is_err(), "more than was announced");
        assert!(taken([What::Welcome(proto::LeadWelcome::default())]).is_err(), "a second welcome");
    }
}
