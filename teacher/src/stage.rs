//! One stage of a teacher: a contiguous range of its layers, and at the end of them the head, where
//! soft targets are captured and tokens drawn.
//!
//! Shapes: n packed tokens, m of them wanted, h hidden, v vocabulary.

pub mod pipeline;
pub mod step;
mod take;

use std::{collections::HashMap, path::Path};

use retort_core::{Code, Error, Result};
use retort_llama::{Config, HostPart, Keep, Part, Piece as Run, TorchPart};
use tch::{Device, Kind, Tensor};

use crate::torch::{host_f32, model as llama, torch};
use step::{Activations, Begin, Held, Output, Step};

/// What a stage computes with.
#[derive(Clone, Debug, PartialEq)]
pub enum Arithmetic {
    /// libtorch, on any device.
    Torch {
        /// Layers are dealt over these in runs of equal length.
        devices: Vec<Device>,
        kind: Kind,
        keep: Keep,
    },
    /// Our own kernels on the CPU, in f32.
    Host {
        keep: Keep,
        /// Cores; all of them when `None`.
        threads: Option<usize>,
    },
}

/// A part of a teacher, loaded, and the shard it works on.
pub struct Stage {
    part: Loaded,
    begin: Option<Begin>,
    /// Tokens of each lane's slots, kept where a sampler looks back at them.
    told: HashMap<(u32, u32), Vec<u32>>,
}

enum Loaded {
    Torch(Box<TorchPart>),
    Host(Box<HostPart>),
}

/// Hidden states of a step's packed tokens.
enum Hidden {
    Torch(Tensor),
    Host(Vec<f32>),
}

impl Arithmetic {
    /// The fastest there is on a device: our own kernels for f32 on the CPU, libtorch for all else.
    pub fn on(device: Device, kind: Kind, threads: Option<usize>) -> Self {
        match (device, kind) {
            (Device::Cpu, Kind::Float) => Self::Host { keep: Keep::Stored, threads },
            _ => Self::Torch { devices: vec![device], kind, keep: Keep::Stored },
        }
    }

    /// The same, with the weights of projections kept otherwise.
    pub fn keeping(mut self, narrow: Keep) -> Self {
        match &mut self {
            Self::Torch { keep, .. } | Self::Host { keep, .. } => *keep = narrow,
        }
        self
    }

    /// Its name in a shard's header: results differ in their last bits between two of different names.
    pub fn engine(&self) -> &'static str {
        match self {
            Self::Torch { .. } => "native",
            Self::Host { .. } => "native-host",
        }
    }

    /// Of its numbers, and of its weights where they are kept narrower than they are stored.
    pub fn dtype(&self) -> &'static str {
        let (wide, keep) = match self {
            Self::Torch { kind: Kind::BFloat16, keep, .. } => (false, keep),
            Self::Torch { keep, .. } | Self::Host { keep, .. } => (true, keep),
        };
        match (wide, keep) {
            (true, Keep::Stored) => "f32",
            (true, Keep::Bf16) => "f32, weights bf16",
            (true, Keep::Int8) => "f32, weights int8",
            (true, Keep::F8E4m3) => "f32, weights fp8",
            (false, Keep::Stored | Keep::Bf16) => "bf16",
            (false, Keep::Int8) => "bf16, weights int8",
            (false, Keep::F8E4m3) => "bf16, weights fp8",
        }
    }

    /// Bytes of a number between layers.
    pub fn number_bytes(&self) -> usize {
        match self {
            Self::Torch { kind, .. } => kind.elt_size_in_bytes(),
            Self::Host { .. } => 4,
        }
    }
}

impl Stage {
    /// Reads the part's own tensors of a Hugging Face folder.
    pub fn load(dir: &Path, part: Part, arithmetic: &Arithmetic) -> Result<Self> {
        let part = match arithmetic {
            Arithmetic::Torch { devices, kind, keep } => {
                let part = tch::no_grad(|| TorchPart::load(dir, part, devices, *kind, *keep));
                Loaded::Torch(Box::new(part.map_err(llama)?))
            }
            Arithmetic::Host { keep, threads } => {
                Loaded::Host(Box::new(HostPart::load(dir, part, *keep, *threads).map_err(llama)?))
            }
        };
        Ok(Self { part, begin: None, told: HashMap::new() })
    }

    pub fn config(&self) -> &Config {
        match &self.part {
            Loaded::Torch(part) => part.config(),
            Loaded::Host(part) => part.config(),
        }
    }

    pub fn held(&self) -> Held {
        let (part, number_bytes, bytes_read) = match &self.part {
            Loaded::Torch(part) => (part.part(), part.kind().elt_size_in_bytes(), part.bytes_read()),
            Loaded::Host(part) => (part.part(), 4, part.bytes_read()),
        };
        Held {
            part: part.clone(),
            number_bytes: number_bytes as u32,
            hidden_size: u32::try_from(self.config().hidden_size).unwrap_or(0),
            bytes_read,
        }
    }

    pub fn begin(&mut self, begin: &Begin) -> Result<()> {
        self.begin = None;
        self.told.clear();
        match &mut self.part {
            Loaded::Torch(part) => part.reset(begin.room).map_err(llama)?,
            Loaded::Host(part) => part.reset(begin.room),
        }
        self.begin = Some(begin.clone());
        Ok(())
    }

    /// Puts a step through the layers. The first stage is given none, every other one what the stage
    /// before it made of the same step.
    pub fn run(&mut self, step: &Step, input: Option<Activations>) -> Result<Output> {
        let tokens: u64 = step.pieces.iter().map(|piece| u64::from(piece.run.tokens)).sum();
        if tokens != step.token_ids.len() as u64 {
            let ids = step.token_ids.len();
            return Err(Error::new(Code::RequestInvalid, format!("a step of {tokens} tokens with {ids} token ids")));
        }
        let runs: Vec<Run> = step.pieces.iter().map(|piece| piece.run).collect();
        let hidden = tch::no_grad(|| self.forward(step, &runs, input))?;
        self.remember(step);
        let heads = self.held().part.heads;
        tch::no_grad(|| if heads { Ok(Output::Taken(self.take(step, &hidden)?)) } else { send(tokens as u32, hidden) })
    }

    fn forward(&mut self, step: &Step, runs: &[Run], input: Option<Activations>) -> Result<Hidden> {
        let hidden = self.config().hidden_size;
        match &mut self.part {
            Loaded::Torch(part) => {
                let hidden_nh = match input {
                    None => part.embed(&step.token_ids).map_err(llama)?,
                    Some(input) => {
                        input.check(part.kind().elt_size_in_bytes(), hidden)?;
                        let shape = [i64::from(input.tokens), hidden];
                        Tensor::f_from_data_size(&input.bytes, &shape, part.kind()).map_err(torch)?
                    }
                };
                for share in &step.shares {
                    part.share(step.lane, share).map_err(llama)?;
                }
                Ok(Hidden::Torch(part.forward(step.lane, hidden_nh, runs).map_err(llama)?))
            }
            Loaded::Host(part) => {
                let mut hidden_nh = match input {
                    None => part.embed(&step.token_ids).map_err(llama)?,
                    Some(input) => {
                        input.check(4, hidden)?;
                        input.bytes.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
                    }
                };
                for share in &step.shares {
                    part.share(step.lane, share).map_err(llama)?;
                }
                part.forward(step.lane, &mut hidden_nh, runs).map_err(llama)?;
                Ok(Hidden::Host(hidden_nh))
            }
        }
    }

    /// Keeps a step's tokens where the sampler punishes repetition.
    fn remember(&mut self, step: &Step) {
        let looks_back = |begin: &Begin| begin.sampler.is_some_and(|sampler| sampler.repetition_penalty != 1.0);
        if !self.begin.as_ref().is_some_and(looks_back) {
            return;
        }
        for share in &step.shares {
            let from = self.told.get(&(step.lane, share.from));
            let shared = from.and_then(|tokens| tokens.get(..share.positions as usize)).unwrap_or_default().to_vec();
            self.told.insert((step.lane, share.to), shared);
        }
        let mut rest = step.token_ids.as_slice();
        for piece in &step.pieces {
            let (tokens, more) = rest.split_at(piece.run.tokens as usize);
            rest = more;
            if let Some(slot) = piece.run.slot {
                let told = self.told.entry((step.lane, slot)).or_default();
                told.truncate(piece.run.start as usize);
                told.extend_from_slice(tokens);
            }
        }
    }
}

fn send(tokens: u32, hidden: Hidden) -> Result<Output> {
    let bytes = match hidden {
        Hidden::Host(hidden_nh) => hidden_nh.iter().flat_map(|number| number.to_le_bytes()).collect(),
        Hidden::Torch(hidden_nh) if hidden_nh.kind() == Kind::Float => {
            host_f32(&hidden_nh)?.iter().flat_map(|number| number.to_le_bytes()).collect()
        }
        Hidden::Torch(hidden_nh) => {
            let hidden_nh = hidden_nh.f_to_device(Device::Cpu).and_then(|t| t.f_contiguous()).map_err(torch)?;
            let mut bytes = vec![0; hidden_nh.numel() * hidden_nh.kind().elt_size_in_bytes()];
            hidden_nh.f_copy_data_u8(&mut bytes, hidden_nh.numel()).map_err(torch)?;
            bytes
        }
    };
    Ok(Output::Activations(Activations { tokens, bytes }))
}
