//! One replica as the lead sees it: a task that keeps its stream alive, sends orders and puts answers
//! together.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use retort_core::{
    Code, Error, Result,
    wire::{error_from_proto, error_to_proto},
};
use retort_proto::{self as proto, follow_request, follow_response};
use retort_worker::{
    Stop,
    peer::{SILENCE, ticker},
};
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use super::{
    door::{Arrival, Terms},
    frames::{Order, Parcel},
    lost, wrong,
};
use crate::trainer::{Share, weight};

/// How long a replica that goes may take to hear why.
const FAREWELL: Duration = Duration::from_millis(500);

/// A replica that has its model; dropped, it is told to go.
pub(super) struct Member {
    pub(super) number: u32,
    /// Of its own attempt.
    pub(super) epoch: u64,
    /// Updates that the weights it was sent have seen.
    pub(super) updates: Option<u32>,
    orders: mpsc::Sender<Say>,
    answers: mpsc::Receiver<Computed>,
}

/// What a replica is told.
enum Say {
    Compute(Box<Order>),
    /// The last word.
    Go(Error),
}

/// What a replica answered; share and size are what was expected.
pub(super) struct Computed {
    pub(super) share: Share,
    pub(super) gradient: Vec<u8>,
}

impl Member {
    /// False if it has gone.
    pub(super) fn order(&self, order: Order) -> bool {
        self.orders.try_send(Say::Compute(Box::new(order))).is_ok()
    }

    /// Lets it go, and says why unless it has an order that it has not taken yet.
    pub(super) fn dismiss(self, why: Error) {
        let _ = self.orders.try_send(Say::Go(why));
    }

    /// The answer to the last order; `None` once it has gone.
    pub(super) async fn answer(&mut self) -> Option<Computed> {
        self.answers.recv().await
    }

    pub(super) fn has_gone(&self) -> bool {
        self.orders.is_closed()
    }
}

/// Serves a replica until one of both has enough; it is given to `ready` when it has its model.
pub(super) async fn serve(arrival: Arrival, terms: Arc<Terms>, ready: mpsc::Sender<Member>) {
    let Arrival { hello, mut requests, answers } = arrival;
    let number = hello.replica;
    tracing::info!(replica = number, threads = hello.threads, "a replica has come");
    let (orders, mut queue) = mpsc::channel(1);
    let (results, computed) = mpsc::channel(1);
    let due = Due::default();
    let done = terms.done.clone();
    let member = Member { number, epoch: hello.epoch, updates: None, orders, answers: computed };
    let mut inbox = Inbox { terms, number, due: due.clone(), newcomer: Some((member, ready)), results, underway: None };
    let why = tokio::select! {
        biased;
        why = read(&mut requests, &mut inbox) => why,
        why = write(&answers, &mut queue, &due) => why,
        () = done.cancelled() => Stop::TrainingEnded.error(),
    };
    // The lead waits no longer.
    drop((inbox, queue));
    if why.code == Code::TrainingEnded {
        tracing::info!(replica = number, "a replica may go: {}", why.message);
    } else {
        tracing::warn!(replica = number, code = %why.code, "a replica has gone: {}", why.chain());
    }
    let over = follow_response::What::Over(error_to_proto(&why));
    let _ = tokio::time::timeout(FAREWELL, answers.send(message(over))).await;
}

/// The share that is waited for, as the lead reckons it.
#[derive(Clone, Default)]
struct Due(Arc<Mutex<Option<(u32, Share)>>>);

impl Due {
    fn set(&self, order: &Order) {
        let positions = order.rows.iter().map(|row| row.targets.len() as u64).sum();
        let tokens = order.rows.iter().map(|row| row.input_len() as u64).sum();
        let share = Share { loss: 0.0, positions, weight: weight(&order.rows), tokens };
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((order.step, share));
    }

    fn take(&self) -> Option<(u32, Share)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Puts a replica's messages together.
struct Inbox {
    terms: Arc<Terms>,
    number: u32,
    due: Due,
    /// Until it is ready.
    newcomer: Option<(Member, mpsc::Sender<Member>)>,
    results: mpsc::Sender<Computed>,
    underway: Option<(Share, Parcel)>,
}

impl Inbox {
    fn take(&mut self, what: follow_request::What) -> Result<()> {
        use follow_request::What;
        match (&mut self.underway, what) {
            (_, What::Alive(_)) => Ok(()),
            (_, What::Leave(why)) => Err(error_from_proto(why)),
            (Some((_, parcel)), What::Chunk(chunk)) => {
                if parcel.take(&chunk)?
                    && let Some((share, parcel)) = self.underway.take()
                {
                    let computed = Computed { share, gradient: parcel.into_bytes() };
                    self.results.try_send(computed).map_err(|_| lost("nobody waits for its share any more"))?;
                }
                Ok(())
            }
            (Some(_), _) => Err(wrong("a gradient is interrupted by another message")),
            (None, What::Ready(theirs)) => {
                let (member, ready) = self.newcomer.take().ok_or_else(|| wrong("a replica is ready twice"))?;
                self.terms.check_parameters(self.number, &theirs.parameters_sha256)?;
                ready.try_send(member).map_err(|_| lost("too many replicas came at once"))
            }
            (None, What::Share(head)) => self.announced(&head),
            (None, _) => Err(wrong("a message that does not belong here")),
        }
    }

    fn announced(&mut self, head: &proto::ReplicaShare) -> Result<()> {
        let (step, due) = self.due.take().ok_or_else(|| wrong("a share that was not asked for"))?;
        let of_order = (head.step, head.positions, head.tokens) == (step, due.positions, due.tokens);
        if !of_order || !head.loss.is_finite() || head.gradient_bytes != self.terms.gradient_bytes {
            return Err(wrong(&format!(
                "a share of step {} with loss {}, {} target tokens of {} and {} bytes, where step {step}, {} of {} and {} bytes are due",
                head.step,
                head.loss,
                head.positions,
                head.tokens,
                head.gradient_bytes,
                due.positions,
                due.tokens,
                self.terms.gradient_bytes
            )));
        }
        self.underway = Some((Share { loss: head.loss, ..due }, Parcel::of(head.gradient_bytes)));
        Ok(())
    }
}

async fn read(requests: &mut Streaming<proto::FollowRequest>, inbox: &mut Inbox) -> Error {
    loop {
        let what = match tokio::time::timeout(SILENCE, requests.message()).await {
            Ok(Ok(Some(message))) => message.what,
            Ok(Ok(None)) => return lost("it closed the connection"),
            Ok(Err(status)) => return lost(&format!("the connection broke ({})", status.message())),
            Err(_) => return lost(&format!("nothing heard for {} s", SILENCE.as_secs())),
        };
        let taken = what.ok_or_else(|| wrong("a message that says nothing")).and_then(|what| inbox.take(what));
        if let Err(error) = taken {
            return error;
        }
    }
}

async fn write(
    answers: &mpsc::Sender<Result<proto::FollowResponse, Status>>,
    queue: &mut mpsc::Receiver<Say>,
    due: &Due,
) -> Error {
    let send =
        async |what: follow_response::What| match tokio::time::timeout(SILENCE, answers.send(message(what))).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(lost("it closed the connection")),
            Err(_) => Err(lost(&format!("it takes no messages for {} s", SILENCE.as_secs()))),
        };
    let mut tick = ticker();
    loop {
        let order = tokio::select! {
            biased;
            _ = tick.tick() => None,
            said = queue.recv() => match said {
                None => return Error::new(Code::WorkerStopped, "the lead goes on without this replica"),
                Some(Say::Go(why)) => return why,
                Some(Say::Compute(order)) => Some(order),
            },
        };
        let sent = match order {
            None => send(follow_response::What::Alive(proto::Alive {})).await,
            Some(order) => {
                due.set(&order);
                let mut sent = Ok(());
                for what in order.into_messages() {
                    sent = send(what).await;
                    if sent.is_err() {
                        break;
                    }
                }
                sent
            }
        };
        if let Err(error) = sent {
            return error;
        }
    }
}

fn message(what: follow_response::What) -> Result<proto::FollowResponse, Status> {
    Ok(proto::FollowResponse { what: Some(what) })
}
