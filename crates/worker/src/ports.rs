//! What the loop needs from outside, so that tests can stand in for it.

use async_trait::async_trait;
use retort_core::Result;
use retort_proto as proto;

/// `WorkerService`, one call each, no retries: who calls knows how long to go on.
#[async_trait]
pub trait Orchestrator: Send + Sync + 'static {
    async fn claim(&self, request: proto::ClaimTaskRequest) -> Result<proto::ClaimTaskResponse>;
    async fn heartbeat(&self, request: proto::HeartbeatRequest) -> Result<proto::HeartbeatResponse>;
    async fn list_published_shards(
        &self,
        request: proto::ListPublishedShardsRequest,
    ) -> Result<proto::ListPublishedShardsResponse>;
    async fn find_shard(&self, request: proto::FindShardRequest) -> Result<proto::FindShardResponse>;
    async fn report_corrupt_shard(&self, request: proto::ReportCorruptShardRequest) -> Result<()>;
}

/// The event topic.
#[async_trait]
pub trait Events: Send + Sync + 'static {
    /// Answers once the broker has acknowledged the record.
    async fn send(&self, event: &proto::WorkerEvent) -> Result<()>;
}

/// A pool's task topic.
#[async_trait]
pub trait Tasks: Send + Sync {
    type Delivery: Send + Sync;

    fn message<'a>(&self, delivery: &'a Self::Delivery) -> &'a proto::TaskMessage;
    async fn next(&self) -> Result<Self::Delivery>;
    async fn commit(&self, delivery: &Self::Delivery) -> Result<()>;
    /// Leaves the group, so that the others take over at once.
    async fn close(self)
    where
        Self: Sized;
}
