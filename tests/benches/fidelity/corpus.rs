//! Real teacher text and the teacher's whole distribution at each of its tokens, made once and kept.

use std::{
    fs::File,
    io::Write as _,
    path::{Path, PathBuf},
};

use memmap2::Mmap;
use retort_artifact::prompts::{self, Row};
use retort_core::{spec::Codec, state::Split};
use retort_llama::Model;
use retort_teacher::{
    capture::Capture,
    engine::{Engine as _, Generation, native::Native},
    sampling::Sampler,
    stage::Arithmetic,
    text,
};
use retort_tests::teacher::smollm2;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::Failure;

const MAX_NEW_TOKENS: u32 = 40;
const SEED: u64 = 7;

/// A prompt and the teacher's answer to it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Answered {
    pub row: u64,
    pub row_id: String,
    pub token_ids: Vec<u32>,
    pub target_mask: Vec<bool>,
    pub held_out: bool,
}

impl Answered {
    pub fn targets(&self) -> usize {
        self.target_mask.iter().filter(|&&target| target).count()
    }
}

/// The rows of both splits, and log p of every token of the vocabulary at each of their targets.
pub struct Corpus {
    pub folder: PathBuf,
    pub rows: Vec<Answered>,
    pub vocab_size: usize,
    /// Of each row, its first target among all.
    starts: Vec<usize>,
    logprobs: Mmap,
}

impl Corpus {
    pub fn open(folder: &Path) -> Result<Self, Failure> {
        let rows: Vec<Answered> = serde_json::from_slice(&std::fs::read(folder.join("rows.json"))?)?;
        let mut targets = 0;
        let mut starts = Vec::new();
        for row in &rows {
            starts.push(targets);
            targets += row.targets();
        }
        let file = File::open(folder.join("logprobs.f32"))?;
        // SAFETY: nobody writes to the file once it has this name.
        let logprobs = unsafe { Mmap::map(&file)? };
        let vocab_size = logprobs.len() / 4 / targets.max(1);
        Ok(Self { folder: folder.to_owned(), rows, vocab_size, starts, logprobs })
    }

    pub fn of(&self, held_out: bool) -> impl Iterator<Item = (usize, &Answered)> {
        self.rows.iter().enumerate().filter(move |(_, row)| row.held_out == held_out)
    }

    /// Target tokens of a split.
    pub fn targets(&self, held_out: bool) -> usize {
        self.of(held_out).map(|(_, row)| row.targets()).sum()
    }

    /// Log-probabilities at the row's targets, `[n, v]` laid flat.
    pub fn logprobs(&self, index: usize) -> Vec<f32> {
        let row = 4 * self.vocab_size;
        let range = self.starts[index] * row..(self.starts[index] + self.rows[index].targets()) * row;
        self.logprobs[range].as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    }

    /// The same as a tensor `[n, v]`.
    pub fn tensor(&self, index: usize) -> Tensor {
        Tensor::from_slice(&self.logprobs(index)).view([-1, self.vocab_size as i64])
    }
}

pub fn prepare(folder: &Path) -> Result<Corpus, Failure> {
    if !folder.join("rows.json").exists() {
        let rows = answer()?;
        std::fs::write(folder.join("rows.part"), serde_json::to_vec(&rows)?)?;
        std::fs::rename(folder.join("rows.part"), folder.join("rows.json"))?;
    }
    if !folder.join("logprobs.f32").exists() {
        let rows: Vec<Answered> = serde_json::from_slice(&std::fs::read(folder.join("rows.json"))?)?;
        capture(folder, &rows)?;
    }
    Corpus::open(folder)
}

fn answer() -> Result<Vec<Answered>, Failure> {
    let mut engine = Native::load(&smollm2(), &Arithmetic::on(Device::Cpu, Kind::Float, None))?;
    let prompts = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/support/prompts.jsonl"))?;
    let rows: Vec<Row> = prompts::parse("prompts.jsonl", &prompts)?;
    let context = engine.capabilities().context;
    let texts =
        (0u64..).zip(&rows).map(|(line, row)| text::prompt(engine.tokenizer(), context, MAX_NEW_TOKENS, line, row));
    let texts = texts.collect::<Result<Vec<_>, _>>()?;
    let sampler = Sampler::new(0.7, 0.95, SEED);
    let capture = Capture { codec: Codec::TopK { head: 1 }, temperatures: vec![], seed: SEED };
    let mut answered = Vec::new();
    for (texts, rows) in texts.chunks(16).zip(rows.chunks(16)) {
        eprintln!("answering: {} of {} prompts", answered.len(), prompts.len().min(303));
        let how = Generation { sampler, max_new_tokens: MAX_NEW_TOKENS, completions: 1, stop: vec![] };
        let sequences = engine.generate(texts, &how, &capture, &mut |_| Ok(()))?;
        answered.extend(sequences.into_iter().zip(rows).map(|(sequence, row)| Answered {
            row: sequence.row,
            row_id: sequence.row_id,
            token_ids: sequence.token_ids,
            target_mask: sequence.target_mask,
            held_out: row.split == Some(Split::HeldOut),
        }));
    }
    Ok(answered)
}

fn capture(folder: &Path, rows: &[Answered]) -> Result<(), Failure> {
    let model = Model::load(&smollm2(), Device::Cpu, Kind::Float)?;
    let mut file = std::io::BufWriter::new(File::create(folder.join("logprobs.part"))?);
    for (done, row) in rows.iter().enumerate() {
        if done % 32 == 0 {
            eprintln!("scoring: {done} of {} rows", rows.len());
        }
        let logprobs_nv = tch::no_grad(|| -> Result<Tensor, Failure> {
            let ids: Vec<i64> = row.token_ids.iter().map(|&id| id.into()).collect();
            let hidden_bth = model.hidden(&Tensor::from_slice(&ids).unsqueeze(0))?;
            let at: Vec<i64> = (0..).zip(&row.target_mask).filter(|(_, target)| **target).map(|(i, _)| i - 1).collect();
            let hidden_nh = hidden_bth.get(0).index_select(0, &Tensor::from_slice(&at));
            Ok(model.head(&hidden_nh)?.log_softmax(-1, Kind::Float))
        })?;
        let values = Vec::<f32>::try_from(&logprobs_nv.flatten(0, -1))?;
        for value in values {
            file.write_all(&value.to_le_bytes())?;
        }
    }
    file.into_inner()?.sync_all()?;
    Ok(std::fs::rename(folder.join("logprobs.part"), folder.join("logprobs.f32"))?)
}
