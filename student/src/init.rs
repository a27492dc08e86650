//! Where a student's weights come from before training, and whether they fit the teacher.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use retort_core::{
    Code, Error, Result,
    pruning::Pruning,
    random::{Counter, Purpose},
    spec::{Init, JobSpec},
};
use retort_llama::{Config, Model, Tokenizer};
use tch::{Device, Kind};
use url::Url;

use crate::{failure::llama, prune};

/// What the student must share with its teacher.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Teacher {
    pub folder: PathBuf,
    /// Rows of the embedding.
    pub vocab_size: u32,
    pub tokenizer_sha256: String,
}

impl Teacher {
    /// Reads the folder that the spec names as a path or `file://` URL; no weights.
    pub fn open(model: &str) -> Result<Self> {
        let folder = folder(model)?;
        let config = Config::from_dir(&folder).map_err(llama)?;
        let tokenizer = Tokenizer::from_dir(&folder).map_err(llama)?;
        let vocab_size = u32::try_from(config.vocab_size)
            .map_err(|_| Error::new(Code::ModelMalformed, format!("vocab_size is {}", config.vocab_size)))?;
        Ok(Self { tokenizer_sha256: tokenizer.tokenizer_sha256(), folder, vocab_size })
    }
}

/// [`Teacher::open`] away from the async threads: a large tokenizer takes a second to read.
pub(crate) async fn open_teacher(model: &str) -> Result<Arc<Teacher>> {
    let model = model.to_owned();
    let opened = tokio::task::spawn_blocking(move || Teacher::open(&model)).await;
    opened.map_err(|error| Error::internal(format!("reading the teacher's folder failed: {error}")))?.map(Arc::new)
}

/// The student before its first step, and what was kept of its teacher if it was cut out of it. Deterministic in
/// the spec and in `texts`, which pruning by importance reads; `check` is asked between them.
pub fn initial_model(
    spec: &JobSpec,
    teacher: &Teacher,
    texts: &[Vec<u32>],
    (device, kind): (Device, Kind),
    check: &dyn Fn() -> Result<()>,
) -> Result<(Model, Option<Pruning>)> {
    let model = match &spec.student.init {
        Init::Prune(prune) => {
            // What cannot be is said before weights are read.
            Config::from_dir(&teacher.folder).map_err(llama)?.pruned(prune)?;
            let whole = Model::load(&teacher.folder, device, kind).map_err(llama)?;
            let (model, pruning) = prune::prune(&whole, prune, texts, check)?;
            return Ok((model, Some(pruning)));
        }
        Init::Checkpoint { model } => from_checkpoint(teacher, &folder(model)?, device, kind)?,
        Init::Config {
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
        } => {
            let heads = i64::from(*num_attention_heads);
            let config = Config {
                hidden_size: (*hidden_size).into(),
                intermediate_size: (*intermediate_size).into(),
                num_hidden_layers: (*num_hidden_layers).into(),
                num_attention_heads: heads,
                num_key_value_heads: (*num_key_value_heads).into(),
                head_dim: i64::from(*hidden_size) / heads.max(1),
                ..Config::from_dir(&teacher.folder).map_err(llama)?
            };
            let seed = Counter::new(spec.seed, Purpose::Init, 0, 0).next_u64();
            Model::init(config, device, kind, seed).map_err(llama)?
        }
    };
    Ok((model, None))
}

/// The folder behind a path or `file://` URL.
pub(crate) fn folder(model: &str) -> Result<PathBuf> {
    if !model.starts_with("file:") {
        return Ok(PathBuf::from(model));
    }
    Url::parse(model).ok().and_then(|url| url.to_file_path().ok()).ok_or_else(|| {
        Error::new(Code::SpecInvalid, format!("{model:?} is no file URL of this machine; write file:///path/to/folder"))
    })
}

fn from_checkpoint(teacher: &Teacher, folder: &Path, device: Device, kind: Kind) -> Result<Model> {
    let config = Config::from_dir(folder).map_err(llama)?;
    if config.vocab_size != i64::from(teacher.vocab_size) {
        return Err(Error::new(
            Code::VocabularyMismatch,
            format!(
                "the student in {} has a vocabulary of {} and the teacher in {} one of {}; \
                 soft targets need the same vocabulary on both sides",
                folder.display(),
                config.vocab_size,
                teacher.folder.display(),
                teacher.vocab_size
            ),
        ));
    }
    if folder.join("tokenizer.json").exists() {
        let found = Tokenizer::from_dir(folder).map_err(llama)?.tokenizer_sha256();
        if found != teacher.tokenizer_sha256 {
            return Err(tokenizer_mismatch(&format!("the student in {}", folder.display()), &found, teacher));
        }
    }
    Model::load(folder, device, kind).map_err(llama)
}

pub(crate) fn tokenizer_mismatch(who: &str, found: &str, teacher: &Teacher) -> Error {
    Error::new(
        Code::TokenizerMismatch,
        format!(
            "{who} has the tokenizer {found} and the teacher in {} has {}; \
             equal ids would mean different tokens, so use one tokenizer on both sides",
            teacher.folder.display(),
            teacher.tokenizer_sha256
        ),
    )
}

#[cfg(test)]
pub(crate) mod tests;
