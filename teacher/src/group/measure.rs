//! What a layer, the embedding and the head cost on this stage's device.
//!
//! The layers are split before they are loaded, and no stage reads another's, so what is timed is a model
//! of the same shapes with two layers of zeros: a sparse file, which takes no room on the disk. Zeros are
//! multiplied as slowly as anything else.

use std::{
    fs::File,
    io::Write as _,
    path::Path,
    time::{Duration, Instant},
};

use retort_core::{Error, Result, spec::Codec};
use retort_llama::{Config, Part, Piece as Run, Room};
use serde_json::{Map, Value, json};

use crate::{
    capture::Capture,
    stage::{
        Arithmetic, Stage,
        step::{Ask, Begin, Piece, Step},
    },
    torch::model as llama,
};

/// Positions of the step that is timed, in two texts; and those of each text that go through the head, which
/// is slow and is timed well by a few.
const TOKENS: u32 = 256;
const HEADED: u32 = 8;
/// The fastest of so many counts, since others are slowed by what else the machine does; a step that takes
/// long is timed twice, the first time being that of its pages.
const RUNS: usize = 3;
const LONG: Duration = Duration::from_millis(300);

/// Seconds for the same number of positions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Costs {
    pub(super) layer: f64,
    pub(super) embedding: f64,
    /// Norm, head and capture at every position.
    pub(super) head: f64,
}

/// Times the shapes of `model`'s config. Takes the memory of two layers, embedding and head.
pub(super) fn costs(model: &Path, arithmetic: &Arithmetic) -> Result<Costs> {
    let folder = tempfile::tempdir().map_err(|error| Error::io(std::env::temp_dir(), error))?;
    write(model, folder.path())?;
    let time = |layers, heads| {
        let part = Part { layers, embeds: true, heads };
        let mut stage = Stage::load(folder.path(), part, arithmetic)?;
        fastest(&mut stage)
    };
    let (one, two, headed) = (time(0..1, false)?, time(0..2, false)?, time(0..2, true)?);
    // Of a model so small that a layer is lost in the noise, any number will do, but not none.
    let layer = (two - one).max(two / 20.0).max(1e-9);
    let head = (headed - two).max(0.0) * f64::from(TOKENS) / f64::from(2 * HEADED);
    // A table is looked up: whatever else was timed with it is the machine's.
    Ok(Costs { layer, embedding: (one - layer).clamp(0.0, layer / 10.0), head })
}

/// A model of two layers in the shapes of `model`'s config.
fn write(model: &Path, folder: &Path) -> Result<()> {
    let source = model.join("config.json");
    let text = std::fs::read_to_string(&source).map_err(|error| Error::io(&source, error))?;
    let mut about: Map<String, Value> = serde_json::from_str(&text)
        .map_err(|error| Error::new(retort_core::Code::ModelMalformed, format!("{}: {error}", source.display())))?;
    about.insert("num_hidden_layers".into(), json!(2));
    let dtype = about.get("dtype").or_else(|| about.get("torch_dtype")).and_then(Value::as_str);
    let (dtype, size) = match dtype {
        Some("bfloat16") => ("BF16", 2),
        Some("float16") => ("F16", 2),
        _ => ("F32", 4),
    };
    let path = folder.join("config.json");
    std::fs::write(&path, Value::Object(about).to_string()).map_err(|error| Error::io(&path, error))?;
    let config = Config::from_dir(folder).map_err(llama)?;

    let mut header = Map::new();
    let mut end = 0u64;
    for (name, shape) in config.tensors() {
        let begin = end;
        end += size * shape.iter().map(|side| side.unsigned_abs()).product::<u64>();
        header.insert(name, json!({ "dtype": dtype, "shape": shape, "data_offsets": [begin, end] }));
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let path = folder.join("model.safetensors");
    let io = |error| Error::io(&path, error);
    let mut file = File::create(&path).map_err(io)?;
    file.write_all(&(header.len() as u64).to_le_bytes()).map_err(io)?;
    file.write_all(&header).map_err(io)?;
    file.set_len(8 + header.len() as u64 + end).map_err(io)
}

fn fastest(stage: &mut Stage) -> Result<f64> {
    let capture = Capture { codec: Codec::TopK { head: 64 }, temperatures: Vec::new(), seed: 0 };
    stage.begin(&Begin { capture, sampler: None, room: Room { lanes: 0, slots: 0, capacity: 0 } })?;
    let context = stage.config().max_position_embeddings.clamp(i64::from(HEADED + 1), i64::from(TOKENS / 2)) as u32;
    let run = Run { slot: None, start: 0, tokens: context };
    let pieces = vec![Piece { run, stream: 0, ask: Ask::Score { first: context - HEADED } }; 2];
    let step = Step { lane: 0, shares: Vec::new(), pieces, token_ids: vec![0; 2 * context as usize] };
    let mut best = Duration::MAX;
    for run in 0..RUNS {
        let started = Instant::now();
        stage.run(&step, None)?;
        best = best.min(started.elapsed());
        if run > 0 && best > LONG {
            break;
        }
    }
    Ok(best.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::tests::tiny;

    #[test]
    fn shapes_are_timed_without_their_weights() {
        let folder = tempfile::tempdir().unwrap();
        tiny::write(folder.path(), 3);
        std::fs::remove_file(folder.path().join("model.safetensors")).unwrap();
        let costs = costs(folder.path(), &Arithmetic::on(Device::Cpu, Kind::Float, Some(1))).unwrap();
        assert!(costs.layer > 0.0 && costs.layer < 10.0, "{costs:?}");
        assert!(costs.embedding >= 0.0 && costs.head >= 0.0, "{costs:?}");
    }
}
