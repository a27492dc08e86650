//! One stage of a teacher: a contiguous range of its layers, and at the end of them the head, where
//! soft targets are captured and tokens drawn.
//!
//! Shapes: n packed tokens, m of them wanted, h hidden, v vocabulary.

pub mod pipeline;
pub mod step;

use std::path::Path;

use retort_core::{Code, Error, Result};
use retort_llama::{Config, Part, Piece as Run, TorchPart};
use tch::{Device, Kind, Tensor};

use crate::{
    capture::Target,
    engine::native::limits,
    sampling::{Place, Sampler},
    torch::{model as llama, torch},
};
use step::{Activations, Ask, Begin, Held, Output, Step, Taken};

/// Where and in what numbers a stage computes.
#[derive(Clone, Debug, PartialEq)]
pub struct Computing {
    /// Layers are dealt over these in runs of equal length.
    pub devices: Vec<Device>,
    pub kind: Kind,
}

/// A part of a teacher, loaded, and the shard it works on.
pub struct Stage {
    part: TorchPart,
    begin: Option<Begin>,
}

impl Stage {
    /// Reads the part's own tensors of a Hugging Face folder.
    pub fn load(dir: &Path, part: Part, computing: &Computing) -> Result<Self> {
        let part = tch::no_grad(|| TorchPart::load(dir, part, &computing.devices, computing.kind)).map_err(llama)?;
        Ok(Self { part, begin: None })
    }

    pub fn config(&self) -> &Config {
        self.part.config()
    }

    pub fn held(&self) -> Held {
        Held {
            part: self.part.part().clone(),
            dtype: dtype(self.part.kind()),
            hidden_size: u32::try_from(self.part.config().hidden_size).unwrap_or(0),
            bytes_read: self.part.bytes_read(),
        }
    }

    pub fn begin(&mut self, begin: &Begin) -> Result<()> {
        self.begin = None;
        self.part.reset(begin.room).map_err(llama)?;
        self.begin = Some(begin.clone());
        Ok(())
    }

    /// Puts a step through the layers. The first stage is given none, every other one what the stage
    /// before it made of the same step.
    pub fn run(&mut self, step: &Step, input: Option<Activations>) -> Result<Output> {
        tch::no_grad(|| {
            let hidden_nh = match input {
                None => self.part.embed(&step.token_ids).map_err(llama)?,
                Some(input) => self.receive(&input)?,
            };
            for share in &step.shares {
                self.part.share(step.lane, share).map_err(llama)?;
            }
            let runs: Vec<Run> = step.pieces.iter().map(|piece| piece.run).collect();
            let hidden_nh = self.part.forward(step.lane, hidden_nh, &runs).map_err(llama)?;
            if self.part.part().heads {
                return Ok(Output::Taken(self.take(step, &hidden_nh)?));
            }
            Ok(Output::Activations(send(step.token_ids.len(), &hidden_nh)?))
        })
    }

    fn receive(&self, input: &Activations) -> Result<Tensor> {
        let hidden = self.part.config().hidden_size;
        let shape = [i64::from(input.tokens), hidden];
        let bytes = shape.iter().product::<i64>() as usize * self.part.kind().elt_size_in_bytes();
        if input.bytes.len() != bytes {
            return Err(Error::new(
                Code::RequestInvalid,
                format!(
                    "{} bytes of activations for {} tokens of {hidden}; it must be {bytes}",
                    input.bytes.len(),
                    input.tokens
                ),
            ));
        }
        Tensor::f_from_data_size(&input.bytes, &shape, self.part.kind()).map_err(torch)
    }

    /// Head, draws and capture for what the pieces ask for, a chunk of positions at a time.
    fn take(&self, step: &Step, hidden_nh: &Tensor) -> Result<Vec<Taken>> {
        let Some(begin) = &self.begin else { return Err(Error::internal("a step before its shard has begun")) };
        let wanted = wanted(step);
        let chunk = limits::chunk_positions(self.part.config().vocab_size);
        let mut taken = Vec::with_capacity(wanted.len());
        for wanted in wanted.chunks(chunk) {
            let at: Vec<i64> = wanted.iter().map(|wanted| wanted.at as i64).collect();
            let at_m = Tensor::from_slice(&at).f_to_device(hidden_nh.device()).map_err(torch)?;
            let hidden_mh = hidden_nh.f_index_select(0, &at_m).map_err(torch)?;
            let logits_mv = self.part.head(&hidden_mh).map_err(llama)?;
            let tokens = tokens(begin.sampler.as_ref(), &logits_mv, wanted)?;
            let targets = wanted.iter().zip(&tokens).map(|(wanted, &token)| wanted.target(token));
            let targets: Vec<Target> = targets.collect();
            let positions = begin.capture.positions(&logits_mv, &targets)?;
            taken.extend(tokens.into_iter().zip(positions).map(|(token, position)| Taken { token, position }));
        }
        Ok(taken)
    }
}

/// A position whose distribution is asked for.
struct Wanted {
    /// Its index among the packed tokens.
    at: usize,
    stream: u64,
    /// Index in the sequence of the token it predicts.
    position: u64,
    /// That token, where it is given.
    label: Option<u32>,
}

impl Wanted {
    fn target(&self, token: u32) -> Target {
        Target { row: self.stream, position: self.position, token }
    }
}

fn wanted(step: &Step) -> Vec<Wanted> {
    let mut wanted = Vec::with_capacity(step.wanted());
    let mut start = 0;
    for piece in &step.pieces {
        let (tokens, first) = (piece.run.tokens as usize, u64::from(piece.run.start));
        match piece.ask {
            Ask::Nothing => {}
            Ask::Score { first: index } => {
                let scored = piece.first_scored(index) as usize..tokens;
                wanted.extend(scored.map(|index| Wanted {
                    at: start + index - 1,
                    stream: piece.stream,
                    position: first + index as u64,
                    label: step.token_ids.get(start + index).copied(),
                }));
            }
            Ask::Next => wanted.push(Wanted {
                at: start + tokens - 1,
                stream: piece.stream,
                position: first + tokens as u64,
                label: None,
            }),
        }
        start += tokens;
    }
    wanted
}

/// The given tokens, and draws where there are none.
fn tokens(sampler: Option<&Sampler>, logits_mv: &Tensor, wanted: &[Wanted]) -> Result<Vec<u32>> {
    let mut tokens: Vec<u32> = wanted.iter().map(|wanted| wanted.label.unwrap_or(0)).collect();
    let open: Vec<usize> = (0..wanted.len()).filter(|&index| wanted[index].label.is_none()).collect();
    if open.is_empty() {
        return Ok(tokens);
    }
    let sampler = sampler.ok_or_else(|| Error::internal("a draw is asked for in a shard that draws none"))?;
    let places: Vec<Place> =
        open.iter().map(|&at| Place { row: wanted[at].stream, position: wanted[at].position }).collect();
    let rows = if open.len() == wanted.len() {
        logits_mv.shallow_clone()
    } else {
        let open: Vec<i64> = open.iter().map(|&at| at as i64).collect();
        let open = Tensor::from_slice(&open).f_to_device(logits_mv.device()).map_err(torch)?;
        logits_mv.f_index_select(0, &open).map_err(torch)?
    };
    for (&at, token) in open.iter().zip(sampler.next(&rows, &places)?) {
        tokens[at] = token;
    }
    Ok(tokens)
}

fn send(tokens: usize, hidden_nh: &Tensor) -> Result<Activations> {
    let hidden_nh = hidden_nh.f_to_device(Device::Cpu).and_then(|t| t.f_contiguous()).map_err(torch)?;
    let mut bytes = vec![0; hidden_nh.numel() * hidden_nh.kind().elt_size_in_bytes()];
    hidden_nh.f_copy_data_u8(&mut bytes, hidden_nh.numel()).map_err(torch)?;
    Ok(Activations { tokens: tokens as u32, bytes })
}

pub(crate) fn dtype(kind: Kind) -> &'static str {
    match kind {
        Kind::BFloat16 => "bf16",
        _ => "f32",
    }
}
