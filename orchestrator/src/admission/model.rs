//! A model folder, read as import and the workers read it: what is admitted can be loaded.

use std::path::{Path, PathBuf};

use retort_core::{Code, Error, Result};
use retort_model::{Config, Tokenizer, WeightFolder};

use super::paths;

/// A Hugging Face folder, without its weights.
pub struct Folder {
    path: PathBuf,
    pub config: Config,
    tokenizer: Option<Tokenizer>,
}

impl Folder {
    /// Reads the config and, where there is one, the tokenizer with its chat template. `field` is
    /// the spec's name for it.
    pub fn open(field: &str, text: &str) -> Result<Self> {
        let path = paths::local(field, text)?;
        for (found, what) in [
            (path.is_dir(), "is no folder"),
            (path.join("config.json").exists(), "is no model folder, it has no config.json"),
        ] {
            if !found {
                return Err(Error::new(
                    Code::FileNotFound,
                    format!(
                        "{field}: {} {what}; give the path of one, or, to the command line, the name of one in \
                         $RETORT_MODELS; `retort model import` makes one from a GGUF file",
                        path.display()
                    ),
                ));
            }
        }
        let config = Config::from_dir(&path)?;
        let tokenizer = if path.join("tokenizer.json").exists() { Some(tokenizer(&path, &config)?) } else { None };
        Ok(Self { path, config, tokenizer })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Tokens of context.
    pub fn positions(&self) -> u64 {
        self.config.max_position_embeddings.unsigned_abs()
    }

    /// That the weights' headers hold what the config asks for and nothing else.
    pub fn require_weights(&self) -> Result<()> {
        WeightFolder::open(&self.path)?.require_model(&self.config)
    }

    /// `file-not-found` for a teacher without one, `model-malformed` for one without a chat template: it
    /// could not read a prompt.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        let tokenizer = self.tokenizer.as_ref().ok_or_else(|| {
            Error::new(
                Code::FileNotFound,
                format!(
                    "{}: no such file; the teacher cannot read text without it",
                    self.path.join("tokenizer.json").display()
                ),
            )
        })?;
        tokenizer.require_template()?;
        Ok(tokenizer)
    }

    /// `tokenizer-mismatch` when both folders have a tokenizer and these differ in a token.
    pub fn require_same_tokens(&self, other: &Folder) -> Result<()> {
        let (Some(mine), Some(others)) = (&self.tokenizer, &other.tokenizer) else { return Ok(()) };
        let (mine, others) = (mine.vocabulary(), others.vocabulary());
        let differing =
            mine.iter().filter(|(token, id)| others.get(*token) != Some(*id)).map(|(token, id)| (*id, token)).min();
        let Some((id, token)) = differing else { return Ok(()) };
        let shown: String = token.chars().take(40).collect();
        Err(Error::new(
            Code::TokenizerMismatch,
            format!(
                "the student {} calls token {id} {shown:?}, the teacher {} does not; both need the same tokenizer",
                self.path.display(),
                other.path.display()
            ),
        ))
    }
}

fn tokenizer(path: &Path, config: &Config) -> Result<Tokenizer> {
    let tokenizer = Tokenizer::from_dir(path)?;
    tokenizer.require_fits(config.vocab_size)?;
    Ok(tokenizer)
}
