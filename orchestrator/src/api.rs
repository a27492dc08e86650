//! The gRPC edge: requests in, domain calls, answers out. No decision is taken here.

mod job_service;
mod model_service;
mod paging;
mod watch;
mod worker_service;

use std::{net::SocketAddr, time::Duration};

use retort_core::{Code, Error, Result, wire::to_status};
use retort_proto::{
    DESCRIPTORS, job_service_server::JobServiceServer, model_service_server::ModelServiceServer,
    worker_service_server::WorkerServiceServer,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::{
    Status,
    transport::{Server, server::TcpIncoming},
};

use crate::context::Context;

/// Largest request read and largest answer written, bytes.
const MAX_REQUEST_BYTES: usize = 4 << 20;
const MAX_ANSWER_BYTES: usize = 64 << 20;

/// Takes the address, `host:port`; port 0 takes a free one.
pub async fn bind(address: &str) -> Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse => Error::new(
            Code::PortInUse,
            format!("{address} is taken by another process; stop it, or choose another address with --listen (port 0 takes a free one)"),
        ),
        _ => Error::new(Code::RequestInvalid, format!("--listen {address:?}: {error}; write host:port")),
    })
}

pub fn local_address(listener: &TcpListener) -> Result<SocketAddr> {
    listener.local_addr().map_err(|error| Error::internal(format!("the listener has no address: {error}")))
}

/// Serves until `shutdown`, then lets running calls end.
pub async fn serve(context: Context, listener: TcpListener, shutdown: CancellationToken) -> Result<()> {
    let (health, health_service) = tonic_health::server::health_reporter();
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .map_err(|error| Error::internal(format!("reflection: {error}")))?;
    let jobs = JobServiceServer::new(job_service::Jobs::new(context.clone(), shutdown.clone()))
        .max_decoding_message_size(MAX_REQUEST_BYTES)
        .max_encoding_message_size(MAX_ANSWER_BYTES);
    let models = ModelServiceServer::new(model_service::Models::new(context.clone()))
        .max_decoding_message_size(MAX_REQUEST_BYTES)
        .max_encoding_message_size(MAX_ANSWER_BYTES);
    let workers = WorkerServiceServer::new(worker_service::Workers::new(context))
        .max_decoding_message_size(MAX_REQUEST_BYTES)
        .max_encoding_message_size(MAX_ANSWER_BYTES);
    health.set_serving::<JobServiceServer<job_service::Jobs>>().await;
    health.set_serving::<ModelServiceServer<model_service::Models>>().await;
    health.set_serving::<WorkerServiceServer<worker_service::Workers>>().await;
    Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(20)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .max_concurrent_streams(Some(1024))
        .add_service(health_service)
        .add_service(reflection)
        .add_service(jobs)
        .add_service(models)
        .add_service(workers)
        .serve_with_incoming_shutdown(TcpIncoming::from(listener).with_nodelay(Some(true)), shutdown.cancelled_owned())
        .await
        .map_err(|error| Error::with_source(Code::Internal, "the gRPC server stopped", error))
}

/// Logs what is the service's own fault, then tells the caller.
fn refuse(error: Error) -> Status {
    if error.code == Code::Internal {
        tracing::error!("{}", error.chain());
    }
    to_status(&error)
}

fn invalid(message: String) -> Error {
    Error::new(Code::RequestInvalid, message)
}

#[cfg(test)]
mod tests;
