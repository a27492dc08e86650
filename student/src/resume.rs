//! A trainer on disk: written at a checkpoint, read by the attempt that goes on.
//!
//! ```text
//! model/                       a Hugging Face folder, the weights in the student's kind; where it may be promoted also
//!                              the GGUF files that the spec asks for
//! adapter/                     of a student with adapters: these as PEFT reads them, in the student's kind
//! state/trainer.json           how far the run has come
//! state/outer.safetensors      the outer optimiser's velocity, where workers exchange weights; empty before its first step
//! state/optimizer.safetensors  moments, averages, and f32 masters where model/ does not hold them
//! ```
//!
//! A student with adapters has its `model/`, adapters merged, at its last step alone: its base is the weights before
//! training, which the store keeps.

use std::{fs, io, path::Path};

use retort_core::{Code, Error, Result, spec::Lora};
use retort_llama::{Config, Model, Weights, copy_text_files, write_tensors};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tch::{Device, Kind, TchError, Tensor};

use crate::{
    failure::{first_line, llama, torch},
    optimizer::copy_of,
    parallel::diloco::outer::Rounds,
    trainer::{Options, Progress, Trainer},
};

const SCHEMA_VERSION: u32 = 1;
/// Largest `trainer.json` that is read, bytes: where workers exchange weights it lists the batches given back.
const MAX_STATE_BYTES: u64 = 16 << 20;
const STATE: &str = "state/trainer.json";
const OPTIMIZER: &str = "state/optimizer.safetensors";
const OUTER: &str = "state/outer.safetensors";

#[derive(Serialize, Deserialize)]
struct State {
    schema_version: u32,
    #[serde(flatten)]
    progress: Progress,
    /// Updates of the optimiser: fewer than steps where a step had no target.
    updates: u32,
    dtype: String,
    /// Where workers exchange weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rounds: Option<Rounds>,
}

/// A Hugging Face folder of the student's weights, complete with the teacher's tokenizer and chat
/// template.
pub fn export(model: &Model, teacher: &Path, into: &Path) -> Result<()> {
    export_text(model.config(), teacher, into)?;
    model.save(into, model.kind()).map_err(llama)
}

/// All of a Hugging Face folder but the weights and their config.
fn export_text(config: &Config, teacher: &Path, into: &Path) -> Result<()> {
    fs::create_dir_all(into).map_err(|error| Error::io(into, error))?;
    copy_text_files(teacher, into).map_err(llama)?;
    let path = into.join("generation_config.json");
    if path.exists() {
        return Ok(());
    }
    let ends = json!({
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_ids,
        "pad_token_id": config.pad_token_id,
    });
    fs::write(&path, format!("{ends:#}\n")).map_err(|error| Error::io(&path, error))
}

/// A trainer as it was at one step, copied: it can be written while training goes on. It takes as much memory as
/// the weights and the optimiser's state.
pub struct Snapshot {
    /// What is judged and exported; absent of a student with adapters that is not to be `whole`.
    weights: Option<Weights>,
    optimizer: Vec<(String, Tensor)>,
    /// The outer optimiser's velocity, where workers exchange weights.
    outer: Option<Vec<(String, Tensor)>>,
    state: State,
}

impl Snapshot {
    /// Adapters, which are small, are written to `dir` at once. A student with adapters has its merged folder only
    /// where it is `whole`.
    pub fn of(trainer: &mut Trainer, dir: &Path, whole: bool) -> Result<Self> {
        let weights = trainer.judged(|model, _| {
            let adapted = model.lora().is_some();
            if adapted {
                model.save_adapters(&dir.join("adapter")).map_err(llama)?;
            }
            (!adapted || whole).then(|| model.copied().map_err(llama)).transpose()
        })?;
        let copies = |named: &[(String, Tensor)]| -> Result<Vec<(String, Tensor)>> {
            let copy = |(name, tensor): &(String, Tensor)| Ok((name.clone(), copy_of(tensor)?));
            let copies: Result<_, TchError> = tch::no_grad(|| named.iter().map(copy).collect());
            copies.map_err(torch("cannot copy the optimiser's state"))
        };
        Ok(Self {
            weights,
            optimizer: copies(&trainer.optimizer.state())?,
            outer: trainer.outer.as_ref().map(|outer| copies(outer.state())).transpose()?,
            state: State {
                schema_version: SCHEMA_VERSION,
                progress: trainer.progress,
                updates: trainer.optimizer.step(),
                dtype: dtype(trainer.model.kind()).to_owned(),
                rounds: trainer.outer.as_ref().map(|outer| outer.rounds.clone()),
            },
        })
    }

    /// Writes everything that [`load`] or [`load_adapted`] needs. `teacher` lends tokenizer and chat template.
    pub fn write(&self, teacher: &Path, dir: &Path) -> Result<()> {
        if let Some(weights) = &self.weights {
            let model = dir.join("model");
            export_text(weights.config(), teacher, &model)?;
            weights.save(&model).map_err(llama)?;
        }
        let folder = dir.join("state");
        fs::create_dir_all(&folder).map_err(|error| Error::io(&folder, error))?;
        let json = serde_json::to_vec_pretty(&self.state).map_err(|error| Error::internal(error.to_string()))?;
        let path = dir.join(STATE);
        fs::write(&path, json).map_err(|error| Error::io(&path, error))?;
        let write = |tensors: &[(String, Tensor)], name: &str| {
            write_tensors(&dir.join(name), tensors, Kind::Float).map_err(llama)
        };
        write(&self.optimizer, OPTIMIZER)?;
        self.outer.iter().try_for_each(|outer| write(outer, OUTER))
    }
}

/// The trainer that [`Snapshot::write`] wrote, on `device`. The checkpoint must have been computed in `kind`, and the
/// folder's bytes be those of its manifest: `checkpoint-corrupt` only where they cannot be a trainer's all the same,
/// `checkpoint-mismatch` where they are another build's or another spec's, `checkpoint-unreadable` where this machine
/// is at fault.
pub fn load(dir: &Path, options: Options, device: Device, kind: Kind) -> Result<Trainer> {
    let state = read_state(dir, kind)?;
    let model = Model::load(&dir.join("model"), device, kind).map_err(of_model)?;
    restore(dir, &state, Trainer::new(model, options)?)
}

/// As [`load`], of a student with adapters: `base` is the Hugging Face folder that it began with, in the same `kind`,
/// `lora` and `seed` what its adapters were made with.
pub fn load_adapted(
    dir: &Path,
    base: &Path,
    (lora, seed): (&Lora, u64),
    options: Options,
    device: Device,
    kind: Kind,
) -> Result<Trainer> {
    let state = read_state(dir, kind)?;
    let model = Model::load_adapted(base, (device, kind), lora, seed).map_err(of_model)?;
    model.load_adapters(&dir.join("adapter")).map_err(of_model)?;
    restore(dir, &state, Trainer::new(model, options)?)
}

/// Whoever knows the checkpoint's key says it: the folder is gone by the time that somebody reads this.
fn unfit(code: Code, what: &str, why: impl std::fmt::Display) -> Error {
    Error::new(code, format!("{what} of the checkpoint: {why}"))
}

fn of_model(error: retort_llama::Error) -> Error {
    let error = llama(error);
    let code = match error.code {
        Code::WeightsTruncated => Code::CheckpointCorrupt,
        Code::ModelMalformed | Code::ModelUnsupported => Code::CheckpointMismatch,
        Code::FileNotFound | Code::FileUnreadable | Code::Internal => Code::CheckpointUnreadable,
        other => other,
    };
    unfit(code, "the weights", error)
}

fn read_state(dir: &Path, kind: Kind) -> Result<State> {
    let refused = |code, why: String| unfit(code, STATE, why);
    let unreadable = |error: io::Error| refused(Code::CheckpointUnreadable, error.to_string());
    let corrupt = |why| refused(Code::CheckpointCorrupt, why);
    let path = dir.join(STATE);
    let size = fs::metadata(&path).map_err(unreadable)?.len();
    if size > MAX_STATE_BYTES {
        return Err(corrupt(format!("{size} bytes are more than it may have")));
    }
    let json = fs::read(&path).map_err(unreadable)?;
    let json: serde_json::Value = serde_json::from_slice(&json).map_err(|error| corrupt(error.to_string()))?;
    match json.get("schema_version").and_then(serde_json::Value::as_u64) {
        Some(version) if version == u64::from(SCHEMA_VERSION) => {}
        Some(version) => {
            let why = format!("schema version {version}, this build reads {SCHEMA_VERSION}");
            return Err(refused(Code::CheckpointMismatch, why));
        }
        None => return Err(corrupt("it has no schema version".to_owned())),
    }
    let state: State =
        serde_json::from_value(json).map_err(|error| refused(Code::CheckpointMismatch, error.to_string()))?;
    if state.dtype != dtype(kind) {
        return Err(Error::new(
            Code::DeviceUnavailable,
            format!(
                "the run was begun in {} and this worker computes in {}; start a student with --dtype {} to go on with it",
                state.dtype,
                dtype(kind),
                state.dtype
            ),
        ));
    }
    Ok(state)
}

fn restore(dir: &Path, state: &State, mut trainer: Trainer) -> Result<Trainer> {
    let mismatch = |name: &str, why: String| unfit(Code::CheckpointMismatch, name, why);
    let moments = read_tensors(dir, OPTIMIZER)?;
    trainer.optimizer.restore(state.updates, &moments).map_err(|why| mismatch(OPTIMIZER, why))?;
    if let Some(outer) = &mut trainer.outer {
        let velocity = read_tensors(dir, OUTER)?;
        let rounds = state.rounds.clone().unwrap_or_default();
        outer.restore(rounds, &velocity, &trainer.optimizer.masters()).map_err(|why| mismatch(OUTER, why))?;
    }
    trainer.progress = state.progress;
    Ok(trainer)
}

fn read_tensors(dir: &Path, name: &str) -> Result<Vec<(String, Tensor)>> {
    Tensor::read_safetensors(dir.join(name)).map_err(|error| {
        let code = match &error {
            // tch does not export the type of `err`.
            TchError::SafeTensorError { err, .. } if !format!("{err:?}").starts_with("IoError") => {
                Code::CheckpointCorrupt
            }
            _ => Code::CheckpointUnreadable,
        };
        unfit(code, name, first_line(&error))
    })
}

pub(crate) fn dtype(kind: Kind) -> &'static str {
    match kind {
        Kind::BFloat16 => "bf16",
        _ => "f32",
    }
}
