//! A conversation with a model in the terminal, for trying a teacher or a promoted student.

use std::{
    io::{BufRead as _, IsTerminal as _, Write as _},
    ops::ControlFlow,
    path::Path,
};

use retort_core::{Code, Error, Result};
use retort_llama::{ChatMessage, GenerateOptions, Model, TextStream, Tokenizer};
use retort_process::remark;
use tch::{Device, Kind};

use crate::torch::model as llama;

#[derive(Clone, Debug)]
pub struct Options {
    pub max_new_tokens: u32,
    /// 0 is greedy.
    pub temperature: f64,
    /// Nucleus mass in (0, 1].
    pub top_p: f64,
    pub seed: u64,
    /// Opens the conversation.
    pub system: Option<String>,
}

/// Answers `prompt` on standard output; without one, talks until the input ends or says `/exit`.
///
/// Answers stream as they are written. What is not an answer goes to standard error.
pub fn run(dir: &Path, device: Device, kind: Kind, prompt: Option<String>, options: Options) -> Result<()> {
    if !dir.join("config.json").is_file() {
        return Err(Error::new(
            Code::FileNotFound,
            format!("{}: no model folder, there is no config.json in it; name a Hugging Face folder", dir.display()),
        ));
    }
    let tokenizer = Tokenizer::from_dir(dir).map_err(llama)?;
    let model = Model::load(dir, device, kind).map_err(llama)?;
    model.set_trainable(false);
    let mut chat = Chat { model: &model, tokenizer: &tokenizer, options: &options, messages: Vec::new() };
    if let Some(system) = &options.system {
        chat.say("system", system.clone());
    }
    if let Some(prompt) = prompt {
        chat.answer(prompt)?;
        return Ok(());
    }
    let people = std::io::stdin().is_terminal();
    if people {
        eprintln!("Talking with {}; /exit or Ctrl-D ends.", dir.display());
    }
    loop {
        if people {
            eprint!("> ");
        }
        let mut line = String::new();
        let read = std::io::stdin().lock().read_line(&mut line).map_err(|error| Error::io("standard input", error))?;
        let said = line.trim();
        if read == 0 || said == "/exit" {
            return Ok(());
        }
        if said.is_empty() {
            continue;
        }
        match chat.answer(said.to_owned()) {
            // The conversation has outgrown the context: say so, and let the person start again.
            Err(error) if error.code == Code::PromptTooLong && people => {
                remark(format_args!("error[{}]: {error}", error.code));
            }
            other => other?,
        }
    }
}

/// `--temperature`, as a spec bounds it.
pub fn temperature(text: &str) -> Result<f64, String> {
    number(text, 0.0, 10.0)
}

/// `--top-p`, as a spec bounds it.
pub fn top_p(text: &str) -> Result<f64, String> {
    number(text, 1e-6, 1.0)
}

fn number(text: &str, min: f64, max: f64) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "it must be a number".to_owned())?;
    if (min..=max).contains(&value) { Ok(value) } else { Err(format!("it must lie between {min} and {max}")) }
}

struct Chat<'a> {
    model: &'a Model,
    tokenizer: &'a Tokenizer,
    options: &'a Options,
    messages: Vec<ChatMessage>,
}

impl Chat<'_> {
    fn say(&mut self, role: &str, content: String) {
        self.messages.push(ChatMessage { role: role.to_owned(), content });
    }

    fn answer(&mut self, prompt: String) -> Result<()> {
        self.say("user", prompt);
        let ids = self.tokenizer.encode_chat(&self.messages, true).map_err(llama)?;
        let how = GenerateOptions {
            max_new_tokens: self.options.max_new_tokens as usize,
            temperature: self.options.temperature as f32,
            top_p: self.options.top_p as f32,
            // Each turn has its own draws; the same conversation has the same answers.
            seed: self.options.seed.wrapping_add(self.messages.len() as u64),
            stop_ids: self.model.config().eos_token_ids.clone(),
        };
        let mut stream = TextStream::new(self.tokenizer);
        let mut answer = String::new();
        let mut failed = Ok(());
        let mut tell = |token| {
            failed = stream.push(token).map_err(llama).and_then(|text| print(&text, &mut answer));
            if failed.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        };
        retort_llama::generate(self.model, &ids, &how, &mut tell).map_err(llama)?;
        failed?;
        print(&stream.finish().map_err(llama)?, &mut answer)?;
        print("\n", &mut String::new())?;
        self.say("assistant", answer);
        Ok(())
    }
}

fn print(text: &str, answer: &mut String) -> Result<()> {
    answer.push_str(text);
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|error| Error::io("standard output", error))
}
