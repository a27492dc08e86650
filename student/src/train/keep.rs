//! What a run keeps on its way: checkpoints, how good each is, and which is to be judged.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use retort_artifact::{
    checkpoint,
    checkpoint::{HELD_OUT, HeldOut, Manifest},
    paths,
};
use retort_core::{Code, Error, Result, spec::Promote};
use retort_export::Gguf;
use serde_json::json;

use super::{INITIAL_KEY, PRUNING, Run, SHARDS, no_trainer};
use crate::{
    init::Teacher,
    measure::{Tally, measure},
    resume::Snapshot,
    trainer::Trainer,
    workspace::Workspace,
};

impl Run<'_> {
    /// Judges first, so that the manifest can say how good the checkpoint is.
    pub(super) async fn write_checkpoint(&mut self) -> Result<Option<HeldOut>> {
        let judges = Instant::now();
        let held_out = self.judge().await?;
        let waits = Instant::now();
        // One copy at a time.
        self.uploader.finish().await?;
        self.spent.storing += waits.elapsed();
        let copies = Instant::now();
        let step = self.progress.step;
        let best = self.attempt.spec.train.promote == Promote::Best && self.curve.ends_at_its_best();
        let promotable = best || step == self.steps;
        let folder = self.workspace.path().join(format!("checkpoint-{step}"));
        let target = folder.clone();
        let copy =
            move |slot: &mut Option<Trainer>| Snapshot::of(slot.as_mut().ok_or_else(no_trainer)?, &target, promotable);
        let snapshot = self.thread.call(copy).await??;
        let copying = copies.elapsed();
        self.spent.copying += copying;
        self.checkpoint_key = paths::checkpoint(self.attempt.job.as_str(), step, self.attempt.epoch);
        let manifest = self.manifest(held_out);
        let written = write(
            snapshot,
            Arc::clone(&self.teacher),
            Arc::clone(&self.workspace),
            folder.clone(),
            promotable.then(|| self.export()),
        );
        self.uploader.start(written, folder, self.checkpoint_key.clone(), manifest).await?;
        tracing::info!(
            step,
            judged_s = (waits - judges).as_secs_f64(),
            waited_s = (copies - waits).as_secs_f64(),
            copied_s = copying.as_secs_f64(),
            "a checkpoint is being written"
        );
        Ok(held_out)
    }

    /// One GGUF file of each type that the spec asks for, into the folder of weights that it is given.
    fn export(&self) -> impl FnOnce(&Path) -> Result<()> + Send + 'static {
        let (name, kinds) = (self.attempt.spec.name.clone(), self.attempt.spec.export.gguf.clone());
        let cx = self.cx.clone();
        move |folder| {
            kinds.into_iter().try_for_each(|kind| {
                let out = folder.join(retort_export::file_name(&name, kind));
                let gguf = Gguf::plan(folder, &name, kind)?;
                gguf.export(&out, false, &mut |_| cx.check())?;
                tracing::info!(file = %out.display(), bytes = gguf.bytes(), "exported");
                Ok(())
            })
        }
    }

    /// Before the task is handed back: what was trained since the last checkpoint is not lost.
    pub(crate) async fn keep_progress(&mut self) -> Result<()> {
        let newest =
            paths::parse_checkpoint(self.attempt.job.as_str(), &self.checkpoint_key).map_or(0, |(step, _)| step);
        if self.progress.step > newest {
            self.write_checkpoint().await?;
        }
        self.uploader.finish().await
    }

    /// On the held-out rows at hand; `None` while none is published.
    pub(super) async fn judge(&mut self) -> Result<Option<HeldOut>> {
        let began = Instant::now();
        let examples = self.held_out.rows().await?.to_vec();
        let (cx, limits) = (self.cx.clone(), self.settings.limits(&self.attempt.spec.train));
        let measure = move |slot: &mut Option<Trainer>| -> Result<Tally> {
            let trainer = slot.as_mut().ok_or_else(no_trainer)?;
            let mut sum = Tally::default();
            let tallies = trainer.judged(|model, loss| measure(model, loss, &examples, limits, &|| cx.check()))?;
            tallies.iter().for_each(|tally| sum.add(tally));
            Ok(sum)
        };
        let quality = self.thread.call(measure).await??.quality();
        self.spent.judging += began.elapsed();
        let held_out = HeldOut {
            step: self.progress.step,
            target_tokens: self.progress.target_tokens,
            kl: quality.kl,
            top1_agreement: quality.top1_agreement,
            calibration_error: quality.calibration_error.unwrap_or(f64::NAN),
            tokens: quality.tokens,
        };
        if !held_out.is_sound() {
            return Ok(None);
        }
        self.curve.push(held_out);
        Ok(Some(held_out))
    }

    /// Prefix of the checkpoint that is to be judged: the last where the best cannot be.
    pub(super) async fn chosen(&self) -> Result<String> {
        if self.attempt.spec.train.promote == Promote::Best
            && let Some((prefix, manifest)) = checkpoint::best(&self.cx.store, self.attempt.job.as_str()).await?
        {
            if !self.is_whole(&manifest) {
                // It became the best when better ones were damaged, and was not written as one.
                tracing::warn!(
                    step = manifest.step,
                    key = prefix,
                    "the best checkpoint lacks what a model needs: the last is judged"
                );
                return Ok(self.checkpoint_key.clone());
            }
            match checkpoint::verify(&self.cx.store, &prefix, &manifest, "model/").await {
                Err(error) if error.code == Code::CheckpointCorrupt => {
                    tracing::warn!(
                        step = manifest.step,
                        key = prefix,
                        "the best checkpoint is damaged: the last is judged: {}",
                        error.chain()
                    );
                    return Ok(self.checkpoint_key.clone());
                }
                outcome => outcome?,
            }
            tracing::info!(step = manifest.step, key = prefix, "the best checkpoint is to be judged");
            return Ok(prefix);
        }
        Ok(self.checkpoint_key.clone())
    }

    /// Whether a checkpoint holds all that is promoted.
    fn is_whole(&self, manifest: &Manifest) -> bool {
        let has = |path: &str| manifest.files.iter().any(|file| file.path == path);
        let spec = &self.attempt.spec;
        let gguf = |kind| format!("model/{}", retort_export::file_name(&spec.name, kind));
        has("model/config.json") && spec.export.gguf.iter().all(|&kind| has(&gguf(kind)))
    }

    pub(super) fn manifest(&self, held_out: Option<HeldOut>) -> Manifest {
        let mut manifest = Manifest {
            job: self.attempt.job.as_str().to_owned(),
            step: self.progress.step,
            epoch: self.attempt.epoch,
            spec_sha256: self.spec_sha256.clone(),
            target_tokens: self.progress.target_tokens,
            ..Manifest::default()
        };
        manifest.extra.insert(INITIAL_KEY.to_owned(), json!(self.initial_key));
        manifest.extra.insert(SHARDS.to_owned(), json!(self.shards));
        if let Some(pruning) = &self.pruning {
            manifest.extra.insert(PRUNING.to_owned(), json!(pruning));
        }
        if let Some(held_out) = held_out {
            manifest.extra.insert(HELD_OUT.to_owned(), json!(held_out));
        }
        self.curve.write(&mut manifest.extra);
        manifest
    }
}

/// Writes a checkpoint's files, away from the thread that trains.
async fn write(
    snapshot: Snapshot,
    teacher: Arc<Teacher>,
    workspace: Arc<Workspace>,
    folder: PathBuf,
    export: Option<impl FnOnce(&Path) -> Result<()> + Send + 'static>,
) -> Result<()> {
    let write = move || {
        // It stays until this is done, also when the attempt is given up meanwhile.
        let _workspace = workspace;
        snapshot.write(&teacher.folder, &folder)?;
        drop(snapshot);
        export.map_or(Ok(()), |export| export(&folder.join("model")))
    };
    let done = tokio::task::spawn_blocking(write).await;
    done.map_err(|error| Error::internal(format!("the writing of a checkpoint broke off: {error}")))?
}
