//! A model's own chat template (Jinja), rendered as transformers renders it.

use std::{fmt, path::Path};

use minijinja::{
    Environment, ErrorKind, Value,
    syntax::SyntaxConfig,
    value::{Kwargs, ValueKind},
};
use retort_core::{Code, Error, Result};
use time::OffsetDateTime;

use crate::file::{malformed, read};

mod python;
#[cfg(test)]
mod tests;

/// Steps a template may take; a real one takes a few hundred a message.
const FUEL: u64 = 20_000_000;
/// Largest template read, bytes.
const MAX_BYTES: u64 = 1 << 22;
const NAME: &str = "chat_template";

/// One turn. Roles are what the template knows: most often `system`, `user`, `assistant`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatMessage {
    pub role: String,
    pub content: String,
}

impl ChatMessage {
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// A compiled template and the special tokens it may name.
#[derive(Debug)]
pub struct ChatTemplate {
    /// The file it stands in, for errors.
    place: String,
    source: String,
    environment: Environment<'static>,
    special_tokens: Vec<(String, String)>,
}

impl ChatTemplate {
    /// Compiles a template, whose file errors call `place`. `special_tokens` are pairs such as
    /// `("bos_token", "<s>")`. `ModelMalformed` when it is no template.
    ///
    /// `now` is what `strftime_now` tells; `None` is the present, in UTC. A template that prints
    /// the date makes prompts differ from day to day, so work that must repeat exactly pins it.
    pub fn compile(
        place: &str,
        source: &str,
        special_tokens: Vec<(String, String)>,
        now: Option<OffsetDateTime>,
    ) -> Result<Self> {
        let mut environment = environment(now).map_err(|error| fault(place, &error))?;
        environment.add_template_owned(NAME, without_generation_tags(source)).map_err(|error| fault(place, &error))?;
        Ok(Self { place: place.to_owned(), source: source.to_owned(), environment, special_tokens })
    }

    /// The same template, telling another date.
    pub fn at(&self, now: Option<OffsetDateTime>) -> Result<Self> {
        Self::compile(&self.place, &self.source, self.special_tokens.clone(), now)
    }

    /// Renders one short question: `ModelMalformed` when the template fails on it. One that
    /// refuses it in its own words may want another conversation, and is sound.
    pub fn probe(&self) -> Result<()> {
        match self.render(&[ChatMessage::new("user", "hello")], true) {
            Err(error) if error.code == Code::ModelMalformed => Err(error),
            _ => Ok(()),
        }
    }

    /// The template's text as the model's author wrote it.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The prompt's text. With `add_generation_prompt` it ends where the assistant is to begin.
    ///
    /// `PromptMalformed` when the template refuses the messages with `raise_exception`, in its own
    /// words; `ModelMalformed` when it fails otherwise.
    pub fn render(&self, messages: &[ChatMessage], add_generation_prompt: bool) -> Result<String> {
        let messages: Vec<Value> = messages
            .iter()
            .map(|message| Value::from_pairs([("role", message.role.as_str()), ("content", message.content.as_str())]))
            .collect();
        let mut context = vec![
            ("messages", Value::from(messages)),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
        ];
        context.extend(self.special_tokens.iter().map(|(name, token)| (name.as_str(), Value::from(token))));
        let rendered =
            self.environment.get_template(NAME).and_then(|template| template.render(Value::from_pairs(context)));
        rendered.map_err(|error| match refusal(&error) {
            Some(words) => Error::new(Code::PromptMalformed, format!("chat template: {words}")),
            None => fault(&self.place, &error),
        })
    }
}

/// A template's text and the file it stands in: `chat_template.jinja`, or else `tokenizer_config.json`.
pub(crate) fn find_source(dir: &Path, tokenizer_config: &serde_json::Value) -> Result<Option<(String, String)>> {
    let path = dir.join("chat_template.jinja");
    if path.exists() {
        let text = String::from_utf8(read(&path, MAX_BYTES)?).map_err(|_| malformed(path.display(), "is not UTF-8"))?;
        return Ok(Some((path.display().to_string(), text)));
    }
    let place = dir.join("tokenizer_config.json").display().to_string();
    let source = source_in(&place, tokenizer_config)?;
    Ok(source.map(|source| (place, source)))
}

/// The template in a `tokenizer_config.json`: a string, or of a list of named ones the one named
/// `default`.
pub(crate) fn source_in(place: &str, tokenizer_config: &serde_json::Value) -> Result<Option<String>> {
    let wrong = || {
        malformed(place, "\"chat_template\" must be a string, or a list of {name, template} with one named \"default\"")
    };
    match tokenizer_config.get("chat_template") {
        None | Some(serde_json::Value::Null) => Ok(None),
        Some(serde_json::Value::String(text)) => Ok(Some(text.clone())),
        Some(serde_json::Value::Array(named)) => {
            let default = named.iter().find(|entry| entry["name"] == "default").ok_or_else(wrong)?;
            Ok(Some(default["template"].as_str().ok_or_else(wrong)?.to_owned()))
        }
        Some(_) => Err(wrong()),
    }
}

/// Sets what transformers sets: whitespace rules, Python's methods, and its three extras; and a bound
/// on steps, which it does not. Memory is not bounded: a template is its author's program, and is run
/// only where the author's weights are loaded too.
fn environment(now: Option<OffsetDateTime>) -> Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
    environment.set_syntax(syntax);
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(|output, state, value| match value.kind() {
        ValueKind::None => output.write_str("None").map_err(minijinja::Error::from),
        ValueKind::Bool => {
            output.write_str(if value.is_true() { "True" } else { "False" }).map_err(minijinja::Error::from)
        }
        _ => minijinja::escape_formatter(output, state, value),
    });
    environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, "refused").with_source(Refusal(message)))
    });
    environment.add_function("strftime_now", move |format: String| -> Result<String, minijinja::Error> {
        let now = now.unwrap_or_else(OffsetDateTime::now_utc);
        python::strftime(now, &format).map_err(|message| minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_filter("tojson", |value: &Value, options: Kwargs| {
        python::json_dumps(value, &options).map(Value::from_safe_string)
    });
    Ok(environment)
}

/// Training templates mark the assistant's words with `{% generation %}`; the marks print nothing,
/// so here they become a condition that always holds.
fn without_generation_tags(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        text.push_str(before);
        let Some(end) = tag.find("%}") else { break };
        let (tag, after) = tag.split_at(end + 2);
        match tag[2..end].trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+') {
            "generation" => text.push_str(&tag.replacen("generation", "if true", 1)),
            "endgeneration" => text.push_str(&tag.replacen("endgeneration", "endif", 1)),
            _ => text.push_str(tag),
        }
        rest = after;
    }
    text.push_str(rest);
    text
}

/// What a template says with `raise_exception`.
#[derive(Debug)]
struct Refusal(String);

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refusal {}

/// The template's own words, if that is how it ended.
fn refusal(error: &minijinja::Error) -> Option<&Refusal> {
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        if let Some(refusal) = error.downcast_ref::<Refusal>() {
            return Some(refusal);
        }
        cause = error.source();
    }
    None
}

/// What minijinja found, and at which line of the template.
fn fault(place: &str, error: &minijinja::Error) -> Error {
    let what = match (error.kind(), error.detail()) {
        (ErrorKind::InvalidOperation, Some(detail)) => detail.to_owned(),
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    };
    let line = error.line().map_or(String::new(), |line| format!(" (line {line} of the template)"));
    malformed(place, format!("the chat template does not work: {what}{line}"))
}
