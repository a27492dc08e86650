use std::time::Duration;

use async_trait::async_trait;
use retort_core::{Code, Error, Result, wire::from_status};
use retort_proto::{self as proto, worker_service_client::WorkerServiceClient};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};

use crate::{ports, retry};

/// `WorkerService` over gRPC; the channel reconnects by itself.
#[derive(Clone, Debug)]
pub(crate) struct Grpc {
    client: WorkerServiceClient<Channel>,
}

impl Grpc {
    /// Waits until the orchestrator accepts a connection, or `shutdown`.
    pub(crate) async fn connect(url: &str, shutdown: &CancellationToken) -> Result<Self> {
        let endpoint = Endpoint::from_shared(url.to_owned())
            .map_err(|error| {
                Error::new(
                    Code::RequestInvalid,
                    format!("--orchestrator {url:?} is no URL ({error}); write http://host:port"),
                )
            })?
            .connect_timeout(Duration::from_secs(3))
            .timeout(Duration::from_secs(10))
            .http2_keep_alive_interval(Duration::from_secs(10))
            .keep_alive_timeout(Duration::from_secs(5));
        let mut backoff = retry::network();
        loop {
            let error = match endpoint.connect().await {
                Ok(channel) => return Ok(Self { client: WorkerServiceClient::new(channel) }),
                Err(error) => Error::with_source(
                    Code::OrchestratorUnavailable,
                    format!("no orchestrator answers at {url}"),
                    error,
                ),
            };
            tracing::warn!(code = %error.code, "{}; trying again", error.chain());
            tokio::select! {
                () = shutdown.cancelled() => return Err(crate::Stop::WorkerStopping.error()),
                () = tokio::time::sleep(backoff.wait()) => {}
            }
        }
    }
}

#[async_trait]
impl ports::Orchestrator for Grpc {
    async fn claim(&self, request: proto::ClaimTaskRequest) -> Result<proto::ClaimTaskResponse> {
        let answer = self.client.clone().claim_task(request).await;
        answer.map(tonic::Response::into_inner).map_err(|status| from_status(&status))
    }

    async fn heartbeat(&self, request: proto::HeartbeatRequest) -> Result<proto::HeartbeatResponse> {
        let answer = self.client.clone().heartbeat(request).await;
        answer.map(tonic::Response::into_inner).map_err(|status| from_status(&status))
    }

    async fn list_published_shards(
        &self,
        request: proto::ListPublishedShardsRequest,
    ) -> Result<proto::ListPublishedShardsResponse> {
        let answer = self.client.clone().list_published_shards(request).await;
        answer.map(tonic::Response::into_inner).map_err(|status| from_status(&status))
    }

    async fn find_shard(&self, request: proto::FindShardRequest) -> Result<proto::FindShardResponse> {
        let answer = self.client.clone().find_shard(request).await;
        answer.map(tonic::Response::into_inner).map_err(|status| from_status(&status))
    }

    async fn report_corrupt_shard(&self, request: proto::ReportCorruptShardRequest) -> Result<()> {
        let answer = self.client.clone().report_corrupt_shard(request).await;
        answer.map(|_| ()).map_err(|status| from_status(&status))
    }
}
