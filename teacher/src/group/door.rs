//! The gRPC service of a stage: looks at who comes in, and hands the streams to the task that owns the
//! stage.

use std::sync::{Arc, Mutex, PoisonError};

use retort_core::{Code, Error, wire::to_status};
use retort_proto::{self as proto, join_request, pass_request, stage_service_server::StageService};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{
    dial::SILENCE,
    identity::{compare, hello},
    place::Place,
    wire::wrong,
};

/// Messages that wait for the network.
const ANSWERS: usize = 16;

/// Stage 0 has come in, and its hello fits.
pub(super) struct Joined {
    pub(super) incarnation: u64,
    pub(super) requests: Streaming<proto::JoinRequest>,
    pub(super) answers: mpsc::Sender<Result<proto::JoinResponse, Status>>,
}

/// The stage before this one has come in, in the group's present life.
pub(super) struct Inlet {
    pub(super) messages: Streaming<proto::PassRequest>,
    pub(super) answers: mpsc::Sender<Result<proto::PassResponse, Status>>,
}

pub(super) type ReadStats = Arc<dyn Fn() -> Vec<proto::StageStats> + Send + Sync>;

/// The service; one life of the group goes through it, then the process ends.
pub(super) struct Door {
    place: Place,
    dtype: String,
    /// Of the life that this process belongs to, once it belongs to one.
    incarnation: Arc<Mutex<Option<u64>>>,
    /// Taken by the first that comes in; `None` on stage 0, which nobody joins.
    joins: Mutex<Option<mpsc::Sender<Joined>>>,
    inlets: Mutex<Option<mpsc::Sender<Inlet>>>,
    stats: ReadStats,
}

impl Door {
    /// `incarnation` is known at once on stage 0, which names it; elsewhere the join brings it.
    pub(super) fn new(
        place: &Place,
        dtype: &str,
        incarnation: Option<u64>,
        joins: Option<mpsc::Sender<Joined>>,
        inlets: mpsc::Sender<Inlet>,
        stats: ReadStats,
    ) -> Self {
        Self {
            place: place.clone(),
            dtype: dtype.to_owned(),
            incarnation: Arc::new(Mutex::new(incarnation)),
            joins: Mutex::new(joins),
            inlets: Mutex::new(Some(inlets)),
            stats,
        }
    }

    fn present(&self) -> Option<u64> {
        *self.incarnation.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks a hello and makes its life this process's own.
    fn admit(&self, theirs: &proto::StageHello) -> Result<mpsc::Sender<Joined>, Error> {
        let own = hello(&self.place, self.place.stage, theirs.incarnation, &self.dtype);
        let who = format!("the stage 0 that calls as group {:?}", theirs.group);
        compare(&self.place.name(self.place.stage), &own, &who, theirs)?;
        let joins = self.joins.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(joins) = joins else {
            let message = match self.present() {
                Some(present) => format!(
                    "{} still belongs to life {present} of the group, not to life {}; it ends when it sees that that one is over",
                    self.place.name(self.place.stage),
                    theirs.incarnation
                ),
                None => format!("{} cannot be joined", self.place.name(self.place.stage)),
            };
            return Err(Error::new(Code::GroupBroken, message));
        };
        *self.incarnation.lock().unwrap_or_else(PoisonError::into_inner) = Some(theirs.incarnation);
        Ok(joins)
    }

    fn admit_link(&self, link: &proto::StageLink) -> Result<mpsc::Sender<Inlet>, Error> {
        let own = self.place.name(self.place.stage);
        let Some(present) = self.present() else {
            return Err(Error::new(Code::GroupBroken, format!("{own} has not been joined by stage 0 yet")));
        };
        let before = (self.place.stage + self.place.stages() - 1) % self.place.stages();
        let expected = (self.place.group.as_str(), present, before as u32, self.place.stage as u32);
        let got = (link.group.as_str(), link.incarnation, link.from_stage, link.to_stage);
        if expected != got {
            return Err(Error::new(
                Code::StageMismatch,
                format!(
                    "a link of group {:?}, life {}, from stage {} to stage {} came to {own}, which takes one of life {present} from stage {before}",
                    got.0, got.1, got.2, got.3
                ),
            ));
        }
        let inlet = self.inlets.lock().unwrap_or_else(PoisonError::into_inner).take();
        inlet.ok_or_else(|| Error::new(Code::StageMismatch, format!("{own} has its link from stage {before} already")))
    }
}

#[tonic::async_trait]
impl StageService for Door {
    type JoinStream = ReceiverStream<Result<proto::JoinResponse, Status>>;
    type PassStream = ReceiverStream<Result<proto::PassResponse, Status>>;

    async fn join(
        &self,
        request: Request<Streaming<proto::JoinRequest>>,
    ) -> Result<Response<Self::JoinStream>, Status> {
        let mut requests = request.into_inner();
        let theirs = match first(&mut requests).await?.and_then(|message| message.what) {
            Some(join_request::What::Hello(hello)) => hello,
            _ => return Err(to_status(&wrong("a join begins with something else than a hello"))),
        };
        let joins = self.admit(&theirs).map_err(|error| to_status(&error))?;
        let (answers, stream) = mpsc::channel(ANSWERS);
        let welcome = hello(&self.place, self.place.stage, theirs.incarnation, &self.dtype);
        let welcome = proto::JoinResponse { what: Some(proto::join_response::What::Welcome(welcome)) };
        let _ = answers.try_send(Ok(welcome));
        let joined = Joined { incarnation: theirs.incarnation, requests, answers };
        joins.send(joined).await.map_err(|_| Status::unavailable("the stage is ending"))?;
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn pass(
        &self,
        request: Request<Streaming<proto::PassRequest>>,
    ) -> Result<Response<Self::PassStream>, Status> {
        let mut messages = request.into_inner();
        let link = match first(&mut messages).await?.and_then(|message| message.what) {
            Some(pass_request::What::Link(link)) => link,
            _ => return Err(to_status(&wrong("a stream begins without saying whose link it is"))),
        };
        let inlets = self.admit_link(&link).map_err(|error| to_status(&error))?;
        let (answers, stream) = mpsc::channel(ANSWERS);
        let linked = proto::PassResponse { what: Some(proto::pass_response::What::Linked(proto::Linked {})) };
        let _ = answers.try_send(Ok(linked));
        inlets.send(Inlet { messages, answers }).await.map_err(|_| Status::unavailable("the stage is ending"))?;
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn get_group_stats(
        &self,
        _: Request<proto::GetGroupStatsRequest>,
    ) -> Result<Response<proto::GetGroupStatsResponse>, Status> {
        Ok(Response::new(proto::GetGroupStatsResponse {
            group: self.place.group.clone(),
            incarnation: self.present().unwrap_or(0),
            stages: (self.stats)(),
        }))
    }
}

/// A caller that says nothing is not kept.
async fn first<T>(messages: &mut Streaming<T>) -> Result<Option<T>, Status> {
    match tokio::time::timeout(SILENCE, messages.message()).await {
        Ok(message) => message,
        Err(_) => Err(Status::deadline_exceeded("nothing was said")),
    }
}
