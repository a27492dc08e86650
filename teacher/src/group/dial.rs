//! How stages reach each other, and how long they wait for a sign of life.

use std::time::Duration;

use retort_core::{Code, Error, Kind, Result, wire::from_status};
use retort_proto::stage_service_client::StageServiceClient;
use tonic::{
    Status,
    transport::{Channel, Endpoint, Server},
};

use super::{
    frames::MAX_MESSAGE,
    place::{Place, host_and_port},
};

/// Every stream carries something at least this often, both ways.
pub(super) const BEAT: Duration = Duration::from_secs(1);
/// A stream that carries nothing for this long has nobody at its other end.
pub(super) const SILENCE: Duration = Duration::from_secs(6);
/// Between two tries to reach a stage that has not started yet.
pub(super) const RETRY: Duration = Duration::from_millis(250);
/// Bytes that may be under way on a stream before the receiver has read any.
const WINDOW: u32 = 16 << 20;

/// Connects to a stage of the group.
pub(super) async fn dial(place: &Place, stage: usize) -> Result<StageServiceClient<Channel>> {
    let address = place.peers.get(stage).ok_or_else(|| Error::internal(format!("no stage {stage} to dial")))?;
    let invalid = |error: tonic::transport::Error| {
        Error::with_source(Code::RequestInvalid, format!("{address} cannot be dialled"), error)
    };
    let scheme = if place.tls.is_some() { "https" } else { "http" };
    let mut endpoint = Endpoint::from_shared(format!("{scheme}://{address}")).map_err(invalid)?;
    if let Some(tls) = &place.tls {
        endpoint = endpoint.tls_config(tls.client(host_and_port(address)?.0)).map_err(invalid)?;
    }
    let endpoint = endpoint
        .connect_timeout(Duration::from_secs(3))
        .tcp_nodelay(true)
        .http2_keep_alive_interval(SILENCE)
        .keep_alive_timeout(SILENCE)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW);
    let channel = endpoint.connect().await.map_err(|error| {
        Error::with_source(Code::GroupBroken, format!("{} cannot be reached", place.name(stage)), error)
    })?;
    Ok(StageServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE))
}

/// The server's side of the same settings.
pub(super) fn server(place: &Place) -> Result<Server> {
    let server = Server::builder()
        .tcp_nodelay(true)
        .http2_keepalive_interval(Some(SILENCE))
        .http2_keepalive_timeout(Some(SILENCE))
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW);
    match &place.tls {
        None => Ok(server),
        Some(tls) => server.tls_config(tls.server()).map_err(|error| {
            Error::with_source(Code::RequestInvalid, "--tls-cert and --tls-key cannot be used", error)
        }),
    }
}

/// Whether a later try may go better: the stage is not there yet, or still holds to an earlier life of
/// the group.
pub(super) fn passes(error: &Error) -> bool {
    error.kind() == Kind::Unavailable
}

/// What a stage said when it refused a call; anything else is a lost connection.
pub(super) fn refusal(place: &Place, stage: usize, status: &Status) -> Error {
    let error = from_status(status);
    match error.code {
        Code::StageMismatch | Code::GroupBroken | Code::RequestInvalid => error,
        _ => lost(place, stage, &format!("the call failed: {}", status.message())),
    }
}

/// A stream to or from `stage` ended.
pub(super) fn closed(place: &Place, stage: usize, status: Option<&Status>) -> Error {
    let how = match status {
        None => "it closed the connection".to_owned(),
        Some(status) => format!("the connection broke ({})", status.message()),
    };
    lost(place, stage, &format!("{how}; its process has ended, or the network to it is down"))
}

/// `stage` has said nothing for [`SILENCE`].
pub(super) fn silent(place: &Place, stage: usize) -> Error {
    let seconds = SILENCE.as_secs();
    lost(place, stage, &format!("nothing heard for {seconds} s; its process hangs, or the network to it is cut"))
}

fn lost(place: &Place, stage: usize, how: &str) -> Error {
    let seen = format!("stage {} lost {}: {how}", place.stage, place.name(stage));
    Error::new(Code::GroupBroken, seen)
}
