//! A replica: looks for its lead, computes what it is sent, and looks again when the lead has gone.

use std::{pin::Pin, sync::Arc, time::Duration};

use retort_artifact::checkpoint;
use retort_core::{
    Code, Error, Kind, Result,
    wire::{error_from_proto, error_to_proto, from_status},
};
use retort_proto::{
    self as proto, ReplicaTask, follow_request, follow_response, train_service_client::TrainServiceClient,
};
use retort_worker::{
    Attempt, ModelThread, TaskContext,
    peer::{self, SILENCE},
};
use tokio::{sync::mpsc, time::Instant};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{bytes::Bytes, sync::CancellationToken};
use tonic::Streaming;

use super::{
    PROTOCOL, exchange,
    frames::{Bounds, Incoming, MAX_MESSAGE, Received, chunks},
    lost,
    rendezvous::{self, Rendezvous},
    wrong,
};
use crate::{
    init::{self, Teacher},
    parallel::{Said, initial_model, replica_options},
    resume,
    settings::Settings,
    train::{no_trainer, spec_sha256},
    trainer::{Options, Share, Trainer},
    workspace::Workspace,
};

/// Between two looks for a lead; the first wait of a stretch is the shortest.
const POLL: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(2));
/// Messages that wait for the network: four chunks.
const OUTGOING: usize = 4;

/// The attempt at a replica's task, until that is cancelled. `attempt-yielded` where nobody leads and another
/// task waits, `replica-mismatch` where the lead can do nothing with this student.
pub(crate) async fn follow(attempt: &Attempt, task: &ReplicaTask, cx: &TaskContext, settings: &Settings) -> Result<()> {
    let steps = task.train.as_ref().map(|train| train.steps);
    let steps = steps.ok_or_else(|| Error::internal(format!("{} says nothing of its training", attempt.task)))?;
    let replica = Replica {
        attempt,
        cx,
        settings,
        number: task.number,
        options: replica_options(&attempt.spec, steps, settings),
        spec_sha256: spec_sha256(&attempt.spec)?,
        teacher: init::open_teacher(&attempt.spec.teacher.model).await?,
        thread: ModelThread::spawn("replica", || None)?,
        workspace: Workspace::create(&settings.work_dir, attempt).await?,
    };
    let (mut wait, mut said) = (POLL.0, Said::default());
    loop {
        cx.check()?;
        if let Some(lead) = rendezvous::newest(&cx.store, attempt.job.as_str()).await? {
            let stream = replica.stream(&lead).await?;
            match stream {
                Ok(why) => {
                    if why.code == Code::TrainingEnded {
                        // The orchestrator says so too, once the last checkpoint is stored.
                        tracing::info!("{}", why.message);
                    } else {
                        tracing::info!(code = %why.code, "its lead has gone: {}", why.chain());
                    }
                    replica.thread.call(|slot| *slot = None).await?;
                    wait = POLL.0;
                }
                Err(why) if said.is_new(lead.epoch, why.chain()) => {
                    tracing::warn!(code = %why.code, address = lead.address, "no lead to follow yet: {}", why.chain());
                }
                Err(_) => {}
            }
        }
        replica.make_room()?;
        tokio::select! {
            () = cx.cancelled.cancelled() => {}
            () = tokio::time::sleep(wait) => {}
        }
        wait = (wait * 3 / 2).min(POLL.1);
    }
}

struct Replica<'a> {
    attempt: &'a Attempt,
    cx: &'a TaskContext,
    settings: &'a Settings,
    number: u32,
    options: Options,
    spec_sha256: String,
    teacher: Arc<Teacher>,
    thread: ModelThread<Option<Trainer>>,
    workspace: Workspace,
}

/// What the trainer's thread has done.
enum Done {
    /// Hash and bytes of the trained parameters.
    Loaded(String, u64),
    Computed(u32, Share, Bytes),
}

type Work<'a> = Pin<Box<dyn Future<Output = Result<Done>> + Send + 'a>>;

/// How a stream came to its end: `Ok` one that stood, `Err` one that did not come about.
type Ended = Result<Error, Error>;

impl Replica<'_> {
    /// Follows a lead until it goes. `Err` where looking for another would be of no use.
    async fn stream(&self, lead: &Rendezvous) -> Result<Ended> {
        self.settings.peers.check(&lead.address)?;
        let endpoint = peer::endpoint(&lead.address, self.settings.peers.tls.as_ref())?;
        let (outgoing, requests) = mpsc::channel(OUTGOING);
        let _ = outgoing.try_send(message(follow_request::What::Hello(self.hello(lead))));
        let open = async {
            let unreachable =
                |error| Error::with_source(Code::GroupBroken, format!("{} is not reached", lead.address), error);
            let channel = endpoint.connect().await.map_err(unreachable)?;
            let mut client = TrainServiceClient::new(channel)
                .max_decoding_message_size(MAX_MESSAGE)
                .max_encoding_message_size(MAX_MESSAGE);
            let mut messages =
                client.follow(ReceiverStream::new(requests)).await.map_err(|status| from_status(&status))?.into_inner();
            match messages.message().await.map_err(|status| from_status(&status))?.and_then(|message| message.what) {
                Some(follow_response::What::Welcome(welcome)) => Ok((messages, welcome)),
                _ => Err(wrong("a hello was answered with something else than a welcome")),
            }
        };
        let opened = tokio::select! {
            () = self.cx.cancelled.cancelled() => return self.cx.check().map(|()| Err(lost("cancelled"))),
            opened = tokio::time::timeout(SILENCE, open) => opened,
        };
        let (messages, welcome) = match opened.unwrap_or_else(|_| Err(lost("the lead says nothing"))) {
            Ok(opened) => opened,
            Err(error) if error.code == Code::ReplicaMismatch => return Err(error),
            Err(error) => return Ok(Err(error)),
        };
        tracing::info!(address = lead.address, lead_epoch = lead.epoch, "follows a lead");
        let why = self.serve(messages, &outgoing, welcome).await;
        self.cx.check()?;
        let Err(why) = why;
        if why.code == Code::TrainingEnded {
            return Ok(Ok(why));
        }
        // If the lead is there still, it can say what was wrong.
        let _ = outgoing.try_send(message(follow_request::What::Leave(error_to_proto(&why))));
        if gone(&why) { Ok(Ok(why)) } else { Err(why) }
    }

    /// A replica is help: any other task of the pool goes before it.
    fn make_room(&self) -> Result<()> {
        if self.cx.others_wait() {
            return Err(Error::new(Code::AttemptYielded, "a replica makes room: another job's task waits"));
        }
        Ok(())
    }

    fn hello(&self, lead: &Rendezvous) -> proto::ReplicaHello {
        let threads = self.settings.threads.beside_teacher.map_or_else(tch::get_num_threads, i32::from);
        proto::ReplicaHello {
            protocol: PROTOCOL,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            job_id: self.attempt.job.as_str().to_owned(),
            lead_epoch: lead.epoch,
            token: lead.token.clone(),
            replica: self.number,
            epoch: self.attempt.epoch,
            spec_sha256: self.spec_sha256.clone(),
            dtype: resume::dtype(self.settings.kind).to_owned(),
            threads: threads.try_into().unwrap_or(0),
        }
    }

    /// Until something is wrong, if only that the lead has gone.
    async fn serve(
        &self,
        mut messages: Streaming<proto::FollowResponse>,
        outgoing: &mpsc::Sender<proto::FollowRequest>,
        welcome: proto::LeadWelcome,
    ) -> Result<std::convert::Infallible> {
        let over = CancellationToken::new();
        let _over = over.clone().drop_guard();
        let mut work: Option<Work<'_>> = Some(Box::pin(self.load(welcome.initial_key)));
        let mut incoming = None;
        let mut heard = Instant::now();
        let mut tick = peer::ticker();
        loop {
            let done = async {
                match work.as_mut() {
                    Some(work) => work.await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = self.cx.cancelled.cancelled() => {
                    self.cx.check()?;
                    return Err(lost("cancelled"));
                }
                _ = tick.tick() => {
                    if work.is_none() {
                        self.make_room()?;
                    }
                    send(outgoing, follow_request::What::Alive(proto::Alive {})).await?;
                }
                done = done => {
                    work = None;
                    match done? {
                        Done::Loaded(parameters_sha256, weight_bytes) => {
                            incoming = Some(Incoming::new(self.bounds(weight_bytes)));
                            send(outgoing, follow_request::What::Ready(proto::ReplicaReady { parameters_sha256 })).await?;
                        }
                        Done::Computed(step, share, gradient) => {
                            answer(outgoing, step, share, gradient).await?;
                            self.make_room()?;
                        }
                    }
                }
                message = tokio::time::timeout_at(heard + SILENCE, messages.message()) => {
                    heard = Instant::now();
                    let what = match message {
                        Ok(Ok(Some(message))) => message.what.ok_or_else(|| wrong("a message that says nothing"))?,
                        Ok(Ok(None)) => return Err(lost("it closed the connection")),
                        Ok(Err(status)) => return Err(lost(&format!("the connection broke ({})", status.message()))),
                        Err(_) => return Err(lost(&format!("nothing heard for {} s", SILENCE.as_secs()))),
                    };
                    let order = match (&mut incoming, what) {
                        (_, follow_response::What::Over(why)) => return Err(error_from_proto(why)),
                        (_, follow_response::What::Alive(_)) => None,
                        (Some(incoming), what) => incoming.take(what)?,
                        (None, _) => return Err(wrong("work came before this replica was ready")),
                    };
                    if let Some(order) = order {
                        if work.is_some() {
                            return Err(wrong("rows came before those before them were answered"));
                        }
                        work = Some(Box::pin(self.compute(order, over.clone())));
                    }
                }
            }
        }
    }

    fn bounds(&self, weight_bytes: u64) -> Bounds {
        Bounds {
            weight_bytes,
            vocab_size: self.teacher.vocab_size,
            steps: self.options.steps,
            batch_rows: self.options.train.batch_rows,
        }
    }

    /// A trainer at the weights before training, which the store may be about to get.
    async fn load(&self, initial_key: String) -> Result<Done> {
        let folder = self.workspace.path().join("initial");
        let mut wait = POLL.0;
        loop {
            match checkpoint::fetch_below(&self.cx.store, &initial_key, "model/", &folder).await {
                Ok(_) => break,
                Err(error) if error.code == Code::ObjectNotFound => {
                    tokio::time::sleep(wait).await;
                    wait = (wait * 3 / 2).min(POLL.1);
                }
                Err(error) => return Err(error),
            }
        }
        let (device, kind, options) = (self.settings.device, self.settings.kind, self.options.clone());
        let spec = self.attempt.spec.clone();
        let load = move |slot: &mut Option<Trainer>| -> Result<Done> {
            // The one before must make room first.
            *slot = None;
            let mut trainer = Trainer::new(initial_model(&folder.join("model"), &spec, device, kind)?, options)?;
            std::fs::remove_dir_all(&folder).map_err(|error| Error::io(&folder, error))?;
            trainer.optimizer.forget_moments()?;
            trainer.say_sizes();
            let optimizer = &slot.insert(trainer).optimizer;
            Ok(Done::Loaded(exchange::print(optimizer), exchange::bytes(optimizer)))
        };
        self.thread.call(load).await?
    }

    async fn compute(&self, order: Received, over: CancellationToken) -> Result<Done> {
        let (cx, threads) = (self.cx.clone(), self.settings.threads);
        let compute = move |slot: &mut Option<Trainer>| -> Result<Done> {
            threads.enter(order.teacher_done);
            let trainer = slot.as_mut().ok_or_else(no_trainer)?;
            if let Some(weights) = order.weights {
                exchange::set_weights(&mut trainer.optimizer, &weights)?;
            }
            trainer.progress.step = order.step;
            let check = || if over.is_cancelled() { Err(lost("its stream has ended")) } else { cx.check() };
            let share = trainer.share(&order.rows, order.weight, &check)?;
            let gradient = exchange::gradient(&trainer.optimizer)?;
            trainer.optimizer.discard()?;
            Ok(Done::Computed(order.step, share, gradient))
        };
        self.thread.call(compute).await?
    }
}

/// Whether another lead, or this one later, may do better.
fn gone(error: &Error) -> bool {
    error.kind() == Kind::Unavailable
}

async fn answer(outgoing: &mpsc::Sender<proto::FollowRequest>, step: u32, share: Share, gradient: Bytes) -> Result<()> {
    let head = proto::ReplicaShare {
        step,
        loss: share.loss,
        positions: share.positions,
        tokens: share.tokens,
        gradient_bytes: gradient.len() as u64,
    };
    send(outgoing, follow_request::What::Share(head)).await?;
    for chunk in chunks(gradient) {
        send(outgoing, follow_request::What::Chunk(chunk)).await?;
    }
    Ok(())
}

async fn send(outgoing: &mpsc::Sender<proto::FollowRequest>, what: follow_request::What) -> Result<()> {
    match tokio::time::timeout(SILENCE, outgoing.send(message(what))).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err(lost("it closed the connection")),
        Err(_) => Err(lost(&format!("it takes no messages for {} s", SILENCE.as_secs()))),
    }
}

fn message(what: follow_request::What) -> proto::FollowRequest {
    proto::FollowRequest { what: Some(what) }
}
