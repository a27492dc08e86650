//! How workers talk to each other without the orchestrator between: addresses, mutual TLS, and how long they
//! wait for a sign of life.

mod tls;

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use retort_core::{Code, Error, Result};
use tokio::net::TcpListener;
use tonic::transport::{Endpoint, Server};

pub use tls::{Tls, TlsArgs};

/// Every stream carries something at least this often, both ways.
pub const BEAT: Duration = Duration::from_secs(1);
/// A stream that carries nothing for this long has nobody at its other end.
pub const SILENCE: Duration = Duration::from_secs(6);
/// Bytes that may be under way on a stream before the receiver has read any.
const WINDOW: u32 = 16 << 20;

/// Every [`BEAT`], the first at once; beats that were missed are not made up for.
pub fn ticker() -> tokio::time::Interval {
    let mut tick = tokio::time::interval(BEAT);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    tick
}

/// What dials `address`, a `host:port`.
pub fn endpoint(address: &str, tls: Option<&Tls>) -> Result<Endpoint> {
    let invalid = |error: tonic::transport::Error| {
        Error::with_source(Code::RequestInvalid, format!("{address} cannot be dialled"), error)
    };
    let scheme = if tls.is_some() { "https" } else { "http" };
    let mut endpoint = Endpoint::from_shared(format!("{scheme}://{address}")).map_err(invalid)?;
    if let Some(tls) = tls {
        endpoint = endpoint.tls_config(tls.client(host_and_port(address)?.0)).map_err(invalid)?;
    }
    Ok(endpoint
        .connect_timeout(Duration::from_secs(3))
        .tcp_nodelay(true)
        .http2_keep_alive_interval(SILENCE)
        .keep_alive_timeout(SILENCE)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW))
}

/// The server's side of the same settings.
pub fn server(tls: Option<&Tls>) -> Result<Server> {
    let server = Server::builder()
        .tcp_nodelay(true)
        .http2_keepalive_interval(Some(SILENCE))
        .http2_keepalive_timeout(Some(SILENCE))
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW);
    match tls {
        None => Ok(server),
        Some(tls) => server.tls_config(tls.server()).map_err(|error| {
            Error::with_source(Code::RequestInvalid, "--tls-cert and --tls-key cannot be used", error)
        }),
    }
}

/// Binds what `--listen` names.
pub async fn listen(address: &str) -> Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| {
        let code = match error.kind() {
            std::io::ErrorKind::AddrInUse => Code::PortInUse,
            _ => Code::RequestInvalid,
        };
        Error::new(code, format!("cannot listen on {address}: {error}; give another with --listen HOST:PORT"))
    })
}

/// Refuses addresses of other machines where nothing keeps what is said private.
pub fn check_private<'a>(
    addresses: impl IntoIterator<Item = &'a str>,
    tls: Option<&Tls>,
    plaintext: bool,
) -> Result<()> {
    if tls.is_some() || plaintext {
        return Ok(());
    }
    match addresses.into_iter().find(|address| !is_loopback(address)) {
        None => Ok(()),
        Some(far) => Err(invalid(format!(
            "{far} is not on this machine: give --tls-ca, --tls-cert and --tls-key, or --plaintext on a network where everyone may read and change the work"
        ))),
    }
}

/// Host and port of `host:port`; an IPv6 host stands in brackets.
pub fn host_and_port(address: &str) -> Result<(&str, u16)> {
    let parsed = address.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse().ok()?)));
    match parsed {
        Some((host, port)) if !host.is_empty() && !host.contains(['/', '@', ' ']) => Ok((host, port)),
        _ => Err(invalid(format!("{address:?} is no address; write HOST:PORT, such as 10.0.0.2:7475"))),
    }
}

fn is_loopback(address: &str) -> bool {
    match address.parse::<SocketAddr>() {
        Ok(address) => address.ip().is_loopback(),
        Err(_) => host_and_port(address).is_ok_and(|(host, _)| {
            host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
        }),
    }
}

fn invalid(message: String) -> Error {
    Error::new(Code::RequestInvalid, message)
}
