//! Rows of a prompt set to token ids, through the model's own chat template.

use retort_artifact::prompts::{Message, Role, Row};
use retort_core::{Code, Error, Result};
use retort_llama::{ChatMessage, Tokenizer};

use crate::{engine::Text, torch::model};

/// The row's messages, up to where the assistant speaks; `max_new_tokens` must fit behind them.
pub fn prompt(tokenizer: &Tokenizer, context: u32, max_new_tokens: u32, line: u64, row: &Row) -> Result<Text> {
    let (_, token_ids) = render_prompt(tokenizer, line, row)?;
    if token_ids.len() as u64 + u64::from(max_new_tokens) > u64::from(context) {
        return Err(Error::new(
            Code::PromptTooLong,
            format!(
                "row {:?} (line {} of the prompt set) has {} prompt tokens; with max_new_tokens {max_new_tokens} that is beyond the teacher's context of {context}: shorten the prompt or lower max_new_tokens",
                row.id,
                line + 1,
                token_ids.len()
            ),
        ));
    }
    Ok(text(line, row, token_ids.len(), token_ids))
}

/// The row's messages and its given completion, to the end token that closes the assistant's turn.
pub fn completed(tokenizer: &Tokenizer, end_tokens: &[u32], context: u32, line: u64, row: &Row) -> Result<Text> {
    let completion = row.completion.as_deref().filter(|text| !text.is_empty()).ok_or_else(|| {
        Error::new(
            Code::PromptMalformed,
            format!(
                "row {:?} (line {} of the prompt set) has no \"completion\" to score; add one, or set teacher.mode to generate",
                row.id,
                line + 1
            ),
        )
    })?;
    let (rendered, mut token_ids) = render_prompt(tokenizer, line, row)?;
    let prompt_tokens = token_ids.len();

    let mut messages = row.messages.clone();
    messages.push(Message { role: Role::Assistant, content: completion.to_owned() });
    let whole = tokenizer.render_chat(&chat(&messages), false).map_err(|error| at(model(error), line, row))?;
    // What the template writes behind the prompt: the completion and its end-of-turn token. Some
    // templates rewrite earlier turns once an answer follows; the completion alone is then the text.
    let written = whole.strip_prefix(&rendered).unwrap_or(completion);
    let mut target_ids = tokenizer.encode(written, false).map_err(|error| at(model(error), line, row))?;
    match target_ids.iter().rposition(|id| end_tokens.contains(id)) {
        // Behind the end token come line breaks that no teacher is asked to predict.
        Some(end) => target_ids.truncate(end + 1),
        None => target_ids.extend(end_tokens.first()),
    }
    token_ids.extend(target_ids);
    if token_ids.len() as u64 > u64::from(context) {
        return Err(Error::new(
            Code::PromptTooLong,
            format!(
                "row {:?} (line {} of the prompt set) has {} tokens with its completion, beyond the teacher's context of {context}: shorten it",
                row.id,
                line + 1,
                token_ids.len()
            ),
        ));
    }
    if !row.pieces.is_empty() {
        in_pieces(tokenizer, &token_ids[prompt_tokens..], completion).map_err(|error| at(error, line, row))?;
    }
    Ok(text(line, row, prompt_tokens, token_ids))
}

/// That the student will find each target token in the completion's pieces; to learn it there would be after all of the
/// teacher's work.
fn in_pieces(tokenizer: &Tokenizer, target_ids: &[u32], completion: &str) -> Result<()> {
    match tokenizer.starts_in(target_ids, completion).map_err(model)? {
        Some(_) => Ok(()),
        None => Err(Error::new(
            Code::PromptMalformed,
            "the teacher's chat template changes the text of \"completion\", so that its pieces cannot be told apart; give \
             it as one text, or as the template writes it",
        )),
    }
}

fn render_prompt(tokenizer: &Tokenizer, line: u64, row: &Row) -> Result<(String, Vec<u32>)> {
    let rendered = tokenizer.render_chat(&chat(&row.messages), true).map_err(|error| at(model(error), line, row))?;
    let token_ids = tokenizer.encode(&rendered, false).map_err(|error| at(model(error), line, row))?;
    if token_ids.is_empty() {
        return Err(Error::new(
            Code::PromptEmpty,
            format!("row {:?} (line {} of the prompt set) has no token once rendered", row.id, line + 1),
        ));
    }
    Ok((rendered, token_ids))
}

fn chat(messages: &[Message]) -> Vec<ChatMessage> {
    messages.iter().map(|m| ChatMessage { role: m.role.as_str().to_owned(), content: m.content.clone() }).collect()
}

fn text(line: u64, row: &Row, prompt_tokens: usize, token_ids: Vec<u32>) -> Text {
    Text { row: line, row_id: row.id.clone(), tags: row.tags.clone(), token_ids, prompt_tokens }
}

fn at(error: Error, line: u64, row: &Row) -> Error {
    Error::new(error.code, format!("row {:?} (line {} of the prompt set): {}", row.id, line + 1, error.message))
}
