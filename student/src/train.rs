//! The attempt at `{job}/train`: from the newest checkpoint, or the initial weights, to the last step.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use retort_artifact::{checkpoint, checkpoint::Manifest, paths, sha256_hex};
use retort_core::{Code, Error, Result, state::Split, task_group::TaskGroup};
use retort_proto::{TrainFinished, TrainProgress, TrainTask, worker_event::What};
use retort_worker::{Attempt, ModelThread, TaskContext};
use serde_json::json;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{
    checkpoints::Uploader,
    data::{Consumed, Order, TrainingData},
    example::Example,
    held_out::HeldOutSample,
    init::{self, Teacher},
    measure::{Tally, measure},
    parallel::sync::Lead,
    resume,
    settings::Settings,
    shards::ShardStream,
    trainer::{Options, Progress, StepReport, Trainer},
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

/// Trains, writes checkpoints, and emits `TrainFinished`.
pub async fn run(attempt: &Attempt, task: &TrainTask, cx: &TaskContext, settings: &Settings) -> Result<()> {
    let order = Order::new(attempt.spec.seed, task.rows, attempt.spec.train.batch_rows);
    let steps = planned_steps(&order, attempt.spec.train.passes)?;
    if steps != task.steps {
        return Err(Error::internal(format!(
            "the plan has {} optimiser steps and {} rows in {} passes make {steps}",
            task.steps, task.rows, attempt.spec.train.passes
        )));
    }
    let options = Options { train: attempt.spec.train.clone(), steps, limits: settings.limits() };
    let mut run = Run::start(attempt, cx, settings, options).await?;
    let trained = run.train(order).await;
    if let Some(lead) = run.lead.take() {
        lead.close().await;
    }
    trained?;
    run.finish().await
}

/// Optimiser steps of a whole run: every pass reads every row once, and its last step takes what is
/// left.
fn planned_steps(order: &Order, passes: u32) -> Result<u32> {
    u32::try_from(order.steps_per_pass().saturating_mul(u64::from(passes)))
        .map_err(|_| Error::new(Code::SpecInvalid, format!("{passes} passes make more steps than can be counted")))
}

/// Rows of one step, and the shards that were read for them.
struct StepRows {
    examples: Vec<Example>,
    shards: Vec<Consumed>,
}

/// One attempt under way.
struct Run<'a> {
    attempt: &'a Attempt,
    cx: &'a TaskContext,
    settings: &'a Settings,
    steps: u32,
    spec_sha256: String,
    teacher: Arc<Teacher>,
    // Before the workspace: nothing may write there while it is removed.
    uploader: Uploader,
    thread: ModelThread<Option<Trainer>>,
    /// Of the workers that train along, each step; `None` where this one trains alone.
    lead: Option<Lead>,
    workspace: Workspace,
    held_out: HeldOutSample,
    progress: Progress,
    initial_key: String,
    /// Prefix of the newest checkpoint; empty before the first.
    checkpoint_key: String,
    shards: Vec<Consumed>,
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
        let spec = serde_json::to_vec(&attempt.spec).map_err(|error| Error::internal(error.to_string()))?;
        let workspace = Workspace::create(&settings.work_dir, attempt)?;
        let folder = workspace.path().to_owned();
        let stream = ShardStream::new(cx.clone(), attempt.clone(), Split::HeldOut, Teacher::clone(&teacher), folder);
        let mut run = Self {
            attempt,
            cx,
            settings,
            steps: options.steps,
            spec_sha256: sha256_hex(&spec),
            uploader: Uploader::new(cx.clone(), job),
            thread: ModelThread::spawn("trainer", || None)?,
            lead: None,
            workspace,
            held_out: HeldOutSample::new(stream, teacher.vocab_size),
            teacher,
            progress: Progress::default(),
            initial_key: String::new(),
            checkpoint_key: String::new(),
            shards: Vec::new(),
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

    /// Goes on from the newest checkpoint that is sound; false if there is none.
    async fn resume(&mut self, options: &Options) -> Result<bool> {
        let store = &self.cx.store;
        while let Some((prefix, _)) = checkpoint::latest(store, self.attempt.job.as_str()).await? {
            let folder = self.workspace.path().join("resume");
            let fetched = match checkpoint::fetch(store, &prefix, &folder).await {
                Ok(manifest) => self.load(folder, options.clone()).await.map(|progress| (manifest, progress)),
                Err(error) => Err(error),
            };
            let (manifest, progress) = match fetched {
                Err(error) if error.code == Code::CheckpointCorrupt => {
                    tracing::warn!(key = prefix, code = %error.code, "going back to an older checkpoint: {}", error.chain());
                    store.delete(&paths::manifest(&prefix)).await?;
                    store.delete_prefix(&prefix).await?;
                    continue;
                }
                other => other?,
            };
            if manifest.spec_sha256 != self.spec_sha256 || progress.step > self.steps {
                return Err(Error::internal(format!("the checkpoint {prefix} is not of this job's spec")));
            }
            let initial = manifest.extra.get(INITIAL_KEY).and_then(|key| key.as_str());
            self.initial_key = initial.unwrap_or_default().to_owned();
            self.checkpoint_key = prefix;
            self.progress = progress;
            tracing::info!(step = progress.step, steps = self.steps, "resumed");
            return Ok(true);
        }
        Ok(false)
    }

    async fn load(&self, folder: std::path::PathBuf, options: Options) -> Result<Progress> {
        let (device, kind) = (self.settings.device, self.settings.kind);
        let load = move |slot: &mut Option<Trainer>| -> Result<Progress> {
            // The one before must make room first.
            *slot = None;
            let trainer = resume::load(&folder, options, device, kind)?;
            std::fs::remove_dir_all(&folder).map_err(|error| Error::io(&folder, error))?;
            Ok(slot.insert(trainer).progress())
        };
        self.thread.call(load).await?
    }

    /// Makes the initial weights and starts publishing them.
    async fn begin(&mut self, options: Options) -> Result<()> {
        let (device, kind) = (self.settings.device, self.settings.kind);
        let (spec, teacher) = (self.attempt.spec.clone(), Arc::clone(&self.teacher));
        let folder = self.workspace.path().join("initial");
        let target = folder.clone();
        self.initial_key = paths::initial(self.attempt.job.as_str(), self.attempt.epoch);
        let begin = move |slot: &mut Option<Trainer>| -> Result<()> {
            let trainer = Trainer::new(init::initial_model(&spec, &teacher, device, kind)?, options)?;
            resume::export(trainer.model(), &teacher.folder, &target.join("model"))?;
            *slot = Some(trainer);
            Ok(())
        };
        self.thread.call(begin).await??;
        let manifest = self.manifest();
        self.uploader.start(folder, self.initial_key.clone(), manifest).await?;
        if let Some(kl) = self.held_out_kl().await? {
            self.cx.emit_lossy(self.progress_event(kl.into(), 0.0)).await;
        }
        Ok(())
    }

    /// Every step that is left.
    async fn train(&mut self, order: Order) -> Result<()> {
        let first = self.progress.step;
        let first_pass = order.steps_per_pass();
        let (send, mut rows) = mpsc::channel(READ_AHEAD);
        let (cx, teacher, folder) = (self.cx.clone(), Teacher::clone(&self.teacher), self.workspace.path());
        let stream = ShardStream::new(cx, self.attempt.clone(), Split::Train, teacher, folder.to_owned());
        let temperature = self.attempt.spec.loss_temperature();
        let data = TrainingData::new(stream, order, self.teacher.vocab_size, temperature, folder)?;
        // Dropped with this call, and with it the task.
        let mut loader = TaskGroup::new(CancellationToken::new());
        loader.spawn("loader", load_rows(data, first..self.steps, send));
        let mut reported: Option<Instant> = None;
        for step in first..self.steps {
            let Some(StepRows { examples, shards }) = rows.recv().await else {
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
            let report = self.step(examples, u64::from(step) >= first_pass).await?;
            let every = self.attempt.spec.train.checkpoint_steps;
            let last = report.step == self.steps;
            let mut held_out_kl = None;
            if last || (every > 0 && report.step % every == 0) {
                self.write_checkpoint().await?;
                held_out_kl = self.held_out_kl().await?;
            }
            if last || held_out_kl.is_some() || reported.is_none_or(|at| at.elapsed() >= REPORT_EVERY) {
                reported = Some(Instant::now());
                let rate = report.tokens as f64 / report.seconds.max(1e-9);
                tracing::info!(
                    step = report.step,
                    steps = self.steps,
                    loss = self.progress.loss,
                    gradient_norm = report.gradient_norm,
                    learning_rate = report.learning_rate,
                    tokens_per_second = rate as u64,
                    workers = self.lead.as_ref().map_or(1, Lead::workers),
                    held_out_kl,
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

    async fn write_checkpoint(&mut self) -> Result<()> {
        let step = self.progress.step;
        let folder = self.workspace.path().join(format!("checkpoint-{step}"));
        let (target, teacher) = (folder.clone(), Arc::clone(&self.teacher));
        let save = move |slot: &mut Option<Trainer>| {
            resume::save(slot.as_ref().ok_or_else(no_trainer)?, &teacher.folder, &target)
        };
        self.thread.call(save).await??;
        self.checkpoint_key = paths::checkpoint(self.attempt.job.as_str(), step, self.attempt.epoch);
        let manifest = self.manifest();
        self.uploader.start(folder, self.checkpoint_key.clone(), manifest).await
    }

    /// Before the task is handed back: what was trained since the last checkpoint is not lost.
    async fn keep_progress(&mut self) -> Result<()> {
        let newest =
            paths::parse_checkpoint(self.attempt.job.as_str(), &self.checkpoint_key).map_or(0, |(step, _)| step);
        if self.progress.step > newest {
            self.write_checkpoint().await?;
        }
        self.uploader.finish().await
    }

    /// On the held-out rows at hand, nats a token; `None` while none is published.
    async fn held_out_kl(&mut self) -> Result<Option<f64>> {
        let examples = self.held_out.rows().await?.to_vec();
        let (cx, limits) = (self.cx.clone(), self.settings.limits());
        let measure = move |slot: &mut Option<Trainer>| -> Result<Tally> {
            let trainer = slot.as_mut().ok_or_else(no_trainer)?;
            let mut sum = Tally::default();
            let tallies = measure(&trainer.model, &mut trainer.loss, &examples, limits, &|| cx.check())?;
            tallies.iter().for_each(|tally| sum.add(tally));
            Ok(sum)
        };
        let tally = self.thread.call(measure).await??;
        Ok((tally.tokens > 0).then(|| tally.mean_kl()))
    }

    async fn finish(mut self) -> Result<()> {
        self.uploader.finish().await?;
        let Progress { step, trained_tokens, seconds, loss, .. } = self.progress;
        let finished = TrainFinished {
            steps: step,
            checkpoint_key: self.checkpoint_key,
            initial_key: self.initial_key,
            trained_tokens,
            seconds,
            tokens_per_second: trained_tokens as f64 / seconds.max(1e-9),
            final_loss: loss,
        };
        self.cx.emit(What::TrainFinished(finished)).await
    }

    fn manifest(&self) -> Manifest {
        let mut manifest = Manifest {
            job: self.attempt.job.as_str().to_owned(),
            step: self.progress.step,
            epoch: self.attempt.epoch,
            spec_sha256: self.spec_sha256.clone(),
            trained_tokens: self.progress.target_tokens,
            ..Manifest::default()
        };
        manifest.extra.insert(INITIAL_KEY.to_owned(), json!(self.initial_key));
        manifest.extra.insert(SHARDS.to_owned(), json!(self.shards));
        manifest
    }

    fn progress_event(&self, held_out_kl: Option<f64>, tokens_per_second: f64) -> What {
        What::TrainProgress(TrainProgress {
            step: self.progress.step,
            loss: self.progress.loss,
            tokens_per_second,
            trained_tokens: self.progress.trained_tokens,
            held_out_kl,
        })
    }
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
