//! A Hugging Face folder, checked against its own configuration and brought into one
//! `model.safetensors`, with the tokenizer files beside it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use retort_core::{Code, Error, Result};
use retort_model::{Config, Tokenizer};
use serde_json::Value;

use crate::layout::Layout;
use crate::stage::{self, Found, IMPORTER, Receipt, Stage};
use crate::stored::{self, Stored};
use crate::weights::{self, Dtype, Entry, Sink};
use crate::{Format, Imported, Phase, Progress, digest};

const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
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
    let files = weight_files(source)?;
    let model = plan(source, &config, &files)?;

    let source_sha256 = hash(source, &texts, &files, progress)?;
    let format = Format::HuggingFace { weight_files: files.len() as u32 };
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
        tensor.copy(source, &mut sink)?;
    }
    let (file, sha256, bytes) = sink.finish()?;
    stage.record(WEIGHTS, file, bytes, sha256)?;
    Ok(Imported::new(out, format, stage.publish(facts)?, false))
}

struct Model {
    layout: Layout,
    tensors: Vec<Tensor>,
}

struct Tensor {
    entry: Entry,
    /// Weight file, beside `config.json`.
    file: String,
    offset: u64,
}

impl Tensor {
    fn copy<W: std::io::Write>(&self, source: &Path, sink: &mut Sink<'_, W>) -> Result<()> {
        let path = source.join(&self.file);
        let file = File::open(&path).map_err(|error| Error::io(&path, error))?;
        let mut chunk = Vec::new();
        let mut done = 0;
        while done < self.entry.bytes {
            chunk.resize((self.entry.bytes - done).min(CHUNK) as usize, 0);
            file.read_exact_at(&mut chunk, self.offset + done).map_err(|error| Error::io(&path, error))?;
            sink.put(&self.entry, &chunk)?;
            done += chunk.len() as u64;
        }
        Ok(())
    }
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

/// Weight files with the tensors they hold.
fn weight_files(source: &Path) -> Result<BTreeMap<String, Vec<Stored>>> {
    if source.join(WEIGHTS).is_file() {
        return Ok(BTreeMap::from([(WEIGHTS.to_owned(), stored::read(&source.join(WEIGHTS))?)]));
    }
    let path = source.join(INDEX);
    if !path.is_file() {
        let way_out =
            if source.join("pytorch_model.bin").is_file() || source.join("pytorch_model.bin.index.json").is_file() {
                "; the weights are pickled, save them with safe_serialization first"
            } else {
                ""
            };
        return Err(Error::new(
            Code::FileNotFound,
            format!("{}: neither {WEIGHTS} nor {INDEX} is there{way_out}", source.display()),
        ));
    }
    let index = parse(&path, &read_text(&path)?)?;
    let malformed = |what: String| Error::new(Code::ModelMalformed, format!("{}: {what}", path.display()));
    let map = index
        .get("weight_map")
        .and_then(Value::as_object)
        .ok_or_else(|| malformed("\"weight_map\" must be an object".to_owned()))?;
    let mut names = BTreeMap::<String, BTreeSet<&str>>::new();
    for (tensor, file) in map {
        let file = file.as_str().ok_or_else(|| malformed(format!("\"{tensor}\" must name a file")))?;
        if !is_plain(file) {
            return Err(malformed(format!("\"{tensor}\" lies in \"{file}\", which is no file of this folder")));
        }
        names.entry(file.to_owned()).or_default().insert(tensor);
    }
    let mut files = BTreeMap::new();
    for (file, tensors) in names {
        let held = stored::read(&source.join(&file))?;
        if let Some(missing) = tensors.iter().find(|tensor| !held.iter().any(|stored| stored.name == **tensor)) {
            return Err(malformed(format!("\"{missing}\" is not in {file}, where the index puts it")));
        }
        files.insert(file, held);
    }
    Ok(files)
}

/// A name that stays inside the folder.
fn is_plain(file: &str) -> bool {
    let mut parts = Path::new(file).components();
    matches!((parts.next(), parts.next()), (Some(std::path::Component::Normal(name)), None) if name == file)
}

/// Every tensor that the configuration asks for, where it lies, in the order it is written.
fn plan(source: &Path, config: &Config, files: &BTreeMap<String, Vec<Stored>>) -> Result<Model> {
    let layout = Layout::from_config(config, &source.join(CONFIG).display().to_string())?;
    let malformed = |what: String| Error::new(Code::ModelMalformed, format!("{}: {what}", source.display()));

    let mut held = BTreeMap::<&str, (&str, &Stored)>::new();
    for (file, tensors) in files {
        for stored in tensors {
            if let Some((other, _)) = held.insert(&stored.name, (file, stored)) {
                return Err(malformed(format!("tensor \"{}\" is in {other} and in {file}", stored.name)));
            }
        }
    }
    let mut tensors = Vec::new();
    for expected in layout.tensors() {
        let Some((file, stored)) = held.remove(expected.name.as_str()) else {
            return Err(malformed(format!("tensor \"{}\" is missing", expected.name)));
        };
        let Some(dtype) = Dtype::parse(&stored.dtype) else {
            return Err(Error::new(
                Code::ModelUnsupported,
                format!("{file}: tensor \"{}\" is {}; retort reads F32, F16 and BF16", expected.name, stored.dtype),
            ));
        };
        if stored.shape != expected.shape {
            return Err(malformed(format!(
                "tensor \"{}\" has shape {:?}, but {CONFIG} asks for {:?}",
                expected.name, stored.shape, expected.shape
            )));
        }
        let entry = Entry::new(expected.name, dtype, expected.shape)?;
        if entry.bytes != stored.bytes {
            return Err(malformed(format!(
                "tensor \"{}\" needs {} bytes, but has {}",
                entry.name, entry.bytes, stored.bytes
            )));
        }
        tensors.push(Tensor { entry, file: file.to_owned(), offset: stored.offset });
    }
    // Buffers that older versions saved, and a tied head saved twice, follow from the rest.
    let derived = |name: &str| name.ends_with("rotary_emb.inv_freq") || (layout.tied && name == "lm_head.weight");
    if let Some(name) = held.keys().find(|name| !derived(name)) {
        return Err(Error::new(
            Code::ModelUnsupported,
            format!(
                "{}: tensor \"{name}\" is none of a {}'s; importing without it would change the model",
                source.display(),
                layout.architecture.class_name()
            ),
        ));
    }
    weights::order(&mut tensors, |tensor: &Tensor| tensor.entry.dtype);
    Ok(Model { layout, tensors })
}

fn hash(
    source: &Path,
    texts: &BTreeMap<String, Vec<u8>>,
    files: &BTreeMap<String, Vec<Stored>>,
    progress: &mut dyn FnMut(Progress),
) -> Result<String> {
    let mut total = 0;
    let mut paths = Vec::new();
    for name in texts.keys().chain(files.keys()) {
        let path = source.join(name);
        total += path.metadata().map_err(|error| Error::io(&path, error))?.len();
        paths.push((name.as_str(), path));
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
    let file = File::open(path).map_err(|error| Error::io(path, error))?;
    let mut text = Vec::new();
    file.take(TEXT_LIMIT + 1).read_to_end(&mut text).map_err(|error| Error::io(path, error))?;
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
