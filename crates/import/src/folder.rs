//! A Hugging Face folder, checked against its own configuration and brought into one
//! `model.safetensors`, with the tokenizer files beside it.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use retort_core::{Code, Error, Result};
use retort_model::{Config, Tokenizer, WeightFolder, open_regular};
use serde_json::Value;

use crate::folder_weights::{FolderWeights, LocatedTensor};
use crate::stage::{self, Found, IMPORTER, Receipt, Stage};
use crate::weights::{self, Entry, Sink};
use crate::{Format, Imported, Phase, Progress, digest};

pub(crate) const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
const WEIGHTS: &str = "model.safetensors";
/// Copied byte for byte when they are there.
const KEPT: &[&str] = &[
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
];
/// For everything but the weights: the largest tokenizers have 30 MB.
const TEXT_LIMIT: u64 = 256 << 20;
const CHUNK: u64 = 4 << 20;

pub(crate) fn import(source: &Path, out: &Path, progress: &mut dyn FnMut(Progress)) -> Result<Imported> {
    let texts = texts(source)?;
    // As the workers will read them.
    let config = Config::from_dir(source)?;
    let tokenizer = Tokenizer::from_dir(source)?;
    tokenizer.require_fits(config.vocab_size)?;
    tokenizer.probe_template()?;
    let files = WeightFolder::open(source)?;
    let mut model = FolderWeights::locate(source, &config, &files)?;
    weights::order(&mut model.tensors, |tensor| tensor.entry.dtype);

    let source_sha256 = hash(source, &texts, &files, progress)?;
    let format = Format::HuggingFace { weight_files: files.files().len() as u32 };
    let facts = Receipt {
        importer: IMPORTER,
        source: source.file_name().map_or_else(|| ".".into(), |name| name.to_string_lossy().into_owned()),
        source_format: format.to_string(),
        source_sha256,
        architecture: model.layout.architecture.class_name().to_owned(),
        parameters: model.tensors.iter().map(|tensor| tensor.entry.elements()).sum(),
        tensors: model.tensors.len() as u64,
        files: Vec::new(),
    };
    if let Found::Same(receipt) = stage::look(out, &facts.source_sha256)? {
        return Ok(Imported::new(out, format, receipt, true));
    }

    let entries: Vec<Entry> = model.tensors.iter().map(|tensor| tensor.entry.clone()).collect();
    let small: u64 = texts.values().map(|text| text.len() as u64).sum();
    let mut stage = Stage::begin(out, weights::file_bytes(&entries).saturating_add(small))?;
    for (name, text) in &texts {
        stage.write(name, text)?;
    }
    let (file, path) = stage.create(WEIGHTS)?;
    let mut sink = Sink::start(file, &path, &entries, progress)?;
    for tensor in &model.tensors {
        copy(tensor, &mut sink)?;
    }
    let (file, sha256, bytes) = sink.finish()?;
    stage.record(WEIGHTS, file, bytes, sha256)?;
    Ok(Imported::new(out, format, stage.publish(facts)?, false))
}

fn copy<W: std::io::Write>(tensor: &LocatedTensor, sink: &mut Sink<'_, W>) -> Result<()> {
    let mut chunk = Vec::new();
    let mut done = 0;
    while done < tensor.entry.bytes {
        chunk.resize((tensor.entry.bytes - done).min(CHUNK) as usize, 0);
        tensor.read_at(done, &mut chunk)?;
        sink.put(&tensor.entry, &chunk)?;
        done += chunk.len() as u64;
    }
    Ok(())
}

/// `config.json`, `tokenizer.json` and the other small files, by name.
fn texts(source: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut texts = BTreeMap::new();
    for name in [CONFIG, TOKENIZER].iter().chain(KEPT) {
        let path = source.join(name);
        match path.try_exists() {
            Ok(true) => {
                let text = read_text(&path)?;
                if name.ends_with(".json") {
                    parse(&path, &text)?;
                }
                texts.insert((*name).to_owned(), text);
            }
            Ok(false) if *name == CONFIG => {
                let way_out = if holds_gguf(source) { "; to import a GGUF file, name the file itself" } else { "" };
                return Err(Error::new(
                    Code::FileNotFound,
                    format!("{}: no {CONFIG}, so this is no Hugging Face folder{way_out}", source.display()),
                ));
            }
            Ok(false) if *name == TOKENIZER => {
                return Err(Error::new(
                    Code::FileNotFound,
                    format!(
                        "{}: no {TOKENIZER}; save the tokenizer in its fast form with transformers' save_pretrained",
                        source.display()
                    ),
                ));
            }
            Ok(false) => {}
            Err(error) => return Err(Error::io(path, error)),
        }
    }
    Ok(texts)
}

fn hash(
    source: &Path,
    texts: &BTreeMap<String, Vec<u8>>,
    files: &WeightFolder,
    progress: &mut dyn FnMut(Progress),
) -> Result<String> {
    let mut total = 0;
    let mut paths = Vec::new();
    let weights = files.files().iter().filter_map(|file| file.path().file_name()?.to_str());
    for name in texts.keys().map(String::as_str).chain(weights) {
        let path = source.join(name);
        total += path.metadata().map_err(|error| Error::io(&path, error))?.len();
        paths.push((name, path));
    }
    let (mut done, mut list) = (0, Vec::new());
    for (name, path) in paths {
        let sha256 = digest::sha256_file(&path, &mut |bytes| {
            done += bytes;
            progress(Progress { phase: Phase::Hashing, done, total: total.max(done) });
        })?;
        list.push((name, sha256));
    }
    Ok(digest::sha256_list(list.iter().map(|(name, sha256)| (*name, sha256.as_str()))))
}

fn read_text(path: &Path) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    open_regular(path)?.take(TEXT_LIMIT + 1).read_to_end(&mut text).map_err(|error| Error::io(path, error))?;
    if text.len() as u64 > TEXT_LIMIT {
        return Err(Error::new(
            Code::ModelMalformed,
            format!("{}: larger than {TEXT_LIMIT} bytes, which no such file is", path.display()),
        ));
    }
    Ok(text)
}

fn parse(path: &Path, text: &[u8]) -> Result<Value> {
    serde_json::from_slice(text)
        .map_err(|error| Error::new(Code::ModelMalformed, format!("{}: not valid JSON: {error}", path.display())))
}

fn holds_gguf(source: &Path) -> bool {
    std::fs::read_dir(source).is_ok_and(|entries| {
        entries.flatten().any(|entry| entry.path().extension().is_some_and(|extension| extension == "gguf"))
    })
}
