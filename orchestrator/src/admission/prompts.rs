//! How long the prompts are, in the teacher's tokens.

use retort_artifact::prompts::{Row, Split, line_of};
use retort_core::{
    Code, Error, Result,
    spec::{JobSpec, TeacherMode},
};
use retort_model::Tokenizer;

use super::PromptFile;
use crate::planner::RowCounts;

/// Counts rows and tokens. `prompt-too-long` when a row cannot fit into `positions`,
/// `prompt-set-too-small` when none weighs anything in training.
///
/// The chat template's own tokens are left to the teacher, who knows the template: this refuses
/// what cannot fit however short the template is.
pub fn measure(
    spec: &JobSpec,
    file: &PromptFile,
    rows: &[Row],
    tokenizer: Result<&Tokenizer>,
    positions: u64,
) -> Result<RowCounts> {
    let scored = spec.teacher.mode == TeacherMode::Score;
    // As students read weights: f32, and what is too small for it is 0.
    let weighty = |weight: f64| weight as f32 >= f32::MIN_POSITIVE;
    let weighs = |row: &Row| {
        let any = match &row.pieces[..] {
            pieces if scored && !pieces.is_empty() => pieces.iter().any(|piece| weighty(row.weight * piece.weight)),
            _ => weighty(row.weight),
        };
        row.split != Some(Split::HeldOut) && any
    };
    if !rows.iter().any(weighs) {
        let message = format!("{}: no training row has a weight above 0, so nothing would be trained", file.name);
        return Err(Error::new(Code::PromptSetTooSmall, message));
    }
    let tokenizer = tokenizer?;
    let max_new_tokens = u64::from(spec.teacher.sampling.max_new_tokens);
    let mut counts = RowCounts::default();
    for (index, row) in rows.iter().enumerate() {
        let prompt = row.messages.iter().map(|message| tokens(tokenizer, &message.content)).sum::<Result<u64>>()?;
        let given = row.completion.as_deref().filter(|_| scored);
        let given = given.map(|text| tokenizer.encode(text, false).map(|ids| (text, ids))).transpose()?;
        let target = given.as_ref().map_or(max_new_tokens, |(_, ids)| (ids.len() as u64).saturating_add(1));
        if prompt.saturating_add(target) > positions {
            return Err(too_long(spec, file, index, prompt, target, positions));
        }
        // Reading tokens back costs more than counting them: only of what is no longer than a model reads.
        if let Some((text, ids)) = given
            && !row.pieces.is_empty()
            && tokenizer.starts_in(&ids, text)?.is_none()
        {
            return Err(changed(file, index));
        }
        counts.prompt_tokens += prompt;
        match row.split {
            Some(Split::HeldOut) => {
                counts.held_out += 1;
                counts.held_out_target_tokens += target;
            }
            _ => {
                counts.train += 1;
                counts.longest_row = counts.longest_row.max(prompt.saturating_add(target));
                counts.train_target_tokens += target.saturating_mul(spec.teacher.completions().into());
            }
        }
    }
    Ok(counts)
}

fn tokens(tokenizer: &Tokenizer, text: &str) -> Result<u64> {
    Ok(tokenizer.encode(text, false)?.len() as u64)
}

fn changed(file: &PromptFile, index: usize) -> Error {
    let line = line_of(&file.text, index);
    let message = format!(
        "{} line {line}: the teacher's tokenizer changes the text of \"completion\", so that its pieces cannot be told apart; \
         give it as one text, or without what is changed, such as letters that Unicode can compose",
        file.name
    );
    Error::new(Code::PromptMalformed, message)
}

fn too_long(spec: &JobSpec, file: &PromptFile, index: usize, prompt: u64, target: u64, positions: u64) -> Error {
    let line = line_of(&file.text, index);
    let (what, way_out) = match spec.teacher.mode {
        TeacherMode::Generate => ("max_new_tokens", "shorten the prompt or lower teacher.sampling.max_new_tokens"),
        TeacherMode::Score => ("its completion's", "shorten the prompt or its completion"),
    };
    Error::new(
        Code::PromptTooLong,
        format!(
            "{} line {line}: the prompt has {prompt} tokens; with {what} {target} it exceeds the model's context of {positions}: {way_out}",
            file.name
        ),
    )
}
