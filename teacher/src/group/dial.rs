//! How stages reach each other, and how long they wait for a sign of life.

use std::time::Duration;

use retort_core::{Code, Error, Kind, Result, wire::from_status};
use retort_proto::stage_service_client::StageServiceClient;
use retort_worker::peer;
use tonic::{Status, transport::Channel};

use super::{frames::MAX_MESSAGE, place::Place};

pub(super) use retort_worker::peer::SILENCE;

/// Between two tries to reach a stage that has not started yet.
pub(super) const RETRY: Duration = Duration::from_millis(250);

/// Connects to a stage of the group.
pub(super) async fn dial(place: &Place, stage: usize) -> Result<StageServiceClient<Channel>> {
    let address = place.peers.get(stage).ok_or_else(|| Error::internal(format!("no stage {stage} to dial")))?;
    let endpoint = peer::endpoint(address, place.tls.as_ref())?;
    let channel = endpoint.connect().await.map_err(|error| {
        Error::with_source(Code::GroupBroken, format!("{} cannot be reached", place.name(stage)), error)
    })?;
    Ok(StageServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE))
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
