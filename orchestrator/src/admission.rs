//! Admission: everything that can be checked before a GPU second is spent.
//!
//! Reads the prompt set, splits it, refuses leaks from held-out to training prompts, reads both
//! models' shapes, weights' headers and the tokenizer, and plans. Nothing is stored here.

mod model;
mod paths;
mod prompts;

use bytes::Bytes;
use retort_artifact::{prompts as prompt_sets, sha256_hex};
use retort_core::{
    Code, Error, Result,
    spec::{Init, JobSpec, TeacherMode},
};
use retort_model::Config;
use retort_plan::training::Student;

use self::model::Folder;
pub(crate) use self::paths::local as local_path;
use crate::{
    context::Context,
    planner::{self, Plan, PlannedTask},
};

/// A job that may be stored.
pub struct Admitted {
    /// Canonical JSONL, training rows first.
    pub prompt_set: Bytes,
    pub prompt_set_sha256: String,
    pub plan: Plan,
    pub tasks: Vec<PlannedTask>,
}

/// Checks a spec against the files it names. Here alone slips are refused, such as keys that would do nothing: a job
/// that was admitted before they were goes on, and a repeated request for it is answered.
pub async fn admit(context: &Context, spec: &JobSpec) -> Result<Admitted> {
    spec.check_idle()?;
    // One at a time: a prompt set and a tokenizer may take a gigabyte.
    let _turn = context
        .admissions
        .acquire()
        .await
        .map_err(|_| Error::new(Code::OrchestratorUnavailable, "the orchestrator is shutting down"))?;
    let file = paths::read_prompts(&context.store, &spec.prompts.path).await?;
    let spec = spec.clone();
    let checked = tokio::task::spawn_blocking(move || check(&spec, &file)).await;
    checked.map_err(|error| Error::internal(format!("checking the spec's files failed: {error}")))?
}

/// A prompt file as it was read.
pub struct PromptFile {
    /// As errors call it: its path, as the spec has it.
    pub name: String,
    pub text: Bytes,
}

/// Blocks: reads files and tokenizes.
fn check(spec: &JobSpec, file: &PromptFile) -> Result<Admitted> {
    let mut rows = prompt_sets::parse(&file.name, &file.text)?;
    if spec.teacher.mode == TeacherMode::Score {
        prompt_sets::require_completions(&file.name, &file.text, &rows)?;
    }
    prompt_sets::assign_splits(&mut rows, spec.prompts.held_out_fraction, spec.seed);
    prompt_sets::check_splits(&file.name, &rows)?;

    let teacher = Folder::open("teacher.model", &spec.teacher.model)?;
    teacher.require_weights()?;
    let (student, positions) = student(spec, &teacher)?;
    no_larger(&student, &teacher.config)?;
    if !spec.export.gguf.is_empty() {
        exportable(&student, &teacher)?;
    }
    if let Some(lora) = &spec.student.lora {
        lora.check_width(student.hidden_size.unsigned_abs())?;
    }
    let counts = prompts::measure(spec, file, &rows, teacher.tokenizer(), positions)?;
    let (mut plan, tasks) = planner::plan(
        spec,
        &counts,
        teacher.config.parameters(),
        student.parameters(),
        u32::try_from(teacher.config.vocab_size).unwrap_or(u32::MAX),
    )?;
    let (lora, train) = (spec.student.lora.as_ref(), &spec.train);
    plan.training = Some(Student { config: &student, lora, train, longest_row: counts.longest_row }.training());
    let prompt_set = Bytes::from(prompt_sets::to_jsonl(&rows));
    prompt_sets::check_stored(&file.name, &file.text, &rows, &prompt_set)?;
    Ok(Admitted { prompt_set_sha256: sha256_hex(&prompt_set), prompt_set, plan, tasks })
}

/// A student that trains takes four times its weights; one larger than its teacher is a slip of a digit
/// and would only be found out of memory, after the teacher has done its work.
fn no_larger(student: &Config, teacher: &Config) -> Result<()> {
    let (student, teacher) = (student.parameters(), teacher.parameters());
    if student <= teacher {
        return Ok(());
    }
    Err(Error::new(
        Code::SpecInvalid,
        format!(
            "student.init makes a student of {student} parameters, its teacher has {teacher}; give it fewer or smaller layers"
        ),
    ))
}

fn cuts_nothing(teacher: &Folder) -> Error {
    Error::new(
        Code::SpecInvalid,
        format!(
            "student.init.prune keeps all {} layers of the teacher at their full width, so it cuts nothing; cut more, or \
             start from the teacher as it is with checkpoint: {{model: {}}}",
            teacher.config.num_hidden_layers,
            teacher.path().display()
        ),
    )
}

/// A student gets its teacher's tokenizer: what GGUF cannot say of the two is known before any work is done.
fn exportable(student: &Config, teacher: &Folder) -> Result<()> {
    retort_export::check(student, teacher.path()).map_err(|error| {
        let message = format!("export.gguf: {}; leave the key out to do without", error.message);
        Error::new(error.code, message)
    })
}

/// The student's shape, and the positions that teacher and student both have.
fn student(spec: &JobSpec, teacher: &Folder) -> Result<(Config, u64)> {
    let positions = teacher.positions();
    match &spec.student.init {
        Init::Prune(prune) => {
            let student = teacher.config.pruned(prune)?;
            if student == teacher.config {
                return Err(cuts_nothing(teacher));
            }
            Ok((student, positions))
        }
        Init::Checkpoint { model } => {
            let student = Folder::open("student.init.checkpoint.model", model)?;
            if student.config.vocab_size != teacher.config.vocab_size {
                return Err(Error::new(
                    Code::VocabularyMismatch,
                    format!(
                        "the student {} has a vocabulary of {} tokens, the teacher {} one of {}; a student learns the teacher's distribution token by token, so both must be the same",
                        student.path().display(),
                        student.config.vocab_size,
                        teacher.path().display(),
                        teacher.config.vocab_size
                    ),
                ));
            }
            student.require_same_tokens(teacher)?;
            student.require_weights()?;
            let positions = positions.min(student.positions());
            Ok((student.config, positions))
        }
        Init::Config {
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
        } => {
            let config = Config {
                hidden_size: (*hidden_size).into(),
                intermediate_size: (*intermediate_size).into(),
                num_hidden_layers: (*num_hidden_layers).into(),
                num_attention_heads: (*num_attention_heads).into(),
                num_key_value_heads: (*num_key_value_heads).into(),
                head_dim: (hidden_size / num_attention_heads).into(),
                ..teacher.config.clone()
            };
            Ok((config, positions))
        }
    }
}

#[cfg(test)]
mod tests;
