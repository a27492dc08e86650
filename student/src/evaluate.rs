//! The attempt at `{job}/evaluate`: the student before and after training, judged on every held-out
//! row.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use retort_artifact::{checkpoint, prompts, soft_targets::DecodedSequence};
use retort_core::{Code, Error, Result, state::Split};
use retort_llama::{Model, Tokenizer, greedy};
use retort_proto::{EvaluateTask, EvaluationReady, Quality, Sample, worker_event::What};
use retort_worker::{Attempt, ModelThread, TaskContext};

use crate::{
    batch,
    example::Example,
    failure::llama,
    init::{self, Teacher},
    loss::ChunkedLoss,
    measure::{Tally, measure},
    prune::evenly_spaced,
    settings::Settings,
    shards::ShardStream,
    workspace::Workspace,
};

/// Most sample answers that are written, whatever the task asks for.
const MAX_SAMPLES: u32 = 32;

/// Judges, and emits `EvaluationReady`.
pub async fn run(attempt: &Attempt, task: &EvaluateTask, cx: &TaskContext, settings: &Settings) -> Result<()> {
    let teacher = init::open_teacher(&attempt.spec.teacher.model).await?;
    let judging = Judging {
        attempt,
        task,
        cx,
        settings,
        teacher,
        workspace: Workspace::create(&settings.work_dir, attempt).await?,
    };
    let before = judging.judge(&task.initial_key, "before").await?;
    let after = judging.judge(&task.checkpoint_key, "after").await?;
    let prompts = cx.prompt_set(attempt).await?;
    let samples = before.answers.into_iter().zip(after.answers).map(|(before, after)| Sample {
        prompt: question(&prompts, before.row),
        row_id: before.row_id,
        teacher: before.teacher,
        student_before: before.student,
        student_after: after.student,
    });
    let ready = EvaluationReady {
        samples: samples.collect(),
        before: Some(before.quality),
        after: Some(after.quality),
        before_by_tag: before.by_tag,
        after_by_tag: after.by_tag,
    };
    cx.emit(What::EvaluationReady(ready)).await
}

/// What is said of one set of weights.
struct Judgement {
    quality: Quality,
    by_tag: std::collections::HashMap<String, Quality>,
    answers: Vec<Answer>,
}

/// A held-out prompt, answered twice.
#[derive(Clone)]
struct Answer {
    row: u64,
    row_id: String,
    prompt_ids: Vec<u32>,
    teacher_ids: Vec<u32>,
    teacher: String,
    student: String,
}

struct Judging<'a> {
    attempt: &'a Attempt,
    task: &'a EvaluateTask,
    cx: &'a TaskContext,
    settings: &'a Settings,
    teacher: Arc<Teacher>,
    workspace: Workspace,
}

/// A model on its thread, with what measuring needs.
struct Judge {
    model: Model,
    loss: ChunkedLoss,
}

impl Judging<'_> {
    /// Of the weights at `key`; one model in memory at a time.
    async fn judge(&self, key: &str, name: &str) -> Result<Judgement> {
        let folder = self.workspace.path().join(name);
        checkpoint::fetch_below(&self.cx.store, key, "model/", &folder).await?;
        let thread = self.load(folder.join("model")).await?;

        let (cx, teacher, folder) = (self.cx.clone(), Teacher::clone(&self.teacher), self.workspace.path().to_owned());
        let mut stream = ShardStream::new(cx, self.attempt.clone(), Split::HeldOut, teacher, folder);
        let mut overall = Tally::default();
        let mut by_tag: BTreeMap<String, Tally> = BTreeMap::new();
        let mut rows = Vec::new();
        let mut shards = 0;
        while let Some(mut fetched) = stream.next().await? {
            shards += 1;
            while let Some(sequences) = fetched.next_rows().await? {
                let tags: Vec<Vec<String>> = sequences.iter().map(|sequence| sequence.tags.clone()).collect();
                rows.extend(sequences.iter().filter_map(answerable));
                let tallies = self.measure(&thread, sequences).await?;
                for (tags, tally) in tags.into_iter().zip(&tallies) {
                    overall.add(tally);
                    for tag in tags {
                        by_tag.entry(tag).or_default().add(tally);
                    }
                }
            }
        }
        if shards != self.task.shards {
            return Err(Error::internal(format!(
                "{shards} held-out shards are published, the plan has {}",
                self.task.shards
            )));
        }
        let quality = finite(overall)?;
        let count = self.task.samples.min(MAX_SAMPLES) as usize;
        let chosen = evenly_spaced(rows.len(), count.min(rows.len())).into_iter().map(|i| rows[i].clone()).collect();
        let answers = self.answer(&thread, chosen).await?;
        let by_tag = by_tag.into_iter().filter(|(_, tally)| tally.tokens > 0);
        Ok(Judgement { quality, by_tag: by_tag.map(|(tag, tally)| (tag, tally.quality())).collect(), answers })
    }

    async fn load(&self, folder: PathBuf) -> Result<ModelThread<Option<Judge>>> {
        let thread = ModelThread::spawn("judge", || None)?;
        let (device, kind, threads) = (self.settings.device, self.settings.kind, self.settings.threads);
        let load = move |slot: &mut Option<Judge>| -> Result<()> {
            threads.enter(true);
            let model = Model::load(&folder, device, kind).map_err(llama)?;
            let loss = ChunkedLoss::new(model.config().vocab_size, kind, device)?;
            *slot = Some(Judge { model, loss });
            Ok(())
        };
        thread.call(load).await??;
        Ok(thread)
    }

    async fn measure(
        &self,
        thread: &ModelThread<Option<Judge>>,
        sequences: Vec<DecodedSequence>,
    ) -> Result<Vec<Tally>> {
        let (cx, limits, vocab_size): (_, batch::Limits, _) =
            (self.cx.clone(), self.settings.limits(&self.attempt.spec.train), self.teacher.vocab_size);
        let work = move |slot: &mut Option<Judge>| -> Result<Vec<Tally>> {
            let judge = slot.as_mut().ok_or_else(no_judge)?;
            let examples = sequences
                .into_iter()
                .map(|sequence| Example::from_sequence(sequence, vocab_size, None))
                .collect::<Result<Vec<_>>>()?;
            measure(&judge.model, &mut judge.loss, &examples, limits, &|| cx.check())
        };
        thread.call(work).await?
    }

    /// Answers greedily.
    async fn answer(&self, thread: &ModelThread<Option<Judge>>, chosen: Vec<Answer>) -> Result<Vec<Answer>> {
        let (cx, teacher) = (self.cx.clone(), Arc::clone(&self.teacher));
        let max_new_tokens = self.attempt.spec.teacher.sampling.max_new_tokens as usize;
        let work = move |slot: &mut Option<Judge>| -> Result<Vec<Answer>> {
            let judge = slot.as_mut().ok_or_else(no_judge)?;
            let tokenizer = Tokenizer::from_dir(&teacher.folder).map_err(llama)?;
            let answer = |mut answer: Answer| -> Result<Answer> {
                cx.check()?;
                let ids = greedy(&judge.model, &answer.prompt_ids, max_new_tokens).map_err(llama)?;
                answer.student = tokenizer.decode(&ids, true).map_err(llama)?;
                answer.teacher = tokenizer.decode(&answer.teacher_ids, true).map_err(llama)?;
                Ok(answer)
            };
            chosen.into_iter().map(answer).collect()
        };
        thread.call(work).await?
    }
}

/// The prompt and the teacher's completion of a row; `None` if it has no completion.
fn answerable(sequence: &DecodedSequence) -> Option<Answer> {
    let start = sequence.target_mask.iter().position(|&target| target)?;
    Some(Answer {
        row: sequence.row,
        row_id: sequence.row_id.clone(),
        prompt_ids: sequence.token_ids.get(..start)?.to_vec(),
        teacher_ids: sequence.token_ids.get(start..)?.to_vec(),
        teacher: String::new(),
        student: String::new(),
    })
}

/// The last thing the user said.
fn question(prompts: &[prompts::Row], row: u64) -> String {
    let row = usize::try_from(row).ok().and_then(|row| prompts.get(row));
    row.and_then(|row| row.messages.last()).map(|message| message.content.clone()).unwrap_or_default()
}

fn finite(tally: Tally) -> Result<Quality> {
    let quality = tally.quality();
    if tally.tokens == 0 {
        return Err(Error::new(Code::PromptSetTooSmall, "no held-out prompt has a completion to judge by"));
    }
    if [quality.kl, quality.student_perplexity, quality.teacher_perplexity].iter().all(|figure| figure.is_finite()) {
        Ok(quality)
    } else {
        Err(Error::new(
            Code::LossNotFinite,
            format!(
                "the held-out KL is {} and the student's perplexity {}: training diverged; lower train.learning_rate",
                quality.kl, quality.student_perplexity
            ),
        ))
    }
}

fn no_judge() -> Error {
    Error::internal("the model was lost when its thread failed; the attempt must start again")
}
