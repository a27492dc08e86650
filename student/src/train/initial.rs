//! The student before training: made, published, and made again where the store has it no more.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use retort_artifact::{checkpoint, checkpoint::Manifest, paths};
use retort_core::{Code, Error, Result, pruning::Pruning, spec::Init, state::Split};
use retort_llama::Model;
use tch::Device;

use super::{INITIAL_KEY, Run};
use crate::{
    init::{self, Teacher},
    parallel, prune, resume,
    shards::ShardStream,
    trainer::{Options, Trainer},
};

impl Run<'_> {
    /// Makes the initial weights and starts publishing them.
    pub(super) async fn begin(&mut self, options: Options) -> Result<()> {
        let folder = self.workspace.path().join("initial");
        let make = self.making(folder.clone()).await?;
        let (device, kind) = (self.settings.device, self.settings.kind);
        let (spec, target) = (self.attempt.spec.clone(), folder.join("model"));
        let begin = move |slot: &mut Option<Trainer>| -> Result<Option<Pruning>> {
            let (mut model, pruning) = make()?;
            if spec.student.lora.is_some() {
                drop(model);
                model = parallel::initial_model(&target, &spec, device, kind)?;
            }
            let trainer = Trainer::new(model, options)?;
            trainer.say_sizes();
            *slot = Some(trainer);
            Ok(pruning)
        };
        self.pruning = self.thread.call(begin).await??;
        let held_out = self.judge().await?;
        let own = self.own_initial_key();
        // It may be there already, made again for a checkpoint that turned out to be damaged too.
        if std::mem::replace(&mut self.initial_key, own.clone()) != own {
            let manifest = self.manifest(held_out);
            self.uploader.start(async { Ok(()) }, folder, own, manifest).await?;
        }
        if let Some(held_out) = held_out {
            self.cx.emit_lossy(self.progress_event(Some(held_out.kl), 0.0)).await;
        }
        Ok(())
    }

    /// Where the weights before training lie that a checkpoint was trained from, whole. They follow from the spec, so
    /// where they are damaged or gone they are made again: replicas and the evaluation read them.
    pub(super) async fn sound_initial(&mut self, manifest: &Manifest) -> Result<String> {
        let own = self.own_initial_key();
        if self.initial_key == own {
            return Ok(own);
        }
        let store = &self.cx.store;
        let key = manifest.extra.get(INITIAL_KEY).and_then(|key| key.as_str()).unwrap_or_default();
        let found = match checkpoint::manifest(store, key).await {
            Ok(initial) => checkpoint::verify(store, key, &initial, "model/").await,
            Err(error) => Err(error),
        };
        match found {
            Ok(()) => return Ok(key.to_owned()),
            Err(error) if matches!(error.code, Code::ObjectNotFound | Code::CheckpointCorrupt) => tracing::warn!(
                key,
                code = %error.code,
                "the weights before training are damaged and made again: {}",
                error.chain()
            ),
            Err(error) => return Err(error),
        }
        let folder = self.workspace.path().join("initial");
        let make = self.making(folder.clone()).await?;
        self.thread.call(move |_| make().map(drop)).await??;
        let manifest = Manifest { step: 0, target_tokens: 0, ..self.manifest(None) };
        checkpoint::hand_over(store, &own, &folder, manifest).await?;
        Ok(own)
    }

    fn own_initial_key(&self) -> String {
        paths::initial(self.attempt.job.as_str(), self.attempt.epoch)
    }

    /// What makes the weights before training and writes them to `folder`, for the trainer's thread.
    async fn making(
        &self,
        folder: PathBuf,
    ) -> Result<impl FnOnce() -> Result<(Model, Option<Pruning>)> + Send + 'static> {
        let (spec, teacher) = (self.attempt.spec.clone(), Arc::clone(&self.teacher));
        let (cx, settings, texts) = (self.cx.clone(), self.settings.clone(), self.calibration_texts().await?);
        // Adapters' base is read as it is kept, and never lies on the device as it was made.
        let device = if spec.student.lora.is_some() { Device::Cpu } else { settings.device };
        Ok(move || {
            settings.threads.enter(false);
            let made = init::initial_model(&spec, &teacher, &texts, (device, settings.kind), &|| cx.check())?;
            resume::export(&made.0, &teacher.folder, &folder.join("model"))?;
            if let Some(pruning) = &made.1 {
                write_pruning(pruning, &folder)?;
            }
            Ok(made)
        })
    }

    /// What the initial weights are chosen by, where they are; waits until it is published.
    async fn calibration_texts(&self) -> Result<Vec<Vec<u32>>> {
        let Init::Prune(prune) = &self.attempt.spec.student.init else { return Ok(Vec::new()) };
        if !prune.needs_calibration() {
            return Ok(Vec::new());
        }
        let (cx, teacher, folder) = (self.cx.clone(), Teacher::clone(&self.teacher), self.workspace.path().to_owned());
        let stream = ShardStream::new(cx, self.attempt.clone(), Split::Train, teacher, folder);
        prune::calibration::texts(stream, prune.calibration_rows as usize, self.teacher.vocab_size).await
    }
}

/// As `pruning.json` beside the weights, and in the log.
fn write_pruning(pruning: &Pruning, folder: &Path) -> Result<()> {
    let path = folder.join("pruning.json");
    let json = serde_json::to_vec_pretty(pruning).map_err(|error| Error::internal(error.to_string()))?;
    std::fs::write(&path, json).map_err(|error| Error::io(&path, error))?;
    let layers: Vec<u32> = pruning.layers.iter().map(|layer| layer.layer).collect();
    tracing::info!(
        ?layers,
        influence_kept = pruning.depth.share,
        hidden_size = pruning.hidden.kept,
        hidden_kept = pruning.hidden.share,
        intermediate_size = pruning.intermediate.kept,
        intermediate_kept = pruning.intermediate.share,
        attention_heads = pruning.attention_heads.kept,
        attention_heads_kept = pruning.attention_heads.share,
        calibration_rows = pruning.calibration_rows,
        calibration_tokens = pruning.calibration_tokens,
        "pruned"
    );
    Ok(())
}
