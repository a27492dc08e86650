//! retort's side: the product's engine, encoder and store, from token ids to an object that was flushed.

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use retort_artifact::{
    Store, paths,
    soft_targets::{Header, Limits, SCHEMA_VERSION, Sequence, TailLogprobs, decode, encode},
};
use retort_core::spec::{Codec, SoftTargets};
use retort_teacher::{
    capture::Capture,
    engine::{Capabilities, Engine as _, Generation, Text, native::Loaded},
    sampling::Sampler,
    stage::Arithmetic,
};
use serde_json::{Value, json};
use tch::Device;

use crate::{
    Failure,
    answering::Done,
    stages::{Kept, Stages},
    work::Request,
};

/// Samples of the tail beside the head.
const DRAWS: u32 = 16;
const SEED: u64 = 1;

pub struct Teacher {
    models: Loaded,
    runtime: tokio::runtime::Runtime,
    store: Store,
    shards: u32,
    /// Looked at with each piece of work.
    endless: tempfile::TempDir,
    /// Where the layers are spread over processes.
    _group: Option<Kept>,
}

impl Teacher {
    /// `stages` is how many processes its layers are spread over; the threads are divided among them.
    pub fn load(model: &Path, dtype: &str, threads: usize, stages: usize, store: &Path) -> Result<Self, Failure> {
        let endless = endless(model)?;
        let (mut models, group) = match stages {
            1 => {
                tch::set_num_threads(i32::try_from(threads)?);
                let kind = retort_llama::dtype_from_flag(dtype, Device::Cpu)?;
                (Loaded::new(Arithmetic::on(Device::Cpu, kind, Some(threads))), None)
            }
            _ => {
                let Stages { models, group } = Stages::start(stages, dtype, threads)?;
                (models, Some(group))
            }
        };
        models.get(endless.path())?;
        Ok(Self {
            models,
            runtime: tokio::runtime::Builder::new_current_thread().enable_all().build()?,
            store: Store::open(&store.display().to_string())?,
            shards: 0,
            endless,
            _group: group,
        })
    }

    pub fn work(&mut self, request: &Request) -> Result<Done, Failure> {
        let given = request.work == "score";
        if !given && request.work != "generate" {
            return Err(format!("{:?} is no work of a teacher", request.work).into());
        }
        let texts: Vec<Text> = (0u64..).zip(&request.token_ids).map(|(row, ids)| text(row, ids, given)).collect();
        let codec = Codec::HeadDraws { head: request.head, draws: DRAWS };
        let capture = Capture { codec, temperatures: vec![], seed: SEED };
        let engine = self.models.get(self.endless.path())?;
        let header = header(engine.capabilities(), codec, &request.work, self.shards);
        let key = paths::shard(&header.job, self.shards, 1);
        self.shards += 1;

        let started = Instant::now();
        let sequences = if given {
            engine.score(&texts, &capture, &mut |_| Ok(()))?
        } else {
            let sampler = Sampler::new(0.0, 1.0, SEED);
            let order = Generation {
                sampler,
                max_new_tokens: u32::try_from(request.new_tokens)?,
                completions: 1,
                stop: vec![],
            };
            engine.generate(&texts, &order, &capture, &mut |_| Ok(()))?
        };
        let computed = started.elapsed().as_secs_f64();
        let encoded = encode(&header, &sequences)?;
        let put = started.elapsed().as_secs_f64();
        self.runtime.block_on(self.store.put_new(&key, encoded.bytes.clone()))?;
        let seconds = started.elapsed().as_secs_f64();

        // Beyond the clock: that it is there, and whole.
        let asked = (request.token_ids.len() * request.new_tokens) as u64;
        let asked = if given { request.token_ids.iter().map(|ids| ids.len() as u64 - 1).sum() } else { asked };
        self.check(&key, &sequences, asked)?;
        self.runtime.block_on(self.store.delete(&key))?;
        let detail = json!({
            "engine_s": computed, "encode_s": put - computed, "store_s": seconds - put, "bytes": encoded.bytes.len(),
            "head_mass": encoded.fidelity.head_mass, "mean_abs_error": encoded.fidelity.mean_abs_error,
        });
        Ok(Done { tokens: encoded.target_tokens, seconds, detail })
    }

    fn check(&self, key: &str, sequences: &[Sequence], asked: u64) -> Result<(), Failure> {
        let bytes = self.runtime.block_on(self.store.get(key, u64::MAX))?;
        let shard = decode(bytes, Limits::default())?;
        let same = shard.sequences.iter().zip(sequences).all(|(stored, told)| stored.token_ids == told.token_ids);
        if shard.target_tokens() != asked || shard.sequences.len() != sequences.len() || !same {
            return Err(format!("the shard holds {} targets, {asked} were asked for", shard.target_tokens()).into());
        }
        Ok(())
    }
}

fn header(able: &Capabilities, codec: Codec, mode: &str, shard: u32) -> Header {
    Header {
        schema_version: SCHEMA_VERSION,
        job: "0".repeat(32),
        shard,
        epoch: 1,
        work_sha256: "0".repeat(64),
        split: "train".to_owned(),
        engine: able.engine.to_owned(),
        engine_version: able.engine_version.to_owned(),
        dtype: able.dtype.to_owned(),
        teacher_sha256: able.teacher_sha256.clone(),
        tokenizer_sha256: able.tokenizer_sha256.clone(),
        chat_template_sha256: able.chat_template_sha256.clone(),
        vocab_size: able.vocab_size,
        soft_targets: SoftTargets::of(codec),
        tail_logprobs: TailLogprobs::Mean(0.0),
        seed: SEED,
        prompt_set_sha256: "0".repeat(64),
        mode: mode.to_owned(),
        sampling_json: "{}".to_owned(),
    }
}

fn text(row: u64, ids: &[u32], given: bool) -> Text {
    Text {
        row,
        row_id: row.to_string(),
        tags: vec![],
        token_ids: ids.to_vec(),
        // The first token of a given text has nothing before it that could predict it.
        prompt_tokens: if given { 1 } else { ids.len() },
    }
}

/// The model with an end token that it never writes, so that no stream ends early: links to its files, and
/// configs that name the last id of the vocabulary.
fn endless(model: &Path) -> Result<tempfile::TempDir, Failure> {
    let folder = tempfile::tempdir()?;
    let model = model.canonicalize()?;
    let config: Value = read(&model.join("config.json"))?;
    let last = config["vocab_size"].as_u64().ok_or("config.json has no vocab_size")?.saturating_sub(1);
    for entry in std::fs::read_dir(&model)? {
        let source = entry?.path();
        let target: PathBuf = source.file_name().map(|name| folder.path().join(name)).ok_or("a file has no name")?;
        if source.ends_with("config.json") || source.ends_with("generation_config.json") {
            let mut config: Value = read(&source)?;
            config["eos_token_id"] = last.into();
            std::fs::write(target, config.to_string())?;
        } else {
            std::os::unix::fs::symlink(source, target)?;
        }
    }
    Ok(folder)
}

fn read(path: &Path) -> Result<Value, Failure> {
    Ok(serde_json::from_slice(&std::fs::read(path)?)?)
}
