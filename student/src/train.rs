//! The attempt at `{job}/train`: from the newest checkpoint, or the initial weights, to the last step.

mod initial;
mod keep;
mod pace;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use retort_artifact::{checkpoint, paths, sha256_hex};
use retort_core::{
    Code, Error, Result, pruning::Pruning, spec::JobSpec, state::Split, task_group::TaskGroup, wire::pruning_to_proto,
};
use retort_proto::{TrainFinished, TrainProgress, TrainTask, worker_event::What};
use retort_worker::{Attempt, ModelThread, TaskContext};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use self::pace::Pace;
use crate::{
    checkpoints::Uploader,
    curve::Curve,
    data::{Consumed, Order, TrainingData},
    example::Example,
    held_out::HeldOutSample,
    init::{self, Teacher},
    parallel::{diloco, sync::Lead},
    resume,
    settings::Settings,
    shards::ShardStream,
    trainer::{Options, Progress, StepReport, Trainer},
    weights::RowWeights,
    workspace::Workspace,
};

/// Steps whose rows are read ahead of the step being computed.
const READ_AHEAD: usize = 2;
/// Between two progress events.
const REPORT_EVERY: Duration = Duration::from_secs(1);
/// Name in a manifest's extra fields of the weights before training.
const INITIAL_KEY: &str = "initial_key";
/// Name in a manifest's extra fields of the shards read so far.
const SHARDS: &str = "shards";
/// Name in a manifest's extra fields of what was kept of the teacher.
const PRUNING: &str = "pruning";

/// Trains, writes checkpoints, and emits `TrainFinished`.
pub async fn run(attempt: &Attempt, task: &TrainTask, cx: &TaskContext, settings: &Settings) -> Result<()> {
    let order = Order::new(attempt.spec.seed, task.rows, attempt.spec.train.batch_rows);
    let steps = order.steps(attempt.spec.train.passes)?;
    if steps != task.steps {
        return Err(Error::internal(format!(
            "the plan has {} optimiser steps and {} rows in {} passes make {steps}",
            task.steps, task.rows, attempt.spec.train.passes
        )));
    }
    let options = Options::of(&attempt.spec.train, steps, settings);
    let mut run = Run::start(attempt, cx, settings, options).await?;
    let trained = match attempt.spec.train.diloco() {
        Some(parallel) => diloco::lead(&mut run, order, parallel.inner_steps).await,
        None => run.train(order).await,
    };
    if let Some(lead) = run.lead.take() {
        lead.close(trained.is_ok()).await;
    }
    trained?;
    run.finish().await
}

/// Time of this attempt that was spent otherwise than in steps.
#[derive(Clone, Copy, Debug, Default)]
struct Spent {
    /// Waiting for rows: for the teacher, and for what reads them.
    rows: Duration,
    /// Copying what a checkpoint holds.
    copying: Duration,
    /// Waiting with a checkpoint until the one before was stored.
    storing: Duration,
    judging: Duration,
}

/// Rows of one step, and the shards that were read for them.
struct StepRows {
    examples: Vec<Example>,
    shards: Vec<Consumed>,
}

/// One attempt under way.
pub(crate) struct Run<'a> {
    pub(crate) attempt: &'a Attempt,
    pub(crate) cx: &'a TaskContext,
    pub(crate) settings: &'a Settings,
    pub(crate) steps: u32,
    pub(crate) spec_sha256: String,
    teacher: Arc<Teacher>,
    // Before the workspace: nothing may write there while it is removed.
    pub(crate) uploader: Uploader,
    pub(crate) thread: ModelThread<Option<Trainer>>,
    /// Of the workers that train along, each step; `None` where this one trains alone.
    lead: Option<Lead>,
    pub(crate) workspace: Arc<Workspace>,
    held_out: HeldOutSample,
    pub(crate) progress: Progress,
    spent: Spent,
    pub(crate) initial_key: String,
    /// Prefix of the newest checkpoint; empty before the first.
    checkpoint_key: String,
    shards: Vec<Consumed>,
    /// What was kept of the teacher, where the student was cut out of it.
    pruning: Option<Pruning>,
    curve: Curve,
}

impl<'a> Run<'a> {
    /// With a trainer at the newest checkpoint, or at step 0.
    async fn start(
        attempt: &'a Attempt,
        cx: &'a TaskContext,
        settings: &'a Settings,
        options: Options,
    ) -> Result<Self> {
        let teacher = init::open_teacher(&attempt.spec.teacher.model).await?;
        let job = attempt.job.as_str().to_owned();
        let workspace = Arc::new(Workspace::create(&settings.work_dir, attempt).await?);
        let folder = workspace.path().to_owned();
        let stream = ShardStream::new(cx.clone(), attempt.clone(), Split::HeldOut, Teacher::clone(&teacher), folder);
        let mut run = Self {
            attempt,
            cx,
            settings,
            steps: options.steps,
            spec_sha256: spec_sha256(&attempt.spec)?,
            uploader: Uploader::new(cx.clone(), job, attempt.spec.train.keep),
            thread: ModelThread::spawn("trainer", || None)?,
            lead: None,
            workspace,
            held_out: HeldOutSample::new(stream, teacher.vocab_size),
            teacher,
            progress: Progress::default(),
            spent: Spent::default(),
            initial_key: String::new(),
            checkpoint_key: String::new(),
            shards: Vec::new(),
            pruning: None,
            curve: Curve::default(),
        };
        let resumed = run.resume(&options).await?;
        let store = &run.cx.store;
        checkpoint::sweep_superseded(store, run.attempt.job.as_str(), attempt.epoch, &run.initial_key).await?;
        if !resumed {
            run.begin(options).await?;
        }
        run.lead = Lead::open(attempt, cx, settings, &run.thread, &run.initial_key, &run.spec_sha256).await?;
        Ok(run)
    }

    /// Goes on from the newest checkpoint that is sound; false if there is none. One whose bytes are damaged is
    /// deleted; any other that cannot be used ends the attempt and stays.
    async fn resume(&mut self, options: &Options) -> Result<bool> {
        let store = &self.cx.store;
        while let Some((prefix, manifest)) = checkpoint::latest(store, self.attempt.job.as_str()).await? {
            if !manifest.job.is_empty() && manifest.job != self.attempt.job.as_str() {
                let message = format!(
                    "the checkpoint {prefix} is of the job {:.100?}; it stays: move it out of this job's folder",
                    manifest.job
                );
                return Err(Error::new(Code::CheckpointMismatch, message));
            }
            if manifest.spec_sha256 != self.spec_sha256 || manifest.step > self.steps {
                return Err(Error::new(
                    Code::CheckpointMismatch,
                    format!(
                        "the checkpoint {prefix} is at step {} of a spec with SHA-256 {:.64}, and this job has {} steps and \
                         the spec {}; it stays: go on with the version of retort that wrote it",
                        manifest.step, manifest.spec_sha256, self.steps, self.spec_sha256
                    ),
                ));
            }
            self.pruning = manifest.extra.get(PRUNING).and_then(|pruning| serde_json::from_value(pruning.clone()).ok());
            self.initial_key = self.sound_initial(&manifest).await?;
            let folder = self.workspace.path().join("resume");
            let loaded = match self.fetch(&prefix, &folder).await {
                Ok(()) => {
                    let of = |error: Error| Error::new(error.code, format!("{prefix}: {}", error.chain()));
                    self.load(folder, options.clone()).await.map_err(of)
                }
                Err(error) => Err(error),
            };
            let progress = match loaded {
                Err(error) if error.code == Code::CheckpointCorrupt => {
                    tracing::warn!(key = prefix, code = %error.code, "going back to an older checkpoint: {}", error.chain());
                    store.delete(&paths::manifest(&prefix)).await?;
                    store.delete_prefix(&prefix).await?;
                    continue;
                }
                other => other?,
            };
            self.checkpoint_key = prefix;
            self.curve = Curve::of(&manifest);
            self.progress = progress;
            tracing::info!(step = progress.step, steps = self.steps, "resumed");
            return Ok(true);
        }
        Ok(false)
    }

    /// A checkpoint's files, and below `base/` the weights before training where it holds adapters alone.
    async fn fetch(&self, prefix: &str, folder: &Path) -> Result<()> {
        let store = &self.cx.store;
        if self.attempt.spec.student.lora.is_some() {
            checkpoint::fetch_below(store, &self.initial_key, "model/", &folder.join("base")).await?;
        }
        checkpoint::fetch(store, prefix, folder).await.map(drop)
    }

    async fn load(&self, folder: PathBuf, options: Options) -> Result<Progress> {
        let (device, kind) = (self.settings.device, self.settings.kind);
        let (lora, seed) = (self.attempt.spec.student.lora.clone(), self.attempt.spec.seed);
        let load = move |slot: &mut Option<Trainer>| -> Result<Progress> {
            // The one before must make room first.
            *slot = None;
            let trainer = match &lora {
                Some(lora) => {
                    let base = folder.join("base").join("model");
                    resume::load_adapted(&folder, &base, (lora, seed), options, device, kind)?
                }
                None => resume::load(&folder, options, device, kind)?,
            };
            trainer.say_sizes();
            std::fs::remove_dir_all(&folder).map_err(|error| Error::io(&folder, error))?;
            Ok(slot.insert(trainer).progress())
        };
        self.thread.call(load).await?
    }

    pub(crate) async fn training_data(&self, order: Order) -> Result<TrainingData> {
        let prompts = self.cx.prompt_set(self.attempt).await?;
        let (cx, teacher, folder) = (self.cx.clone(), Teacher::clone(&self.teacher), self.workspace.path());
        let stream = ShardStream::new(cx, self.attempt.clone(), Split::Train, teacher, folder.to_owned());
        let temperature = self.attempt.spec.loss_temperature();
        let weights = RowWeights::new(prompts, self.attempt.spec.teacher.mode, &self.teacher);
        TrainingData::new(stream, order, self.teacher.vocab_size, temperature, weights, folder)
    }

    /// Every step that is left.
    async fn train(&mut self, order: Order) -> Result<()> {
        let first = self.progress.step;
        let first_pass = order.steps_per_pass();
        let (send, mut rows) = mpsc::channel(READ_AHEAD);
        let data = self.training_data(order).await?;
        // Dropped with this call, and with it the task.
        let mut loader = TaskGroup::new(CancellationToken::new());
        loader.spawn("loader", load_rows(data, first..self.steps, send));
        let mut reported: Option<Instant> = None;
        let mut pace = Pace::default();
        for step in first..self.steps {
            let waits = Instant::now();
            let next = rows.recv().await;
            let waited = waits.elapsed();
            self.spent.rows += waited;
            let Some(StepRows { examples, shards }) = next else {
                // Its error says why; a cancelled attempt says so itself.
                self.cx.check()?;
                let ended = loader.join().await;
                if matches!(&ended, Err(error) if error.code == Code::AttemptYielded) {
                    self.keep_progress().await?;
                }
                ended?;
                return Err(Error::internal(format!("the rows ended before step {step}")));
            };
            self.shards.extend(shards);
            let beside_checkpoint = self.uploader.is_busy();
            let report = self.step(examples, u64::from(step) >= first_pass).await?;
            let rate = pace.after(report.tokens, report.seconds);
            tracing::debug!(
                step = report.step,
                seconds = report.seconds,
                waited_for_rows_s = waited.as_secs_f64(),
                beside_checkpoint,
                "stepped"
            );
            let every = self.attempt.spec.train.checkpoint_steps;
            let last = report.step == self.steps;
            let mut held_out = None;
            if last || (every > 0 && report.step % every == 0) {
                held_out = self.write_checkpoint().await?;
            }
            let held_out_kl = held_out.map(|held_out| held_out.kl);
            if last || held_out_kl.is_some() || reported.is_none_or(|at| at.elapsed() >= REPORT_EVERY) {
                reported = Some(Instant::now());
                tracing::info!(
                    step = report.step,
                    steps = self.steps,
                    loss = self.progress.loss,
                    gradient_norm = report.gradient_norm,
                    learning_rate = report.learning_rate,
                    tokens_per_second = rate as u64,
                    workers = self.lead.as_ref().map_or(1, Lead::workers),
                    held_out_kl,
                    held_out_top1 = held_out.map(|held_out| held_out.top1_agreement),
                    held_out_calibration_error = held_out.map(|held_out| held_out.calibration_error),
                    "trained"
                );
                self.cx.emit_lossy(self.progress_event(held_out_kl, rate)).await;
            }
        }
        Ok(())
    }

    async fn step(&mut self, examples: Vec<Example>, teacher_done: bool) -> Result<StepReport> {
        let cx = self.cx.clone();
        let threads = self.settings.threads;
        if let Some(lead) = &mut self.lead {
            let enter = move || threads.enter(teacher_done);
            let (report, progress) = lead.step(&self.thread, examples, teacher_done, enter).await?;
            self.progress = progress;
            return Ok(report);
        }
        let step = move |slot: &mut Option<Trainer>| -> Result<(StepReport, Progress)> {
            threads.enter(teacher_done);
            let trainer = slot.as_mut().ok_or_else(no_trainer)?;
            let report = trainer.step(&examples, &|| cx.check())?;
            Ok((report, trainer.progress()))
        };
        let (report, progress) = self.thread.call(step).await??;
        self.progress = progress;
        Ok(report)
    }

    /// After steps that others took part in: a checkpoint where one is due since `before` steps were done.
    pub(crate) async fn after_steps(&mut self, before: u32, rate: f64, shards: &[Consumed]) -> Result<()> {
        self.shards = shards.to_vec();
        let (step, every) = (self.progress.step, self.attempt.spec.train.checkpoint_steps);
        let mut held_out = None;
        if step == self.steps || (every > 0 && step / every > before / every) {
            held_out = self.write_checkpoint().await?;
        }
        self.cx.emit_lossy(self.progress_event(held_out.map(|held_out| held_out.kl), rate)).await;
        Ok(())
    }

    /// What a step of this worker says while `workers` take steps at the same time.
    pub(crate) fn step_event(&self, report: &StepReport, workers: f64) -> What {
        What::TrainProgress(TrainProgress {
            step: report.step,
            loss: report.loss.unwrap_or(self.progress.loss),
            tokens_per_second: workers * report.tokens as f64 / report.seconds.max(1e-9),
            processed_tokens: self.progress.processed_tokens,
            held_out_kl: None,
        })
    }

    async fn finish(mut self) -> Result<()> {
        let began = Instant::now();
        self.uploader.finish().await?;
        let checkpoint_key = self.chosen().await?;
        let Spent { rows, copying, storing, judging } = self.spent;
        tracing::info!(
            computing_s = self.progress.seconds,
            waiting_for_rows_s = rows.as_secs_f64(),
            copying_checkpoints_s = copying.as_secs_f64(),
            waiting_for_checkpoints_s = storing.as_secs_f64(),
            last_checkpoint_s = began.elapsed().as_secs_f64(),
            judging_s = judging.as_secs_f64(),
            "trained to the end"
        );
        let Progress { step, processed_tokens, target_tokens, seconds, loss, workers, left_out, .. } = self.progress;
        let trainable = |slot: &mut Option<Trainer>| slot.as_ref().map(Trainer::trainable);
        let trained_parameters = self.thread.call(trainable).await?.ok_or_else(no_trainer)?;
        let finished = TrainFinished {
            steps: step,
            checkpoint_key,
            initial_key: self.initial_key,
            processed_tokens,
            target_tokens,
            trained_parameters,
            workers: workers.max(1),
            left_out_steps: left_out,
            seconds,
            tokens_per_second: processed_tokens as f64 / seconds.max(1e-9),
            final_loss: loss,
            pruning: self.pruning.as_ref().map(pruning_to_proto),
            curve: self.curve.to_proto(),
        };
        self.cx.emit(What::TrainFinished(finished)).await
    }

    fn progress_event(&self, held_out_kl: Option<f64>, tokens_per_second: f64) -> What {
        What::TrainProgress(TrainProgress {
            step: self.progress.step,
            loss: self.progress.loss,
            tokens_per_second,
            processed_tokens: self.progress.processed_tokens,
            held_out_kl,
        })
    }
}

/// Of a job's spec in canonical form.
pub(crate) fn spec_sha256(spec: &JobSpec) -> Result<String> {
    Ok(sha256_hex(&serde_json::to_vec(spec).map_err(|error| Error::internal(error.to_string()))?))
}

/// Reads the rows of each step until nobody wants them any more.
async fn load_rows(mut data: TrainingData, steps: std::ops::Range<u32>, send: mpsc::Sender<StepRows>) -> Result<()> {
    let mut known = 0;
    for step in steps {
        let examples = data.rows_of(step).await?;
        let shards = data.consumed()[known..].to_vec();
        known = data.consumed().len();
        if send.send(StepRows { examples, shards }).await.is_err() {
            break;
        }
    }
    Ok(())
}

pub(crate) fn no_trainer() -> Error {
    Error::internal("the trainer was lost when its thread failed; the attempt must start again")
}
