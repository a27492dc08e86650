//! The lead's gRPC service: looks at who comes in, and hands the streams on.

use std::sync::Arc;

use retort_artifact::sha256_hex;
use retort_core::{Code, Error, Result, wire::to_status};
use retort_proto::{self as proto, follow_request, train_service_server::TrainService};
use retort_worker::peer::SILENCE;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::{PROTOCOL, wrong};

/// Messages that wait for the network: four chunks.
const ANSWERS: usize = 4;

/// What a replica must show, and what it is told.
#[derive(Clone)]
pub(super) struct Terms {
    pub(super) job: String,
    /// Of the lead's attempt.
    pub(super) epoch: u64,
    pub(super) token: String,
    pub(super) spec_sha256: String,
    pub(super) dtype: &'static str,
    /// Replicas are numbered from 1 to before this.
    pub(super) workers: u32,
    pub(super) initial_key: String,
    pub(super) parameters_sha256: String,
    /// Of all trained parameters.
    pub(super) gradient_bytes: u64,
    /// Nothing is left to train: every replica may go.
    pub(super) done: CancellationToken,
}

/// A replica whose hello fits.
pub(super) struct Arrival {
    pub(super) hello: proto::ReplicaHello,
    pub(super) requests: Streaming<proto::FollowRequest>,
    pub(super) answers: mpsc::Sender<Result<proto::FollowResponse, Status>>,
}

pub(super) struct Door {
    terms: Arc<Terms>,
    arrivals: mpsc::Sender<Arrival>,
}

impl Door {
    pub(super) fn new(terms: Arc<Terms>, arrivals: mpsc::Sender<Arrival>) -> Self {
        Self { terms, arrivals }
    }
}

impl Terms {
    /// `request-invalid` for whoever does not belong to this attempt, `replica-mismatch` for one that does and
    /// cannot take part.
    fn check(&self, hello: &proto::ReplicaHello) -> Result<()> {
        // Hashes, so that the time it takes says nothing about the token.
        let proven = sha256_hex(hello.token.as_bytes()) == sha256_hex(self.token.as_bytes());
        if !proven || hello.job_id != self.job || hello.lead_epoch != self.epoch {
            return Err(Error::new(
                Code::RequestInvalid,
                format!(
                    "who calls does not know the token of attempt {} at {}/train; the store says it to the job's workers",
                    self.epoch, self.job
                ),
            ));
        }
        if hello.replica == 0 || hello.replica >= self.workers {
            return Err(Error::new(
                Code::RequestInvalid,
                format!("replica {} of a training with {} workers, itself included", hello.replica, self.workers),
            ));
        }
        let protocol = hello.protocol.to_string();
        for (what, theirs, own) in [
            ("version", hello.version.as_str(), env!("CARGO_PKG_VERSION")),
            ("protocol", &protocol, &PROTOCOL.to_string()),
            ("spec", &hello.spec_sha256, &self.spec_sha256),
            ("dtype", &hello.dtype, self.dtype),
        ] {
            mismatch(hello.replica, what, theirs, own)?;
        }
        Ok(())
    }

    /// Whether a replica's model is the lead's.
    pub(super) fn check_parameters(&self, replica: u32, parameters_sha256: &str) -> Result<()> {
        mismatch(replica, "parameters", parameters_sha256, &self.parameters_sha256)
    }
}

fn mismatch(replica: u32, what: &str, theirs: &str, own: &str) -> Result<()> {
    if theirs == own {
        return Ok(());
    }
    let theirs: String = theirs.chars().take(100).collect();
    Err(Error::new(
        Code::ReplicaMismatch,
        format!("{what}: replica {replica} has {theirs:?} and the lead {own:?}; start every student of the pool alike"),
    ))
}

#[tonic::async_trait]
impl TrainService for Door {
    type FollowStream = ReceiverStream<Result<proto::FollowResponse, Status>>;

    async fn follow(
        &self,
        request: Request<Streaming<proto::FollowRequest>>,
    ) -> Result<Response<Self::FollowStream>, Status> {
        let mut requests = request.into_inner();
        let first = match tokio::time::timeout(SILENCE, requests.message()).await {
            Ok(first) => first?,
            Err(_) => return Err(Status::deadline_exceeded("nothing was said")),
        };
        let Some(follow_request::What::Hello(hello)) = first.and_then(|message| message.what) else {
            return Err(to_status(&wrong("a stream begins with something else than a hello")));
        };
        self.terms.check(&hello).map_err(|error| to_status(&error))?;
        let (answers, stream) = mpsc::channel(ANSWERS);
        let welcome = proto::LeadWelcome { initial_key: self.terms.initial_key.clone() };
        let _ =
            answers.try_send(Ok(proto::FollowResponse { what: Some(proto::follow_response::What::Welcome(welcome)) }));
        let arrival = Arrival { hello, requests, answers };
        self.arrivals.send(arrival).await.map_err(|_| Status::unavailable("the training has ended"))?;
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}
