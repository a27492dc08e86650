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
    if !rows.iter().any(|row| row.split != Some(Split::HeldOut) && row.weight > 0.0) {
        let message = format!("{}: no training row has a weight above 0, so nothing would be trained", file.name);
        return Err(Error::new(Code::PromptSetTooSmall, message));
    }
    let tokenizer = tokenizer?;
    let max_new_tokens = u64::from(spec.teacher.sampling.max_new_tokens);
    let mut counts = RowCounts::default();
    for (index, row) in rows.iter().enumerate() {
        let prompt = row.messages.iter().map(|message| tokens(tokenizer, &message.content)).sum::<Result<u64>>()?;
        let target = match (spec.teacher.mode, &row.completion) {
            (TeacherMode::Score, Some(completion)) => tokens(tokenizer, completion)?.saturating_add(1),
            _ => max_new_tokens,
        };
        if prompt.saturating_add(target) > positions {
            return Err(too_long(spec, file, index, prompt, target, positions));
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
