//! A replica: waits for the lead's rounds and trains its part of each.

use std::{sync::Arc, time::Duration};

use retort_artifact::checkpoint;
use retort_core::{Code, Error, Result, state::Split};
use retort_proto::TrainTask;
use retort_worker::{Attempt, ModelThread, TaskContext};

use super::{
    exchange::{Exchange, Replica, Round},
    inner::{self, Pace},
    outer,
};
use crate::{
    data::{Order, TrainingData},
    init,
    parallel::{Said, initial_model, replica_options},
    settings::Settings,
    shards::ShardStream,
    train::{no_trainer, spec_sha256},
    trainer::{Options, Trainer},
    weights::RowWeights,
    workspace::Workspace,
};

/// Between two looks for a round; the first wait of a stretch is the shortest.
const POLL: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));

/// Until the attempt is cancelled, which is how a replica ends.
pub(crate) async fn replica(
    attempt: &Attempt,
    number: u32,
    task: &TrainTask,
    cx: &TaskContext,
    settings: &Settings,
) -> Result<()> {
    let workspace = Workspace::create(&settings.work_dir, attempt).await?;
    let teacher = init::open_teacher(&attempt.spec.teacher.model).await?;
    let order = Order::new(attempt.spec.seed, task.rows, attempt.spec.train.batch_rows);
    let folder = workspace.path().to_owned();
    let stream = ShardStream::new(cx.clone(), attempt.clone(), Split::Train, (*teacher).clone(), folder.clone());
    let first_pass = order.steps_per_pass();
    let (temperature, prompts) = (attempt.spec.loss_temperature(), cx.prompt_set(attempt).await?);
    let weights = RowWeights::new(prompts, attempt.spec.teacher.mode, &teacher);
    let data = TrainingData::new(stream, order, teacher.vocab_size, temperature, weights, &folder)?;
    let options = replica_options(&attempt.spec, task.steps, settings);
    let mut follower = Follower {
        attempt,
        cx,
        settings,
        replica: (number, attempt.epoch),
        spec_sha256: spec_sha256(&attempt.spec)?,
        options,
        first_pass,
        data,
        thread: ModelThread::spawn("trainer", || None)?,
        initial_key: None,
        workspace: Arc::new(workspace),
    };
    follower.follow().await
}

struct Follower<'a> {
    attempt: &'a Attempt,
    cx: &'a TaskContext,
    settings: &'a Settings,
    replica: Replica,
    spec_sha256: String,
    options: Options,
    first_pass: u64,
    data: TrainingData,
    thread: ModelThread<Option<Trainer>>,
    /// Of the weights that the trainer was made with.
    initial_key: Option<String>,
    workspace: Arc<Workspace>,
}

impl Follower<'_> {
    async fn follow(&mut self) -> Result<()> {
        let (mut lead, mut done): (Option<Exchange>, Option<u32>) = (None, None);
        let mut ready = None;
        let (mut wait, mut said) = (POLL.0, Said::default());
        loop {
            self.cx.check()?;
            if self.cx.others_wait() {
                return Err(Error::new(Code::AttemptYielded, "a replica makes room: another job's task waits"));
            }
            let newest = Exchange::newest(&self.cx.store, self.attempt.job.as_str(), &self.spec_sha256).await?;
            if newest.as_ref().map(|lead| lead.epoch) != lead.as_ref().map(|lead| lead.epoch) {
                (lead, done, ready) = (newest, None, None);
            }
            let mut round = None;
            if let Some(lead) = &lead {
                let next = done.map_or(0, |done| done + 1);
                if ready.is_none() {
                    lead.say_ready(self.replica, next, None).await?;
                    ready = Some(next);
                }
                round = match lead.next_round(done).await {
                    Err(error) if went_on(&error) => {
                        if said.is_new(lead.epoch, error.chain()) {
                            tracing::warn!(code = %error.code, "a round cannot be read: {}", error.chain());
                        }
                        None
                    }
                    outcome => outcome?,
                };
            }
            match (&lead, round) {
                (Some(lead), Some(round)) => {
                    wait = POLL.0;
                    let named = round.parts.iter().any(|part| part.replica == self.replica);
                    let ended = match if named { self.make_trainer(&round.initial_key).await } else { Ok(()) } {
                        // Of the weights before training no other round has better ones.
                        Err(error) if error.code == Code::CheckpointCorrupt => return Err(error),
                        Err(error) => Err(error),
                        Ok(()) => self.take_part(lead, &round).await,
                    };
                    match ended {
                        Err(error) if went_on(&error) => {
                            tracing::warn!(
                                round = round.round, code = %error.code,
                                "takes no part in a round: {}", error.chain()
                            );
                        }
                        outcome => outcome?,
                    }
                    done = Some(round.round);
                    if named {
                        lead.say_ready(self.replica, round.round + 1, ready).await?;
                        ready = Some(round.round + 1);
                    }
                }
                _ => {
                    tokio::select! {
                        () = self.cx.cancelled.cancelled() => {}
                        () = tokio::time::sleep(wait) => {}
                    }
                    wait = (wait * 3 / 2).min(POLL.1);
                }
            }
        }
    }

    async fn take_part(&mut self, lead: &Exchange, round: &Round) -> Result<()> {
        let Some(part) = round.parts.iter().find(|part| part.replica == self.replica) else { return Ok(()) };
        if part.batches.iter().any(|&batch| batch >= self.options.steps) {
            let message = format!("round {} names batches beyond the plan's {}", round.round, self.options.steps);
            return Err(Error::new(Code::CheckpointCorrupt, message));
        }
        let max_bytes = self
            .thread
            .call(|slot| Ok::<_, Error>(outer::max_bytes(&slot.as_ref().ok_or_else(no_trainer)?.optimizer.masters())))
            .await??;
        // What a round left that was given up is overwritten.
        let folder = self.workspace.path().join("round");
        let weights = lead.fetch_weights(round.round, max_bytes, &folder.join("weights")).await?;
        let begin =
            move |slot: &mut Option<Trainer>| slot.as_mut().ok_or_else(no_trainer)?.begin_round(Some(&weights), None);
        self.thread.call(begin).await??;

        let pace =
            Pace { step: round.step, stride: round.workers, steps: self.options.steps, first_pass: self.first_pass };
        let (threads, cx) = (self.settings.threads, self.cx);
        let (delivery, took) =
            inner::train(&self.thread, &mut self.data, cx, threads, &part.batches, pace, |_| None).await?;

        let target = folder.join("delta");
        let file = Exchange::file(&target);
        let write = move |slot: &mut Option<Trainer>| slot.as_mut().ok_or_else(no_trainer)?.write_delta(&file);
        self.thread.call(write).await??;
        lead.deliver(round, self.replica, &delivery, &target).await?;
        tokio::fs::remove_dir_all(&folder).await.map_err(|error| Error::io(&folder, error))?;
        tracing::info!(
            round = round.round,
            steps = part.batches.len(),
            loss = delivery.loss / delivery.target_tokens.max(1) as f64,
            tokens_per_second = (delivery.tokens as f64 / took.as_secs_f64().max(1e-9)) as u64,
            "a round's part is done"
        );
        Ok(())
    }

    /// With the job's weights before training, of which what is trained is set anew each round.
    async fn make_trainer(&mut self, initial_key: &str) -> Result<()> {
        if self.initial_key.as_deref() == Some(initial_key) {
            return Ok(());
        }
        let folder = self.workspace.path().join("initial");
        checkpoint::fetch_below(&self.cx.store, initial_key, "model/", &folder).await?;
        let (device, kind, options) = (self.settings.device, self.settings.kind, self.options.clone());
        let spec = self.attempt.spec.clone();
        let make = move |slot: &mut Option<Trainer>| -> Result<()> {
            *slot = None;
            let model = initial_model(&folder.join("model"), &spec, device, kind)?;
            slot.insert(Trainer::new(model, options)?).say_sizes();
            std::fs::remove_dir_all(&folder).map_err(|error| Error::io(&folder, error))
        };
        self.thread.call(make).await??;
        self.initial_key = Some(initial_key.to_owned());
        Ok(())
    }
}

/// What a lead clears away while a replica reads it: a manifest that is gone, or one whose files are.
fn went_on(error: &Error) -> bool {
    matches!(error.code, Code::ObjectNotFound | Code::CheckpointCorrupt)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use retort_artifact::{checkpoint::Manifest, paths};
    use retort_worker::{Stop, StopSwitch};

    use super::{super::exchange::Part, *};
    use crate::{
        attempt_tests::{
            log,
            world::{JOB, STEPS, World},
        },
        resume,
    };

    /// A lead's side of the exchange, done by hand: what is before training is in the store.
    struct Stage {
        world: World,
        attempt: Attempt,
        lead: Exchange,
        initial_key: String,
        folder: tempfile::TempDir,
    }

    impl Stage {
        async fn new() -> Self {
            log::start();
            let mut world = World::published().await;
            world.train = "learning_rate: 0.02, parallel: {workers: 2, mode: diloco, inner_steps: 4}".to_owned();
            let attempt = world.replica_attempt(1, 1);
            let lead = Exchange::new(world.store.clone(), JOB, 1, &spec_sha256(&attempt.spec).unwrap());
            let initial_key = paths::initial(JOB, 1);
            let folder = tempfile::tempdir().unwrap();
            let initial = folder.path().join("initial");
            let trainer = initial_trainer(&world, &attempt);
            resume::export(trainer.model(), &world.teacher.folder, &initial.join("model")).unwrap();
            checkpoint::publish(&world.store, &initial_key, &initial, Manifest::default()).await.unwrap();
            Self { world, attempt, lead, initial_key, folder }
        }

        /// A round with a part for the replica; its weights are damaged before anybody can see them.
        async fn publish(&self, number: u32, damage: impl Fn(PathBuf)) {
            let weights = self.folder.path().join("weights");
            let mut trainer = initial_trainer(&self.world, &self.attempt);
            trainer.begin_round(None, Some(&Exchange::file(&weights))).unwrap();
            let part = Part { replica: (1, 1), batches: vec![number] };
            let initial_key = self.initial_key.clone();
            let round = Round { round: number, initial_key, step: 0, parts: vec![part], workers: 2 };
            let spec_sha256 = spec_sha256(&self.attempt.spec).unwrap();
            let aside = Exchange::new(self.world.store.clone(), "aside", 1, &spec_sha256);
            aside.publish_round(&round, &weights).await.unwrap();
            damage(self.world.object(&paths::exchange_weights("aside", 1, number)));
            let target = self.world.object(&paths::exchange_round(JOB, 1, number));
            std::fs::create_dir_all(target.parent().unwrap()).unwrap();
            std::fs::rename(self.world.object(&paths::exchange_round("aside", 1, number)), target).unwrap();
        }
    }

    /// A lead that clears a round away while it is read, one way or the other, costs the replica that round alone.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_round_that_goes_while_it_is_read_is_passed_over() {
        let stage = Stage::new().await;
        stage.publish(0, |weights| std::fs::remove_file(weights.join("weights.safetensors")).unwrap()).await;
        stage.lead.open().await.unwrap();

        let stop = StopSwitch::default();
        let judge = async {
            heard(&stage.world, 1).await;
            // A manifest that is gone, or no more than begun, by the time it is read.
            stage.publish(1, |weights| std::fs::write(weights.join("manifest.json"), "").unwrap()).await;
            // Until it has been read: else the next would only be newer.
            while log::warnings("a round cannot be read").is_empty() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            stage.publish(2, |_| {}).await;
            heard(&stage.world, 3).await;
            assert_eq!(stage.lead.delivered(2).await.unwrap(), [(1, 1)]);
            stop.stop(Stop::JobCancelled);
        };
        let (ended, ()) = tokio::join!(stage.world.run_until(&stage.attempt, stop.clone()), async {
            tokio::time::timeout(Duration::from_secs(60), judge).await.expect("it takes part in the last round");
        });
        assert_eq!(ended.unwrap_err().code, Code::JobCancelled);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn damaged_weights_before_training_end_the_attempt() {
        let stage = Stage::new().await;
        let weights = stage.world.object(&stage.initial_key).join("model/model.safetensors");
        let mut bytes = std::fs::read(&weights).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&weights, bytes).unwrap();
        stage.publish(0, |_| {}).await;
        stage.lead.open().await.unwrap();
        let ended = stage.world.run_until(&stage.attempt, StopSwitch::default());
        let error = tokio::time::timeout(Duration::from_secs(60), ended).await.expect("it ends").unwrap_err();
        assert_eq!(error.code, Code::CheckpointCorrupt);
        assert!(error.message.contains("model.safetensors"), "{error}");
    }

    fn initial_trainer(world: &World, attempt: &Attempt) -> Trainer {
        let place = (tch::Device::Cpu, tch::Kind::Float);
        let (model, _) = init::initial_model(&attempt.spec, &world.teacher, &[], place, &|| Ok(())).unwrap();
        Trainer::new(model, replica_options(&attempt.spec, STEPS, &world.settings())).unwrap()
    }

    /// Waits until the replica says that it can take part in this round.
    async fn heard(world: &World, round: u32) {
        while !world.store.exists(&paths::exchange_replica(JOB, 1, (1, 1), round)).await.unwrap() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}
