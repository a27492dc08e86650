//! A stage that is not the first: it listens, is joined by stage 0, loads what it is told to, and
//! computes what comes from the stage before.
//!
//! A member belongs to one life of its group. When that ends, however it ends, so does the process:
//! whoever started it starts the whole group again.

mod model_thread;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use retort_core::{
    Code, Error, Result,
    task_group::TaskGroup,
    wire::{error_from_proto, error_to_proto},
};
use retort_llama::Part;
use retort_process::Ready;
use retort_proto::{self as proto, join_request, join_response};
use retort_worker::peer;
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot},
};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;

use super::{
    computer::Computer,
    dial::{SILENCE, closed, silent},
    door::{Door, Inlet, Joined},
    frames::{MAX_MESSAGE, Work},
    health::Health,
    link,
    place::Place,
    stats::Meter,
    wire::wrong,
};
use model_thread::{ModelThread, Task};

/// After it was asked to stop, a stage waits this long for stage 0 to end the group in good order.
const LEAVE_GRACE: Duration = Duration::from_secs(4);

/// Serves as one stage until the group ends or `shutdown` fires. `make` is called on the model thread.
///
/// Prints the readiness line once it listens. Errors: `group-broken` with what was seen, however the
/// group ended; `Ok` only after `shutdown`.
pub async fn serve(
    place: Place,
    dtype: &str,
    make: impl FnOnce() -> Box<dyn Computer> + Send + 'static,
    shutdown: &CancellationToken,
) -> Result<()> {
    let listener = listen(&place).await?;
    let address = listener.local_addr().map_or_else(|_| place.listen.clone(), |address| address.to_string());
    let meter = Meter::new(place.stage, &place.peers[place.stage]);
    let (joins, mut joined) = mpsc::channel(1);
    let (inlets, inlet) = mpsc::channel(1);
    let reader = meter.clone();
    let door = Door::new(&place, dtype, None, Some(joins), inlets, Arc::new(move || vec![reader.read()]));
    let ended = CancellationToken::new();
    let mut tasks = TaskGroup::new(ended.clone());
    tasks.spawn("stage-server", serve_door(place.clone(), door, listener, ended.clone())?);

    Ready { ready: "teacher-stage".to_owned(), listen: Some(address) }.announce();
    tracing::info!(group = place.group, stage = place.stage, "waiting for stage 0");
    let joined = tokio::select! {
        joined = joined.recv() => joined,
        () = shutdown.cancelled() => None,
    };
    let Some(joined) = joined else {
        ended.cancel();
        return tasks.join().await;
    };
    let life = Life::new(place, meter, joined.incarnation);
    tracing::info!(incarnation = joined.incarnation, "joined by stage 0");
    let why = life.live(joined, inlet, make, &mut tasks, shutdown).await;
    ended.cancel();
    // A task's own error is what broke the group, or followed from it.
    let _ = tasks.join().await;
    if shutdown.is_cancelled() { Ok(()) } else { Err(why) }
}

pub(super) async fn listen(place: &Place) -> Result<TcpListener> {
    let listener = peer::listen(&place.listen).await?;
    tracing::info!(stage = place.stage, listen = place.listen, group = place.group, "listening for the other stages");
    Ok(listener)
}

/// The server task of a stage.
pub(super) fn serve_door(
    place: Place,
    door: Door,
    listener: TcpListener,
    ended: CancellationToken,
) -> Result<impl Future<Output = Result<()>> + Send + 'static> {
    let service = proto::stage_service_server::StageServiceServer::new(door)
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    let mut server = peer::server(place.tls.as_ref())?;
    Ok(async move {
        let serving = server.add_service(service).serve_with_incoming(TcpListenerStream::new(listener));
        tokio::select! {
            served = serving => served.map_err(|error| {
                Error::with_source(Code::GroupBroken, format!("{} can serve no more", place.name(place.stage)), error)
            }),
            // Open streams end with the process.
            () = ended.cancelled() => Ok(()),
        }
    })
}

/// One life of the group, seen from a member.
struct Life {
    place: Place,
    meter: Meter,
    incarnation: u64,
    health: Health,
    /// Bytes of a token's activations in the loaded layers; 0 before.
    row_bytes: Arc<AtomicU64>,
}

impl Life {
    fn new(place: Place, meter: Meter, incarnation: u64) -> Self {
        Self { place, meter, incarnation, health: Health::default(), row_bytes: Arc::default() }
    }

    /// Until the group ends; says why it did.
    async fn live(
        &self,
        joined: Joined,
        mut inlets: mpsc::Receiver<Inlet>,
        make: impl FnOnce() -> Box<dyn Computer> + Send + 'static,
        tasks: &mut TaskGroup,
        shutdown: &CancellationToken,
    ) -> Error {
        let (place, health) = (&self.place, &self.health);
        // What stage 0 keeps under way fits; a sender of more is none of ours.
        let (todo, inbox) = mpsc::channel::<Task>(2 * place.stages() + 16);
        let (work, outgoing) = mpsc::channel(1);
        let (linked, link_stands) = oneshot::channel();
        let answers = joined.answers.clone();
        if let Err(error) = self.start_model_thread(make, inbox, work, joined.answers.clone()) {
            return error;
        }

        let sending = link::send(place.clone(), self.incarnation, health.clone(), outgoing, linked);
        tasks.spawn("stage-link", watched(health.clone(), sending));
        let requests =
            take_requests(place.clone(), health.clone(), joined.requests, todo.clone(), self.reporter(&joined.answers));
        tasks.spawn("stage-join", watched(health.clone(), requests));
        let beats = beat(health.clone(), self.meter.clone(), joined.answers, link_stands);
        tasks.spawn("stage-beat", watched(health.clone(), beats));
        let (row_bytes, own_name) = (Arc::clone(&self.row_bytes), place.name(place.stage));
        let deliver: link::Deliver = Arc::new(move |work| {
            todo.try_send(Task::Work(work)).map_err(|_| wrong(&format!("more steps than {own_name} agreed to")))
        });
        let (inlet_place, inlet_health) = (place.clone(), health.clone());
        let receiving = async move {
            let inlet = tokio::select! {
                inlet = inlets.recv() => inlet,
                _ = inlet_health.broken() => None,
            };
            let Some(inlet) = inlet else { return Ok(()) };
            let row_bytes = move || row_bytes.load(Ordering::Acquire);
            link::receive(inlet_place, inlet_health, inlet, row_bytes, deliver).await
        };
        tasks.spawn("stage-inlet", watched(health.clone(), receiving));

        let why = tokio::select! {
            why = health.broken() => why,
            () = shutdown.cancelled() => {
                // All stages are asked to stop at once, and stage 0 hands its task back first.
                let _ = tokio::time::timeout(LEAVE_GRACE, health.broken()).await;
                Error::new(Code::GroupBroken, format!("{} was asked to stop", place.name(place.stage)))
            }
        };
        health.break_with(&why);
        let broken = join_response::What::Broken(error_to_proto(&why));
        let _ = answers.try_send(Ok(proto::JoinResponse { what: Some(broken) }));
        tokio::time::sleep(link::FAREWELL).await;
        why
    }

    /// Tells stage 0 what this stage has been doing.
    fn reporter(&self, answers: &mpsc::Sender<Result<proto::JoinResponse, tonic::Status>>) -> impl Fn() + Send + use<> {
        let (meter, answers) = (self.meter.clone(), answers.clone());
        move || {
            let what = join_response::What::Reported(meter.read());
            // With answers piled up, stage 0 is about to break the group.
            let _ = answers.try_send(Ok(proto::JoinResponse { what: Some(what) }));
        }
    }

    fn start_model_thread(
        &self,
        make: impl FnOnce() -> Box<dyn Computer> + Send + 'static,
        inbox: mpsc::Receiver<Task>,
        outgoing: mpsc::Sender<Work>,
        answers: mpsc::Sender<Result<proto::JoinResponse, tonic::Status>>,
    ) -> Result<()> {
        let (health, row_bytes) = (self.health.clone(), Arc::clone(&self.row_bytes));
        let (place, meter) = (self.place.clone(), self.meter.clone());
        let whole = move || {
            let name = place.name(place.stage);
            let run = AssertUnwindSafe(|| {
                let mut computer = make();
                let mut model = ModelThread { place, meter, row_bytes, outgoing, answers, failed: None };
                model.run(computer.as_mut(), inbox)
            });
            let ended = catch_unwind(run).unwrap_or_else(|_| {
                Err(Error::new(Code::GroupBroken, format!("{name} panicked; its message is above in its log")))
            });
            if let Err(error) = ended {
                health.break_with(&error);
            }
        };
        std::thread::Builder::new()
            .name("stage-model".to_owned())
            .spawn(whole)
            .map_err(|error| Error::internal(format!("cannot start the model thread: {error}")))?;
        Ok(())
    }
}

/// Reads what stage 0 wants.
async fn take_requests(
    place: Place,
    health: Health,
    mut requests: tonic::Streaming<proto::JoinRequest>,
    todo: mpsc::Sender<Task>,
    report: impl Fn() + Send,
) -> Result<()> {
    loop {
        let request = tokio::select! {
            _ = health.broken() => return Ok(()),
            request = tokio::time::timeout(SILENCE, requests.message()) => request,
        };
        let request = match request {
            Ok(Ok(Some(request))) => request,
            Ok(Ok(None)) => return Err(closed(&place, 0, None)),
            Ok(Err(status)) => return Err(closed(&place, 0, Some(&status))),
            Err(_) => return Err(silent(&place, 0)),
        };
        let task = match request.what {
            Some(join_request::What::Beat(_)) => continue,
            Some(join_request::What::Report(_)) => {
                report();
                continue;
            }
            Some(join_request::What::Open(open)) => Task::Open(open.model.into()),
            Some(join_request::What::Load(load)) => {
                let layers = load.first_layer as usize..load.end_layer as usize;
                let part = Part { layers, embeds: false, heads: place.stage + 1 == place.stages() };
                Task::Load(load.model.into(), part)
            }
            Some(join_request::What::Leave(error)) => {
                let why = error_from_proto(error);
                return Err(Error::new(Code::GroupBroken, format!("stage 0 ends the group: {}", why.message)));
            }
            Some(join_request::What::Hello(_)) | None => {
                return Err(wrong("stage 0 says something else than a request"));
            }
        };
        if todo.try_send(task).is_err() {
            return Err(wrong("stage 0 asks for more before the last was done"));
        }
    }
}

/// Tells stage 0 that this stage lives, and what it has been doing.
async fn beat(
    health: Health,
    meter: Meter,
    answers: mpsc::Sender<Result<proto::JoinResponse, tonic::Status>>,
    link_stands: oneshot::Receiver<()>,
) -> Result<()> {
    let mut tick = peer::ticker();
    let link_stands = async {
        // Without an answer the link has failed, and its own task says why.
        if link_stands.await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    tokio::pin!(link_stands);
    let mut told = false;
    loop {
        let what = tokio::select! {
            _ = health.broken() => return Ok(()),
            _ = tick.tick() => join_response::What::Beat(proto::Beat { stats: Some(meter.read()) }),
            () = &mut link_stands, if !told => {
                told = true;
                join_response::What::Linked(proto::Linked {})
            }
        };
        if answers.send(Ok(proto::JoinResponse { what: Some(what) })).await.is_err() {
            // The reader of stage 0's requests knows more of why.
            return Ok(());
        }
    }
}

/// What breaks a task breaks the group.
pub(super) async fn watched(health: Health, task: impl Future<Output = Result<()>>) -> Result<()> {
    if let Err(error) = task.await {
        health.break_with(&error);
    }
    Ok(())
}
