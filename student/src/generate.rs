//! `retort-student generate`: greedy answers of a folder, to hold against another implementation's.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
};

use clap::Args;
use retort_artifact::prompts::{self, Row};
use retort_core::{Code, Error, Result};
use retort_llama::{ChatMessage, Model, Tokenizer, greedy};
use serde::Serialize;

use crate::{
    failure::llama,
    settings::{Settings, Threads},
};

/// Largest prompt file, bytes.
const MAX_PROMPTS_BYTES: u64 = 64 << 20;

#[derive(Clone, Debug, Args)]
pub struct Options {
    /// A Hugging Face folder
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// JSONL in OpenAI messages form
    #[arg(long, value_name = "FILE")]
    pub prompts: PathBuf,
    /// Longest answer, tokens
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub max_new_tokens: usize,
    /// One JSON object a prompt: id, prompt_token_ids, token_ids, text
    #[arg(long)]
    pub json: bool,
    /// auto, cpu or cuda:N
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// auto, f32 or bf16
    #[arg(long, default_value = "auto")]
    pub dtype: String,
}

/// One prompt and what the model made of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Answer {
    pub id: String,
    pub prompt_token_ids: Vec<u32>,
    /// Without the token that ended it.
    pub token_ids: Vec<u32>,
    pub text: String,
}

/// Prints an answer a prompt on standard output, as they come.
pub fn run(options: &Options) -> Result<()> {
    let settings = Settings::new(&options.device, &options.dtype, std::env::temp_dir(), Threads::default())?;
    let rows = read_prompts(&options.prompts)?;
    let tokenizer = Tokenizer::from_dir(&options.model).map_err(llama)?;
    let model = Model::load(&options.model, settings.device, settings.kind).map_err(llama)?;
    for row in rows {
        let answer = answer(&model, &tokenizer, &row, options.max_new_tokens)?;
        let line = if options.json {
            serde_json::to_string(&answer).map_err(|error| Error::internal(error.to_string()))?
        } else {
            format!("{}\n{}\n", answer.id, answer.text)
        };
        let mut out = std::io::stdout().lock();
        writeln!(out, "{line}").and_then(|()| out.flush()).map_err(|error| Error::io("standard output", error))?;
    }
    Ok(())
}

fn answer(model: &Model, tokenizer: &Tokenizer, row: &Row, max_new_tokens: usize) -> Result<Answer> {
    let messages: Vec<ChatMessage> =
        row.messages.iter().map(|message| ChatMessage::new(message.role.as_str(), message.content.as_str())).collect();
    let in_row = |error: Error| Error::new(error.code, format!("prompt {:?}: {}", row.id, error.message));
    let prompt_token_ids = tokenizer.encode_chat(&messages, true).map_err(in_row)?;
    let token_ids = greedy(model, &prompt_token_ids, max_new_tokens).map_err(llama).map_err(in_row)?;
    let text = tokenizer.decode(&token_ids, true).map_err(in_row)?;
    Ok(Answer { id: row.id.clone(), prompt_token_ids, token_ids, text })
}

fn read_prompts(path: &Path) -> Result<Vec<Row>> {
    let size = std::fs::metadata(path).map_err(|error| Error::io(path, error))?.len();
    if size > MAX_PROMPTS_BYTES {
        return Err(Error::new(
            Code::RequestInvalid,
            format!("{}: {size} bytes are more than the {MAX_PROMPTS_BYTES} read here; cut the file", path.display()),
        ));
    }
    let text = std::fs::read(path).map_err(|error| Error::io(path, error))?;
    prompts::parse(&path.display().to_string(), &text)
}
