//! Stage 0's side of a join: one task for each other stage, which keeps the stream alive and brings its
//! answers.

use std::{
    ops::Range,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use retort_core::{
    Code, Error, Result,
    wire::{error_from_proto, error_to_proto},
};
use retort_proto::{self as proto, join_request, join_response};
use retort_worker::peer::ticker;
use tokio::{sync::mpsc, time::Instant};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::{
    dial::{RETRY, SILENCE, closed, dial, passes, refusal, silent},
    health::Health,
    identity::{compare, hello},
    link::FAREWELL,
    place::Place,
    wire::wrong,
};

/// What a stage answered.
#[derive(Debug)]
pub(super) enum Answer {
    Linked,
    Opened(proto::ModelOpened),
    Loaded(proto::LayersLoaded),
    Reported,
    Refused(Error),
}

/// Another stage, as stage 0's model thread talks to it.
pub(super) struct Peer {
    stage: usize,
    requests: mpsc::Sender<join_request::What>,
    answers: mpsc::Receiver<Answer>,
    health: Health,
}

/// The latest that each other stage said of its time, by stage from 1.
pub(super) type PeerStats = Arc<Mutex<Vec<proto::StageStats>>>;

impl Peer {
    /// The peer, and the task that attends to it.
    pub(super) fn new(
        place: &Place,
        stage: usize,
        incarnation: u64,
        dtype: &str,
        health: &Health,
        stats: &PeerStats,
    ) -> (Self, impl Future<Output = Result<()>> + Send + 'static) {
        let (requests, wanted) = mpsc::channel(4);
        let (said, answers) = mpsc::channel(4);
        let attendant = Attendant {
            hello: hello(place, stage, incarnation, dtype),
            place: place.clone(),
            stage,
            health: health.clone(),
            stats: Arc::clone(stats),
        };
        (Self { stage, requests, answers, health: health.clone() }, attendant.attend(wanted, said))
    }

    pub(super) async fn linked(&mut self) -> Result<()> {
        match self.answers.recv().await {
            Some(Answer::Linked) => Ok(()),
            other => Err(self.unexpected(other)),
        }
    }

    pub(super) fn ask_open(&self, model: &Path) -> Result<()> {
        self.ask(join_request::What::Open(proto::OpenModel { model: text(model)? }))
    }

    pub(super) fn opened(&mut self) -> Result<proto::ModelOpened> {
        match self.answers.blocking_recv() {
            Some(Answer::Opened(opened)) => Ok(opened),
            other => Err(self.unexpected(other)),
        }
    }

    pub(super) fn ask_load(&self, model: &Path, layers: &Range<usize>) -> Result<()> {
        let (first_layer, end_layer) = (layers.start as u32, layers.end as u32);
        self.ask(join_request::What::Load(proto::LoadLayers { model: text(model)?, first_layer, end_layer }))
    }

    pub(super) fn loaded(&mut self) -> Result<proto::LayersLoaded> {
        match self.answers.blocking_recv() {
            Some(Answer::Loaded(loaded)) => Ok(loaded),
            other => Err(self.unexpected(other)),
        }
    }

    pub(super) fn ask_report(&self) -> Result<()> {
        self.ask(join_request::What::Report(proto::ReportStats {}))
    }

    /// Waits until the peer's figures are those of now.
    pub(super) fn reported(&mut self) -> Result<()> {
        match self.answers.blocking_recv() {
            Some(Answer::Reported) => Ok(()),
            other => Err(self.unexpected(other)),
        }
    }

    fn ask(&self, what: join_request::What) -> Result<()> {
        self.requests.blocking_send(what).map_err(|_| self.health.why_closed())
    }

    fn unexpected(&self, answer: Option<Answer>) -> Error {
        match answer {
            None => self.health.why_closed(),
            Some(Answer::Refused(error)) => Error::new(error.code, format!("stage {}: {}", self.stage, error.message)),
            Some(other) => wrong(&format!("stage {} answers {other:?}, which nobody asked", self.stage)),
        }
    }
}

struct Attendant {
    place: Place,
    stage: usize,
    hello: proto::StageHello,
    health: Health,
    stats: PeerStats,
}

type Opened = (mpsc::Sender<proto::JoinRequest>, Streaming<proto::JoinResponse>);

impl Attendant {
    async fn attend(self, mut wanted: mpsc::Receiver<join_request::What>, said: mpsc::Sender<Answer>) -> Result<()> {
        let opened = tokio::select! {
            opened = self.open() => opened,
            _ = self.health.broken() => return Ok(()),
        };
        let (requests, mut answers) = opened?;
        tracing::info!("{} has joined", self.place.name(self.stage));
        let ask = async {
            let mut tick = ticker();
            loop {
                let what = tokio::select! {
                    _ = tick.tick() => join_request::What::Beat(proto::Beat::default()),
                    Some(what) = wanted.recv() => what,
                };
                if requests.send(proto::JoinRequest { what: Some(what) }).await.is_err() {
                    return closed(&self.place, self.stage, None);
                }
            }
        };
        let hear = async {
            loop {
                let answer = match tokio::time::timeout(SILENCE, answers.message()).await {
                    Ok(Ok(Some(answer))) => answer,
                    Ok(Ok(None)) => return closed(&self.place, self.stage, None),
                    Ok(Err(status)) => return closed(&self.place, self.stage, Some(&status)),
                    Err(_) => return silent(&self.place, self.stage),
                };
                let answer = match answer.what {
                    Some(join_response::What::Beat(beat)) => {
                        self.note(beat.stats);
                        continue;
                    }
                    Some(join_response::What::Broken(error)) => return error_from_proto(error),
                    Some(join_response::What::Reported(stats)) => {
                        self.note(Some(stats));
                        Answer::Reported
                    }
                    Some(join_response::What::Linked(_)) => Answer::Linked,
                    Some(join_response::What::Opened(opened)) => Answer::Opened(opened),
                    Some(join_response::What::Loaded(loaded)) => Answer::Loaded(loaded),
                    Some(join_response::What::Refused(error)) => Answer::Refused(error_from_proto(error)),
                    Some(join_response::What::Welcome(_)) | None => return wrong("an answer that nobody asked for"),
                };
                if said.try_send(answer).is_err() {
                    return wrong("more answers than questions");
                }
            }
        };
        let ended = tokio::select! {
            biased;
            why = self.health.broken() => Ok(why),
            error = hear => Err(error),
            error = ask => Err(error),
        };
        // The stage is told, if it can still hear; it ends by itself in any case.
        let why = match &ended {
            Ok(why) | Err(why) => why,
        };
        let leave = join_request::What::Leave(error_to_proto(why));
        let _ = requests.try_send(proto::JoinRequest { what: Some(leave) });
        if let Err(error) = &ended {
            self.health.break_with(error);
        }
        tokio::time::sleep(FAREWELL).await;
        ended.map(|_| ())
    }

    /// Tries until the stage is there, or refuses for good.
    async fn open(&self) -> Result<Opened> {
        let give_up = Instant::now() + self.place.patience;
        let mut told = false;
        loop {
            match self.try_open().await {
                Err(error) if passes(&error) && Instant::now() < give_up => {
                    if !told {
                        tracing::info!("waiting: {}", error.chain());
                        told = true;
                    }
                    tokio::time::sleep(RETRY).await;
                }
                Err(error) if passes(&error) => {
                    let seconds = self.place.patience.as_secs();
                    let message = format!("waited {seconds} s (--group-patience) in vain: {}", error.chain());
                    return Err(Error::new(error.code, message));
                }
                other => return other,
            }
        }
    }

    async fn try_open(&self) -> Result<Opened> {
        let (place, stage) = (&self.place, self.stage);
        let mut client = dial(place, stage).await?;
        let (requests, outgoing) = mpsc::channel(8);
        let hello = join_request::What::Hello(self.hello.clone());
        let _ = requests.try_send(proto::JoinRequest { what: Some(hello) });
        let answer = tokio::time::timeout(SILENCE, client.join(ReceiverStream::new(outgoing))).await;
        let mut answers = match answer {
            Ok(Ok(answer)) => answer.into_inner(),
            Ok(Err(status)) => return Err(refusal(place, stage, &status)),
            Err(_) => return Err(silent(place, stage)),
        };
        match tokio::time::timeout(SILENCE, answers.message()).await {
            Ok(Ok(Some(proto::JoinResponse { what: Some(join_response::What::Welcome(theirs)) }))) => {
                compare(&place.name(0), &self.hello, &place.name(stage), &theirs)?;
                Ok((requests, answers))
            }
            Ok(Ok(_)) => Err(wrong("a hello was answered with something else than a welcome")),
            Ok(Err(status)) => Err(refusal(place, stage, &status)),
            Err(_) => Err(silent(place, stage)),
        }
    }

    fn note(&self, stats: Option<proto::StageStats>) {
        let mut known = self.stats.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(known), Some(stats)) = (known.get_mut(self.stage - 1), stats) {
            *known = stats;
        }
    }
}

fn text(model: &Path) -> Result<String> {
    model.to_str().map(str::to_owned).ok_or_else(|| {
        Error::new(
            Code::RequestInvalid,
            format!("{}: the other stages cannot be told a name that is no UTF-8", model.display()),
        )
    })
}
