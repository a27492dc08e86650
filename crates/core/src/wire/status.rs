//! [`Error`] <-> [`tonic::Status`]. The code travels as `google.rpc.ErrorInfo.reason`.

use tonic::{Code as Grpc, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::{Code, Error, Kind};

const DOMAIN: &str = "retort.v1";
/// Of a message, characters: a status travels in headers, which HTTP/2 peers limit to some 16 KiB, escaped.
const MAX_MESSAGE: usize = 1500;

pub fn to_status(error: &Error) -> Status {
    let grpc = match error.kind() {
        Kind::Invalid => Grpc::InvalidArgument,
        Kind::NotFound => Grpc::NotFound,
        Kind::Exists => Grpc::AlreadyExists,
        Kind::Precondition => Grpc::FailedPrecondition,
        Kind::Fenced => Grpc::Aborted,
        Kind::Unavailable => Grpc::Unavailable,
        Kind::Exhausted => Grpc::ResourceExhausted,
        Kind::Corrupt => Grpc::DataLoss,
        Kind::Cancelled => Grpc::Cancelled,
        Kind::Internal => Grpc::Internal,
    };
    let details = ErrorDetails::with_error_info(error.code.as_str(), DOMAIN, std::collections::HashMap::new());
    let mut message: String = error.chain();
    if let Some((cut, _)) = message.char_indices().nth(MAX_MESSAGE) {
        message.truncate(cut);
        message.push('…');
    }
    Status::with_error_details(grpc, message, details)
}

/// Reads our code back; a status without one (a proxy's, a lost connection) is mapped by its gRPC code.
pub fn from_status(status: &Status) -> Error {
    let code = status
        .get_details_error_info()
        .filter(|info| info.domain == DOMAIN)
        .and_then(|info| Code::parse(&info.reason))
        .unwrap_or(match status.code() {
            Grpc::InvalidArgument => Code::RequestInvalid,
            Grpc::Unavailable | Grpc::DeadlineExceeded | Grpc::Unknown | Grpc::Cancelled => {
                Code::OrchestratorUnavailable
            }
            _ => Code::Internal,
        });
    Error::new(code, status.message())
}
