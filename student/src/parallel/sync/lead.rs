//! The lead: who follows it, and how a step is computed together.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use retort_core::{Code, Error, Result, spec::Sharing, task_group::TaskGroup};
use retort_proto::train_service_server::TrainServiceServer;
use retort_worker::{Attempt, ModelThread, TaskContext, peer};
use tokio::{sync::mpsc, task::JoinSet};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::{bytes::Bytes, sync::CancellationToken};

use super::{
    door::{Arrival, Door, Terms},
    exchange,
    frames::{MAX_MESSAGE, MAX_ROWS_BYTES, Order},
    lost,
    member::{self, Computed, Member},
    rendezvous::{self, Rendezvous},
    split::split,
};
use crate::{
    example::Example,
    optimizer::AdamW,
    parallel::implausible,
    resume,
    settings::Settings,
    train::no_trainer,
    trainer::{Progress, Share, StepReport, Trainer, weight},
};

/// Replicas that may come while a step is computed; those beyond come again.
const NEWCOMERS: usize = 64;
/// A share may take this long, or [`TIMES_SLOWER`] times as long as the lead's own.
const PATIENCE: Duration = Duration::from_secs(60);
const TIMES_SLOWER: u32 = 10;
/// A replica whose answers cannot be so many times in a row is not taken in again.
const STRIKES: u32 = 3;
/// Before any step was taken nothing is known but the lead's own part, which may have none of the step's hard rows.
const FIRST_TIMES: f64 = 1e4;
/// Replicas have this long to hear that the training is done.
pub(super) const FAREWELL: Duration = Duration::from_secs(1);

pub(crate) struct Lead {
    cx: TaskContext,
    job: String,
    epoch: u64,
    newcomers: mpsc::Receiver<Member>,
    members: BTreeMap<u32, Member>,
    /// Answers in a row that could not be, of a replica's number and attempt.
    strikes: BTreeMap<(u32, u64), u32>,
    /// As [`Terms::done`].
    done: CancellationToken,
    tasks: TaskGroup,
    /// That computed a part of the last step, this one included.
    workers: u32,
}

/// A replica's part of a step.
struct Part {
    number: u32,
    rows: Arc<Vec<Example>>,
    /// `None` where the lead must compute it.
    computed: Option<Computed>,
}

/// A replica's number, and why its answer does not count if it does not.
type Answer = (u32, Result<(), String>);

impl Lead {
    /// Listens, and says so in the store; `None` where the job's spec asks for one worker, or for another
    /// mode. `thread` has the trainer that the replicas will follow.
    pub(crate) async fn open(
        attempt: &Attempt,
        cx: &TaskContext,
        settings: &Settings,
        thread: &ModelThread<Option<Trainer>>,
        initial_key: &str,
        spec_sha256: &str,
    ) -> Result<Option<Self>> {
        let workers = attempt.spec.train.workers();
        let mode = attempt.spec.train.parallel.map(|parallel| parallel.mode);
        if workers < 2 || mode != Some(Sharing::Synchronous) {
            return Ok(None);
        }
        let table = |slot: &mut Option<Trainer>| {
            slot.as_ref().map(|trainer| (exchange::print(&trainer.optimizer), exchange::bytes(&trainer.optimizer)))
        };
        let (parameters_sha256, gradient_bytes) = thread.call(table).await?.ok_or_else(no_trainer)?;
        let peers = &settings.peers;
        let listener = peer::listen(&peers.listen).await?;
        let bound = listener.local_addr().map_err(|error| Error::io(&peers.listen, error))?;
        let job = attempt.job.as_str().to_owned();
        let rendezvous = Rendezvous::new(attempt.epoch, peers.advertised(bound)?);
        let terms = Arc::new(Terms {
            job: job.clone(),
            epoch: attempt.epoch,
            token: rendezvous.token.clone(),
            spec_sha256: spec_sha256.to_owned(),
            dtype: resume::dtype(settings.kind),
            workers,
            initial_key: initial_key.to_owned(),
            parameters_sha256,
            gradient_bytes,
            done: CancellationToken::new(),
        });
        let done = terms.done.clone();
        let (arrivals, arrived) = mpsc::channel(NEWCOMERS);
        let (ready, newcomers) = mpsc::channel(NEWCOMERS);
        let service = TrainServiceServer::new(Door::new(Arc::clone(&terms), arrivals))
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE);
        let mut server = peer::server(peers.tls.as_ref())?;
        let mut tasks = TaskGroup::new(CancellationToken::new());
        let until = done.clone().cancelled_owned();
        tasks.spawn("lead-server", async move {
            let incoming = TcpListenerStream::new(listener);
            let serving = server.add_service(service).serve_with_incoming_shutdown(incoming, until);
            serving.await.map_err(|error| Error::with_source(Code::GroupBroken, "the lead can serve no more", error))
        });
        tasks.spawn("replicas", async move {
            welcome(arrived, terms, ready).await;
            Ok(())
        });
        rendezvous.publish(&cx.store, &job).await?;
        tracing::info!(address = rendezvous.address, workers, "leads a training");
        let members = BTreeMap::new();
        let (cx, epoch) = (cx.clone(), attempt.epoch);
        let strikes = BTreeMap::new();
        Ok(Some(Self { cx, job, epoch, newcomers, members, strikes, done, tasks, workers: 1 }))
    }

    /// Workers that computed a part of the last step.
    pub(crate) fn workers(&self) -> u32 {
        self.workers
    }

    /// One optimiser step, computed together with the replicas that are there; as [`Trainer::step`].
    /// `enter` is called on the trainer's thread before it computes.
    pub(crate) async fn step(
        &mut self,
        thread: &ModelThread<Option<Trainer>>,
        examples: Vec<Example>,
        teacher_done: bool,
        enter: impl FnOnce() + Send + 'static,
    ) -> Result<(StepReport, Progress)> {
        let started = Instant::now();
        self.admit();
        let weight = weight(&examples);
        let (own, mut parts) = self.deal(examples);
        self.send(thread, &parts, weight, teacher_done).await?;

        let cx = self.cx.clone();
        let share = move |slot: &mut Option<Trainer>| -> Result<(Share, Duration)> {
            enter();
            let began = Instant::now();
            let share = slot.as_mut().ok_or_else(no_trainer)?.share(&own, weight, &|| cx.check())?;
            Ok((share, began.elapsed()))
        };
        let (share, took) = thread.call(share).await??;
        self.collect(&mut parts, PATIENCE.max(took * TIMES_SLOWER)).await?;

        let cx = self.cx.clone();
        let finish = move |slot: &mut Option<Trainer>| -> Result<(StepReport, Progress, Vec<Answer>)> {
            let trainer = slot.as_mut().ok_or_else(no_trainer)?;
            let mut whole = share;
            let mut answers = Vec::new();
            let here = if parts.is_empty() { Here::default() } else { Here::of(trainer, &share, weight)? };
            for Part { number, rows, computed } in parts {
                if let Some(computed) = computed {
                    let added = add(&trainer.optimizer, &computed, weight, here)?;
                    answers.push((number, added.clone()));
                    if added.is_ok() {
                        whole.add(computed.share);
                        continue;
                    }
                }
                whole.add(trainer.share(&rows, weight, &|| cx.check())?);
            }
            let report = trainer.update(whole, started)?;
            let workers = 1 + answers.iter().filter(|(_, added)| added.is_ok()).count() as u32;
            trainer.progress.workers = trainer.progress.workers.max(workers);
            Ok((report, trainer.progress(), answers))
        };
        let (report, progress, answers) = thread.call(finish).await??;
        self.workers = 1 + answers.iter().filter(|(_, added)| added.is_ok()).count() as u32;
        self.judge(report.step, answers);
        Ok((report, progress))
    }

    /// Takes back what the store says, where that fails the next lead does, and ends every stream. Where the training
    /// is `done`, replicas are told.
    pub(crate) async fn close(self, done: bool) {
        if let Err(error) = rendezvous::remove(&self.cx.store, &self.job, self.epoch).await {
            tracing::warn!(code = %error.code, "the store goes on saying where this training's lead was: {}", error.chain());
        }
        if done {
            self.done.cancel();
            if tokio::time::timeout(FAREWELL, self.tasks.join()).await.is_err() {
                tracing::debug!("a replica does not take its leave");
            }
        }
    }

    /// Takes in who is ready by now, and forgets who has gone.
    fn admit(&mut self) {
        self.members.retain(|_, member| !member.has_gone());
        while let Ok(member) = self.newcomers.try_recv() {
            self.take_in(member);
        }
    }

    /// Who answered what cannot be goes, and hears why.
    fn judge(&mut self, step: u32, answers: Vec<Answer>) {
        for (number, added) in answers {
            let Some(epoch) = self.members.get(&number).map(|member| member.epoch) else { continue };
            let Err(why) = added else {
                self.strikes.remove(&(number, epoch));
                continue;
            };
            tracing::warn!(replica = number, step, "the lead computed a replica's rows: {why}");
            *self.strikes.entry((number, epoch)).or_default() += 1;
            let why = format!("replica {number}'s answer to step {step} does not count: {why}");
            self.dismiss(number, Error::new(Code::GroupBroken, why));
        }
    }

    fn dismiss(&mut self, number: u32, why: Error) {
        if let Some(member) = self.members.remove(&number) {
            member.dismiss(why);
        }
    }

    fn take_in(&mut self, member: Member) {
        if self.strikes.get(&(member.number, member.epoch)).is_some_and(|&strikes| strikes >= STRIKES) {
            let why = format!(
                "replica {} computed what cannot be {STRIKES} times in a row, its log and the lead's say what; see to its \
                 machine",
                member.number
            );
            tracing::warn!(replica = member.number, "a replica is not taken in again: {why}");
            return member.dismiss(Error::new(Code::ReplicaMismatch, why));
        }
        // Of two attempts at one replica, the newer stays.
        if self.members.get(&member.number).is_none_or(|present| present.epoch <= member.epoch) {
            tracing::info!(replica = member.number, epoch = member.epoch, "a replica takes part from now on");
            self.members.insert(member.number, member);
        }
    }

    /// The lead's own rows, and each replica's.
    fn deal(&self, mut examples: Vec<Example>) -> (Vec<Example>, Vec<Part>) {
        let tokens: Vec<usize> = examples.iter().map(Example::input_len).collect();
        let mut shares = split(&tokens, 1 + self.members.len()).into_iter();
        let mut take = |rows: Vec<usize>| -> Vec<Example> {
            rows.into_iter().map(|row| std::mem::take(&mut examples[row])).collect()
        };
        let mut own = shares.next().map(&mut take).unwrap_or_default();
        let mut parts = Vec::new();
        for (&number, rows) in self.members.keys().zip(shares.map(&mut take)) {
            let bytes: u64 = rows.iter().map(|row| row.spilled_bytes() as u64).sum();
            match bytes {
                0 => {}
                1..=MAX_ROWS_BYTES => parts.push(Part { number, rows: Arc::new(rows), computed: None }),
                _ => own.extend(rows),
            }
        }
        (own, parts)
    }

    /// Sends every part to its replica, with the weights if it has others.
    async fn send(
        &mut self,
        thread: &ModelThread<Option<Trainer>>,
        parts: &[Part],
        weight: f64,
        teacher_done: bool,
    ) -> Result<()> {
        if parts.is_empty() {
            return Ok(());
        }
        let held: Vec<Option<u32>> =
            parts.iter().map(|part| self.members.get(&part.number).and_then(|member| member.updates)).collect();
        let weights = move |slot: &mut Option<Trainer>| -> Result<(u32, u32, Bytes)> {
            let trainer = slot.as_ref().ok_or_else(no_trainer)?;
            let updates = trainer.optimizer.step();
            let stale = held.iter().any(|held| *held != Some(updates));
            let weights = if stale { exchange::weights(&trainer.optimizer)? } else { Bytes::new() };
            Ok((trainer.progress().step, updates, weights))
        };
        let (step, updates, weights) = thread.call(weights).await??;
        for part in parts {
            let Some(member) = self.members.get_mut(&part.number) else { continue };
            let weights = (member.updates != Some(updates)).then(|| weights.clone());
            let rows = Arc::clone(&part.rows);
            member.updates = Some(updates);
            if !member.order(Order { step, weight, teacher_done, weights, rows }) {
                self.members.remove(&part.number);
            }
        }
        Ok(())
    }

    /// Waits for every share that can still come; who does not answer in time goes.
    async fn collect(&mut self, parts: &mut [Part], patience: Duration) -> Result<()> {
        let deadline = tokio::time::Instant::now() + patience;
        for part in parts {
            let Some(member) = self.members.get_mut(&part.number) else { continue };
            part.computed = tokio::select! {
                () = self.cx.cancelled.cancelled() => return self.cx.check(),
                answer = tokio::time::timeout_at(deadline, member.answer()) => answer.ok().flatten(),
            };
            if part.computed.is_none() {
                let patience = patience.as_secs();
                tracing::warn!(replica = part.number, patience, "a replica gave no answer: the lead computes its rows");
                let why = format!("replica {} gave no answer within {patience} s", part.number);
                self.dismiss(part.number, lost(&why));
            }
        }
        Ok(())
    }

    /// Waits until so many replicas take part.
    #[cfg(test)]
    pub(super) async fn gather(&mut self, replicas: usize) {
        self.admit();
        while self.members.len() < replicas {
            let member = self.newcomers.recv().await.unwrap();
            self.take_in(member);
        }
    }
}

/// What a part of a step is like here: of the lead's own and of whole steps before, the larger.
#[derive(Clone, Copy, Default)]
struct Here {
    gradient_norm: f64,
    /// Of the step's mean loss.
    loss: f64,
}

impl Here {
    /// When the trainer has collected the gradient of its own part alone, of a step that weighs `weight`.
    fn of(trainer: &Trainer, own: &Share, weight: f64) -> Result<Self> {
        let (gradient_norm, loss) = (exchange::norm(&trainer.optimizer)?, part_of_loss(own, weight));
        Ok(match trainer.progress.watched.usual() {
            Some(usual) => Self { gradient_norm: gradient_norm.max(usual.0), loss: loss.max(usual.1) },
            None => Self { gradient_norm: FIRST_TIMES * gradient_norm, loss: FIRST_TIMES * loss },
        })
    }
}

/// What a share adds to the mean loss of a step that weighs `weight`.
fn part_of_loss(share: &Share, weight: f64) -> f64 {
    if weight > 0.0 { share.loss / weight } else { share.loss }
}

/// Adds a replica's gradient, or says why it does not count.
fn add(optimizer: &AdamW, computed: &Computed, weight: f64, here: Here) -> Result<Result<(), String>> {
    match implausible("part of the loss", part_of_loss(&computed.share, weight), here.loss) {
        Some(why) => Ok(Err(why)),
        None => exchange::add_gradient(optimizer, &computed.gradient, here.gradient_norm),
    }
}

/// Serves whoever comes in, each in a task of its own, until the lead goes.
async fn welcome(mut arrived: mpsc::Receiver<Arrival>, terms: Arc<Terms>, ready: mpsc::Sender<Member>) {
    let mut serving = JoinSet::new();
    loop {
        tokio::select! {
            arrival = arrived.recv() => match arrival {
                Some(arrival) => drop(serving.spawn(member::serve(arrival, Arc::clone(&terms), ready.clone()))),
                None => return,
            },
            () = terms.done.cancelled() => {
                while serving.join_next().await.is_some() {}
                return;
            }
            Some(ended) = serving.join_next() => if let Err(error) = ended {
                tracing::error!("a replica's task failed: {error}");
            },
        }
    }
}
