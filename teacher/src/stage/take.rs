//! What a step's pieces ask for: head, draws and capture.

use retort_core::{Error, Result};
use retort_kernels::Logits;
use retort_llama::{HostPart, TorchPart};
use tch::{Device, Tensor};

use super::{
    Hidden, Loaded, Stage,
    step::{Ask, Begin, Step, Taken},
};
use crate::{
    capture::{Capture, Target},
    engine::native::limits,
    sampling::{Place, Sampler},
    torch::{model as llama, torch},
};

/// A position whose distribution is asked for.
struct Wanted<'a> {
    /// Its index among the packed tokens.
    at: usize,
    stream: u64,
    /// Index in the sequence of the token it predicts.
    position: u64,
    /// That token, where it is given.
    label: Option<u32>,
    /// The sequence so far, where a draw looks back at it.
    before: &'a [u32],
}

impl Stage {
    pub(super) fn take(&self, step: &Step, hidden: &Hidden) -> Result<Vec<Taken>> {
        let Some(begin) = &self.begin else { return Err(Error::internal("a step before its shard has begun")) };
        let wanted = self.wanted(step);
        match (&self.part, hidden) {
            (Loaded::Torch(part), Hidden::Torch(hidden_nh)) => on_torch(part, begin, hidden_nh, &wanted),
            (Loaded::Host(part), Hidden::Host(hidden_nh)) => on_host(part, begin, hidden_nh, &wanted),
            _ => Err(Error::internal("hidden states of another arithmetic")),
        }
    }

    /// Does what the head does for so many positions, and captures `logits_v` at each: to be timed, with
    /// weights that are of no account.
    pub(crate) fn rehearse_head(&self, positions: usize, logits_v: &[f32], capture: &Capture) -> Result<()> {
        let hidden = self.config().hidden_size;
        let target = Target { row: 0, position: 1, token: 0 };
        match &self.part {
            Loaded::Host(part) => {
                let hidden_nh = vec![0.0; positions * hidden.unsigned_abs() as usize];
                let at: Vec<usize> = (0..positions).collect();
                let captured = part.head(&hidden_nh, &at, |_, _| capture.position(&Logits::new(logits_v), &target));
                captured.map_err(llama)?.into_iter().try_for_each(|captured| captured.map(|_| ()))
            }
            Loaded::Torch(part) => {
                let shape = [positions as i64, hidden];
                let hidden_mh = Tensor::f_zeros(shape, (part.kind(), Device::Cpu)).map_err(torch)?;
                let flat_mv = part.head(&hidden_mh).map_err(llama)?;
                let logits_v = Tensor::f_from_slice(logits_v).and_then(|t| t.f_to_device(flat_mv.device()));
                let logits_mv = logits_v.and_then(|logits_v| flat_mv.f_add(&logits_v)).map_err(torch)?;
                capture.positions(&logits_mv, &vec![target; positions]).map(|_| ())
            }
        }
    }

    fn wanted(&self, step: &Step) -> Vec<Wanted<'_>> {
        let mut wanted = Vec::with_capacity(step.wanted());
        let mut start = 0;
        for piece in &step.pieces {
            let (tokens, first) = (piece.run.tokens as usize, u64::from(piece.run.start));
            match piece.ask {
                Ask::Nothing => {}
                Ask::Score { first: index, next } => {
                    let own = piece.first_scored(index) as usize..tokens;
                    let own = own.map(|index| (index, step.token_ids.get(start + index).copied()));
                    let scored = own.chain(next.map(|next| (tokens, Some(next))));
                    wanted.extend(scored.map(|(index, label)| Wanted {
                        at: start + index - 1,
                        stream: piece.stream,
                        position: first + index as u64,
                        label,
                        before: &[],
                    }));
                }
                Ask::Next => wanted.push(Wanted {
                    at: (start + tokens).saturating_sub(1),
                    stream: piece.stream,
                    position: first + tokens as u64,
                    label: None,
                    before: piece
                        .run
                        .slot
                        .and_then(|slot| self.told.get(&(step.lane, slot)))
                        .map_or(&[], Vec::as_slice),
                }),
            }
            start += tokens;
        }
        wanted
    }
}

/// The head and what follows it, row by row on all cores; a few dozen rows of logits exist for each core.
fn on_host(part: &HostPart, begin: &Begin, hidden_nh: &[f32], wanted: &[Wanted]) -> Result<Vec<Taken>> {
    let at: Vec<usize> = wanted.iter().map(|wanted| wanted.at).collect();
    let take = |index: usize, row: &[f32]| {
        let (wanted, logits) = (&wanted[index], Logits::new(row));
        let token = match wanted.label {
            Some(token) => token,
            None => sampler(begin)?.next_row(&logits, wanted.place(), wanted.before),
        };
        let position = begin.capture.position(&logits, &wanted.target(token))?;
        Ok(Taken { token, position })
    };
    part.head(hidden_nh, &at, take).map_err(llama)?.into_iter().collect()
}

/// The head and what follows it, a chunk of positions at a time.
fn on_torch(part: &TorchPart, begin: &Begin, hidden_nh: &Tensor, wanted: &[Wanted]) -> Result<Vec<Taken>> {
    let chunk = limits::chunk_positions(part.config().vocab_size);
    let mut taken = Vec::with_capacity(wanted.len());
    for wanted in wanted.chunks(chunk) {
        let at: Vec<i64> = wanted.iter().map(|wanted| wanted.at as i64).collect();
        let at_m = Tensor::from_slice(&at).f_to_device(hidden_nh.device()).map_err(torch)?;
        let hidden_mh = hidden_nh.f_index_select(0, &at_m).map_err(torch)?;
        let logits_mv = part.head(&hidden_mh).map_err(llama)?;
        let tokens = tokens(begin, &logits_mv, wanted)?;
        let targets: Vec<Target> = wanted.iter().zip(&tokens).map(|(wanted, &token)| wanted.target(token)).collect();
        let positions = begin.capture.positions(&logits_mv, &targets)?;
        taken.extend(tokens.into_iter().zip(positions).map(|(token, position)| Taken { token, position }));
    }
    Ok(taken)
}

/// The given tokens, and draws where there are none.
fn tokens(begin: &Begin, logits_mv: &Tensor, wanted: &[Wanted]) -> Result<Vec<u32>> {
    let mut tokens: Vec<u32> = wanted.iter().map(|wanted| wanted.label.unwrap_or(0)).collect();
    let open: Vec<usize> = (0..wanted.len()).filter(|&index| wanted[index].label.is_none()).collect();
    if open.is_empty() {
        return Ok(tokens);
    }
    let places: Vec<Place> = open.iter().map(|&at| wanted[at].place()).collect();
    let before: Vec<&[u32]> = open.iter().map(|&at| wanted[at].before).collect();
    let rows = if open.len() == wanted.len() {
        logits_mv.shallow_clone()
    } else {
        let open: Vec<i64> = open.iter().map(|&at| at as i64).collect();
        let open = Tensor::from_slice(&open).f_to_device(logits_mv.device()).map_err(torch)?;
        logits_mv.f_index_select(0, &open).map_err(torch)?
    };
    for (&at, token) in open.iter().zip(sampler(begin)?.next(&rows, &places, &before)?) {
        tokens[at] = token;
    }
    Ok(tokens)
}

fn sampler(begin: &Begin) -> Result<&Sampler> {
    begin.sampler.as_ref().ok_or_else(|| Error::internal("a draw is asked for in a shard that draws none"))
}

impl Wanted<'_> {
    fn place(&self) -> Place {
        Place { row: self.stream, position: self.position }
    }

    fn target(&self, token: u32) -> Target {
        Target { row: self.stream, position: self.position, token }
    }
}
