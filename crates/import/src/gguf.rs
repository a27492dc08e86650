//! A GGUF file into a Hugging Face folder: weights dequantised, `config.json` rebuilt from the
//! metadata, and the embedded tokenizer written as an equal `tokenizer.json`.

mod config;
mod metadata;
mod names;
mod pre_tokenizer;
mod quant;
mod reader;
mod rotary;
mod sentencepiece;
mod tensors;
mod tokenizer;
mod vocabulary;

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use retort_core::{Error, Result};
use retort_model::{Config, Tokenizer};
use serde_json::Value;

use crate::stage::{self, Found, IMPORTER, Receipt, Stage};
use crate::weights::{self, Entry, Sink};
use crate::{Format, Imported, Phase, Progress, digest};
use reader::Gguf;
use vocabulary::Vocabulary;

pub use names::{ROPE_FREQS, interleaves_rotary, tensor_name};
pub use pre_tokenizer::PreTokenizer;
pub use quant::Kind;
pub use rotary::interleave_halves;
pub use sentencepiece::merges as sentencepiece_merges;
pub use tokenizer::SPACE;
pub use vocabulary::{Token, TokenKind};

const WEIGHTS: &str = "model.safetensors";

pub(crate) fn import(source: &Path, out: &Path, progress: &mut dyn FnMut(Progress)) -> Result<Imported> {
    let place = source.display().to_string();
    let file = File::open(source).map_err(|error| Error::io(source, error))?;
    let length = file.metadata().map_err(|error| Error::io(source, error))?.len();
    let gguf = Gguf::read(BufReader::new(&file), length, &place)?;

    let vocabulary = Vocabulary::read(&gguf.metadata)?;
    let layout = config::layout(&gguf, vocabulary.tokens.len() as u64)?;
    let scaling = config::rope_scaling(&gguf, &file, source, &layout)?;
    let plan = tensors::plan(&gguf, &layout)?;
    let dtype = tensors::main_dtype(&plan);
    let config = config::config(&gguf.metadata, &layout, &vocabulary, scaling, dtype)?;
    let generation = config::generation_config(&vocabulary);
    let tokenizer = tokenizer::tokenizer(&vocabulary, &gguf.metadata)?;
    let tokenizer_config = tokenizer::tokenizer_config(&vocabulary, &gguf.metadata)?;
    // As the workers will read them.
    let mut read = Config::from_json(&place, &config)?;
    read.add_end_tokens(&place, &generation)?;
    let parsed = Tokenizer::from_parts(&place, &tokenizer, &tokenizer_config)?;
    parsed.require_fits(read.vocab_size)?;
    parsed.probe_template()?;
    let texts = [
        ("config.json", pretty(&config)?),
        ("generation_config.json", pretty(&generation)?),
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", pretty(&tokenizer_config)?),
    ];

    let mut done = 0;
    let source_sha256 = digest::sha256_file(source, &mut |bytes| {
        done += bytes;
        progress(Progress { phase: Phase::Hashing, done, total: length.max(done) });
    })?;
    let format = Format::Gguf { version: gguf.version };
    let facts = Receipt {
        importer: IMPORTER,
        source: source.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        source_format: format.to_string(),
        source_sha256,
        architecture: layout.architecture.class_name().to_owned(),
        parameters: plan.iter().map(|tensor| tensor.entry.elements()).sum(),
        tensors: plan.len() as u64,
        files: Vec::new(),
    };
    if let Found::Same(receipt) = stage::look(out, &facts.source_sha256)? {
        return Ok(Imported::new(out, format, receipt, true));
    }

    let entries: Vec<Entry> = plan.iter().map(|tensor| tensor.entry.clone()).collect();
    let small: u64 = texts.iter().map(|(_, text)| text.len() as u64).sum();
    let mut stage = Stage::begin(out, weights::file_bytes(&entries).saturating_add(small))?;
    for (name, text) in &texts {
        stage.write(name, text)?;
    }
    let (written, path) = stage.create(WEIGHTS)?;
    let mut sink = Sink::start(written, &path, &entries, progress)?;
    for tensor in &plan {
        tensor.copy(&file, source, &mut sink)?;
    }
    let (written, sha256, bytes) = sink.finish()?;
    stage.record(WEIGHTS, written, bytes, sha256)?;
    Ok(Imported::new(out, format, stage.publish(facts)?, false))
}

fn pretty(value: &Value) -> Result<Vec<u8>> {
    let mut text = serde_json::to_vec_pretty(value)
        .map_err(|error| Error::internal(format!("a configuration cannot be written: {error}")))?;
    text.push(b'\n');
    Ok(text)
}
