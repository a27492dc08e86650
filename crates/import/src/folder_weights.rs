//! Where the weights of a Hugging Face folder lie: one file or several with an index, every tensor
//! checked against the configuration before a byte of it is read.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use retort_core::{Code, Error, Result};
use retort_model::Config;
use serde_json::Value;

use crate::folder::{CONFIG, parse, read_text};
use crate::layout::Layout;
use crate::stored::{self, Stored};
use crate::weights::{Dtype, Entry};

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Every tensor that a folder's configuration asks for, and no other.
#[derive(Debug)]
pub struct FolderWeights {
    pub(crate) layout: Layout,
    /// In the order of the layers.
    pub tensors: Vec<LocatedTensor>,
}

/// A tensor and where its bytes are.
#[derive(Debug)]
pub struct LocatedTensor {
    pub entry: Entry,
    path: PathBuf,
    /// From the start of the file, in bytes.
    offset: u64,
}

impl FolderWeights {
    /// Reads the headers of the folder's weight files.
    ///
    /// # Errors
    /// `FileNotFound` without weights, `WeightsTruncated`, `ModelMalformed` naming the tensor that is missing or of
    /// another shape, `ModelUnsupported` for one of a type that is not read or that no such model has.
    pub fn open(source: &Path, config: &Config) -> Result<Self> {
        Self::locate(source, config, &files(source)?)
    }

    /// Of these files in the folder `source`.
    pub(crate) fn locate(source: &Path, config: &Config, files: &BTreeMap<String, Vec<Stored>>) -> Result<Self> {
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
            tensors.push(LocatedTensor { entry, path: source.join(file), offset: stored.offset });
        }
        // Buffers that older versions saved, and a tied head saved twice, follow from the rest.
        let derived = |name: &str| name.ends_with("rotary_emb.inv_freq") || (layout.tied && name == "lm_head.weight");
        if let Some(name) = held.keys().find(|name| !derived(name)) {
            return Err(Error::new(
                Code::ModelUnsupported,
                format!(
                    "{}: tensor \"{name}\" is none of a {}'s; leaving it out would change the model",
                    source.display(),
                    layout.architecture.class_name()
                ),
            ));
        }
        Ok(Self { layout, tensors })
    }
}

impl LocatedTensor {
    /// Fills `bytes` from `from` bytes into the tensor on.
    pub fn read_at(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        let failed = |error| Error::io(&self.path, error);
        File::open(&self.path).map_err(failed)?.read_exact_at(bytes, self.offset + from).map_err(failed)
    }
}

/// Weight files with the tensors they hold.
pub(crate) fn files(source: &Path) -> Result<BTreeMap<String, Vec<Stored>>> {
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
