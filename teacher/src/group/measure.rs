//! What a layer, the embedding and the head cost on this stage's device.
//!
//! The layers are split before they are loaded, and no stage reads another's, so what is timed is a model
//! of the same shapes with two layers of zeros: a sparse file, which takes no room on the disk. Zeros are
//! multiplied as slowly as anything else; but the logits they make are flat, which real ones never are, so
//! what is captured is made up.

use std::{
    fs::File,
    io::Write as _,
    path::Path,
    time::{Duration, Instant},
};

use retort_core::{Error, Result, spec::SoftTargets};
use retort_llama::{Config, Part, Piece as Run, Room};
use retort_model::token_flops;
use serde_json::{Map, Value, json};

use crate::{
    capture::Capture,
    stage::{
        Arithmetic, Stage,
        step::{Ask, Begin, Piece, Step},
    },
    torch::model as llama,
};

/// Positions of the step that is timed, in two texts; and those that go through the head.
const TOKENS: u32 = 256;
const HEADED: u32 = 64;
/// The fastest of so many counts, since others are slowed by what else the machine does; a step that takes
/// long is timed twice, the first time being that of its pages.
const RUNS: usize = 5;
const LONG: Duration = Duration::from_millis(500);
/// What is measured of the head, in layers, may be so many times what arithmetic says, or as small a part of
/// it; beyond that something else was timed.
const DOUBT: f64 = 2.0;

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
    let load = |layers, heads| Stage::load(folder.path(), Part { layers, embeds: true, heads }, arithmetic);
    let mut stages = [load(0..1, false)?, load(0..2, false)?];
    let headed = load(0..1, true)?;
    let logits = logits(stages[0].config().vocab_size);
    let mut best = [Duration::MAX; 3];
    let started = Instant::now();
    for run in 0..RUNS {
        // In turns: a machine that is busy for a while slows all three.
        for (stage, best) in stages.iter_mut().zip(&mut best) {
            *best = time(stage)?.min(*best);
        }
        best[2] = time_head(&headed, &logits)?.min(best[2]);
        if run > 0 && started.elapsed() > LONG * 3 {
            break;
        }
    }
    let [one, two, head] = best.map(|time| time.as_secs_f64());
    let config = stages[1].config();
    let flops = token_flops(config, f64::from(TOKENS) / 4.0);
    Ok(derive(one, two, head, flops.head / flops.layer()))
}

/// From the times of a step through one layer and two layers, and of [`HEADED`] positions through the head.
/// `ratio` is what a head costs by arithmetic, in layers.
fn derive(one: f64, two: f64, head: f64, ratio: f64) -> Costs {
    // A table is looked up, which is next to nothing: the layers have all of it.
    let layer = (two / 2.0).max(1e-9);
    let head = head * f64::from(TOKENS) / f64::from(HEADED);
    let embedding = (2.0 * one - two).clamp(0.0, layer / 10.0);
    Costs { layer, embedding, head: head.clamp(layer * ratio / DOUBT, layer * ratio * DOUBT) }
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

fn time(stage: &mut Stage) -> Result<Duration> {
    let capture = capture();
    stage.begin(&Begin { capture, sampler: None, room: Room { lanes: 0, slots: 0, capacity: 0 } })?;
    let context = stage.config().max_position_embeddings.clamp(1, i64::from(TOKENS / 2)) as u32;
    let pieces = vec![Piece { run: Run { slot: None, start: 0, tokens: context }, stream: 0, ask: Ask::Nothing }; 2];
    let step = Step { lane: 0, shares: Vec::new(), pieces, token_ids: vec![0; 2 * context as usize] };
    let started = Instant::now();
    stage.run(&step, None)?;
    Ok(started.elapsed())
}

fn time_head(stage: &Stage, logits_v: &[f32]) -> Result<Duration> {
    let started = Instant::now();
    tch::no_grad(|| stage.rehearse_head(HEADED as usize, logits_v, &capture()))?;
    Ok(started.elapsed())
}

fn capture() -> Capture {
    Capture { codec: SoftTargets::default().codec, temperatures: Vec::new(), seed: 0 }
}

/// Logits `[v]` that fall off like those of a language model: a Gumbel distribution.
fn logits(vocabulary: i64) -> Vec<f32> {
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut logit = || {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let uniform = (random >> 40) as f32 / (1 << 24) as f32;
        -2.0 * (-uniform.max(1e-7).ln()).max(1e-7).ln()
    };
    (0..vocabulary).map(|_| logit()).collect()
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
        assert!(costs.embedding >= 0.0 && costs.head > 0.0, "{costs:?}");
    }

    #[test]
    fn noise_makes_no_head_of_hundreds_of_layers_and_no_layer_of_nothing() {
        let sound = derive(0.011, 0.020, 0.012, 4.0);
        assert!((sound.layer - 0.010).abs() < 1e-9 && (sound.head - 0.048).abs() < 1e-9, "{sound:?}");
        assert!((sound.embedding - 0.001).abs() < 1e-9, "{sound:?}");
        for (one, two, head) in [(0.03, 0.02, 0.4), (0.02, 0.02, 0.0), (0.0, 0.02, 0.01)] {
            let Costs { layer, embedding, head } = derive(one, two, head, 4.0);
            assert!((2.0..=8.0).contains(&(head / layer)), "{head} {layer}");
            assert!((0.0..=0.1).contains(&(embedding / layer)), "{embedding} {layer}");
        }
    }
}
