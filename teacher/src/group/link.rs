//! A link of the ring: the sending end, and the receiving one.

use std::{sync::Arc, time::Duration};

use retort_core::{Error, Result};
use retort_proto::{self as proto, pass_request, pass_response};
use retort_worker::peer::ticker;
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::{
    dial::{RETRY, SILENCE, closed, dial, passes, refusal, silent},
    door::Inlet,
    frames::{Assembly, Work},
    health::Health,
    place::Place,
    wire::wrong,
};

/// Messages that wait for the network: four chunks of activations.
const OUTGOING: usize = 4;

/// Sends `work` to the next stage until the group ends; tells `linked` when that stage has answered.
pub(super) async fn send(
    place: Place,
    incarnation: u64,
    health: Health,
    mut work: mpsc::Receiver<Work>,
    linked: oneshot::Sender<()>,
) -> Result<()> {
    let next = place.next();
    let (messages, mut answers) = tokio::select! {
        opened = open(&place, incarnation) => opened?,
        _ = health.broken() => return Ok(()),
    };
    let _ = linked.send(());
    let pump = async {
        let mut tick = ticker();
        loop {
            let next = tokio::select! {
                biased;
                _ = tick.tick() => {
                    let beat = pass_request::What::Beat(proto::Beat::default());
                    if messages.send(message(beat)).await.is_err() { return }
                    continue;
                }
                next = work.recv() => next,
            };
            // The model thread has gone: the group is ending.
            let Some(next) = next else { return std::future::pending().await };
            for what in next.into_messages() {
                if messages.send(message(what)).await.is_err() {
                    return;
                }
            }
        }
    };
    let listen = async {
        loop {
            match tokio::time::timeout(SILENCE, answers.message()).await {
                Ok(Ok(Some(_))) => {}
                Ok(Ok(None)) => return closed(&place, next, None),
                Ok(Err(status)) => return closed(&place, next, Some(&status)),
                Err(_) => return silent(&place, next),
            }
        }
    };
    tokio::select! {
        biased;
        _ = farewell(&health) => Ok(()),
        error = listen => Err(error),
        () = pump => Err(closed(&place, next, None)),
    }
}

type Opened = (mpsc::Sender<proto::PassRequest>, Streaming<proto::PassResponse>);

/// Tries until the next stage answers, or refuses for good.
async fn open(place: &Place, incarnation: u64) -> Result<Opened> {
    let give_up = Instant::now() + place.patience;
    loop {
        match try_open(place, incarnation).await {
            Err(error) if passes(&error) && Instant::now() < give_up => {
                tracing::debug!("no link yet: {}", error.chain());
                tokio::time::sleep(RETRY).await;
            }
            other => return other,
        }
    }
}

async fn try_open(place: &Place, incarnation: u64) -> Result<Opened> {
    let next = place.next();
    let mut client = dial(place, next).await?;
    let (messages, outgoing) = mpsc::channel(OUTGOING);
    let link = proto::StageLink {
        group: place.group.clone(),
        incarnation,
        from_stage: place.stage as u32,
        to_stage: next as u32,
    };
    let _ = messages.try_send(message(pass_request::What::Link(link)));
    let answer = tokio::time::timeout(SILENCE, client.pass(ReceiverStream::new(outgoing))).await;
    let mut answers = match answer {
        Ok(Ok(answer)) => answer.into_inner(),
        Ok(Err(status)) => return Err(refusal(place, next, &status)),
        Err(_) => return Err(silent(place, next)),
    };
    match tokio::time::timeout(SILENCE, answers.message()).await {
        Ok(Ok(Some(proto::PassResponse { what: Some(pass_response::What::Linked(_)) }))) => Ok((messages, answers)),
        Ok(Ok(_)) => Err(wrong("a link was answered with something else than that it stands")),
        Ok(Err(status)) => Err(refusal(place, next, &status)),
        Err(_) => Err(silent(place, next)),
    }
}

/// What became of a piece of work that arrived.
pub(super) type Deliver = Arc<dyn Fn(Work) -> Result<()> + Send + Sync>;

/// Takes work from the stage before, until the group ends. `row_bytes` says what a token's activations
/// take in the layers that are loaded now.
pub(super) async fn receive(
    place: Place,
    health: Health,
    inlet: Inlet,
    row_bytes: impl Fn() -> u64 + Send,
    deliver: Deliver,
) -> Result<()> {
    let before = (place.stage + place.stages() - 1) % place.stages();
    let Inlet { mut messages, answers } = inlet;
    let mut assembly = Assembly::default();
    let read = async {
        loop {
            let what = match tokio::time::timeout(SILENCE, messages.message()).await {
                Ok(Ok(Some(message))) => message.what,
                Ok(Ok(None)) => return closed(&place, before, None),
                Ok(Err(status)) => return closed(&place, before, Some(&status)),
                Err(_) => return silent(&place, before),
            };
            let Some(what) = what else { return wrong("a message that says nothing") };
            let taken = assembly.take(what, row_bytes()).and_then(|work| work.map_or(Ok(()), |work| deliver(work)));
            if let Err(error) = taken {
                return Error::new(error.code, format!("from {}: {}", place.name(before), error.message));
            }
        }
    };
    let beat = async {
        let mut tick = ticker();
        loop {
            tick.tick().await;
            let beat = pass_response::What::Beat(proto::Beat::default());
            if answers.send(Ok(proto::PassResponse { what: Some(beat) })).await.is_err() {
                return closed(&place, before, None);
            }
        }
    };
    tokio::select! {
        biased;
        _ = farewell(&health) => Ok(()),
        error = read => Err(error),
        error = beat => Err(error),
    }
}

/// Waits until the group is broken, and then until the others have heard why: a stream that ends before
/// would tell them less.
async fn farewell(health: &Health) {
    health.broken().await;
    tokio::time::sleep(FAREWELL).await;
}

/// How long a stage that ends leaves the others to hear why.
pub(super) const FAREWELL: Duration = Duration::from_millis(500);

fn message(what: pass_request::What) -> proto::PassRequest {
    proto::PassRequest { what: Some(what) }
}
