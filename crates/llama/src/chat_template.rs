//! A model's own chat template (Jinja), rendered as transformers renders it.

use std::path::Path;

use minijinja::{
    Environment, ErrorKind, Value,
    syntax::SyntaxConfig,
    value::{Kwargs, ValueKind},
};
use time::OffsetDateTime;

use crate::{Error, Result};

mod python;
#[cfg(test)]
mod tests;

/// Steps a template may take; a real one takes a few hundred a message.
const FUEL: u64 = 20_000_000;
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
    source: String,
    environment: Environment<'static>,
    special_tokens: Vec<(String, String)>,
}

impl ChatTemplate {
    /// Compiles a template. `special_tokens` are pairs such as `("bos_token", "<s>")`.
    ///
    /// `now` is what `strftime_now` tells; `None` is the present, in UTC. A template that prints
    /// the date makes prompts differ from day to day, so work that must repeat exactly pins it.
    pub fn compile(source: &str, special_tokens: Vec<(String, String)>, now: Option<OffsetDateTime>) -> Result<Self> {
        let mut environment = environment(now)?;
        environment.add_template_owned(NAME, without_generation_tags(source)).map_err(template_error)?;
        Ok(Self { source: source.to_owned(), environment, special_tokens })
    }

    /// The template's text as the model's author wrote it.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The prompt's text. With `add_generation_prompt` it ends where the assistant is to begin.
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
        let template = self.environment.get_template(NAME).map_err(template_error)?;
        template.render(Value::from_pairs(context)).map_err(template_error)
    }
}

/// A template's text from `chat_template.jinja`, or from `tokenizer_config.json` where it is a
/// string or a list of named ones, of which the one named `default` counts.
pub(crate) fn find_source(dir: &Path, tokenizer_config: &serde_json::Value) -> Result<Option<String>> {
    let path = dir.join("chat_template.jinja");
    if path.exists() {
        let text = std::fs::read(&path).map_err(|error| Error::io(&path, error))?;
        let text = String::from_utf8(text).map_err(|_| Error::malformed(path.display(), "is not UTF-8"))?;
        return Ok(Some(text));
    }
    let wrong = || {
        Error::malformed(
            dir.join("tokenizer_config.json").display(),
            "\"chat_template\" must be a string, or a list of {name, template} with one named \"default\"",
        )
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

/// Sets what transformers sets: whitespace rules, Python's methods, and its three extras.
fn environment(now: Option<OffsetDateTime>) -> Result<Environment<'static>> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(template_error)?;
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
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", move |format: String| -> Result<String, minijinja::Error> {
        let now = now.unwrap_or_else(OffsetDateTime::now_utc);
        python::strftime(now, &format).map_err(|message| minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_filter("tojson", |value: &Value, options: Kwargs| -> Result<Value, minijinja::Error> {
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

/// `raise_exception`'s words alone, or what minijinja found and at which line.
fn template_error(error: minijinja::Error) -> Error {
    let text = match (error.kind(), error.detail(), error.line()) {
        (ErrorKind::InvalidOperation, Some(detail), _) => detail.to_owned(),
        (kind, Some(detail), Some(line)) => format!("{kind}: {detail} (line {line})"),
        (kind, None, Some(line)) => format!("{kind} (line {line})"),
        _ => error.to_string(),
    };
    Error::Template(text)
}
