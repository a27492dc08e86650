//! Connections: frames in, frames out, until told to stop.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::{BufMut as _, Bytes, BytesMut};
use rama::{Context, Service as _};
use retort_core::{Code, Error, Result};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use crate::routes::Requests;

/// Largest frame taken: the length is checked before a byte is read.
pub(crate) const MAX_FRAME_BYTES: u32 = 4 << 20;
const MAX_CONNECTIONS: usize = 1024;
/// How long requests in progress may take to end once the broker stops.
const GRACE: Duration = Duration::from_millis(1500);

/// Binds `host:port`; port 0 takes a free one.
pub(crate) async fn bind(listen: &str) -> Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind(listen).await.map_err(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse => Error::new(
            Code::PortInUse,
            format!("{listen} is in use by another program; stop it, or choose another address with --listen (port 0 takes a free one)"),
        ),
        std::io::ErrorKind::InvalidInput | std::io::ErrorKind::AddrNotAvailable => Error::new(
            Code::RequestInvalid,
            format!("--listen {listen:?} is no address of this machine: {error}; give host:port, such as 127.0.0.1:9092"),
        ),
        _ => Error::new(Code::RequestInvalid, format!("cannot listen on {listen:?}: {error}")),
    })?;
    let address =
        listener.local_addr().map_err(|error| Error::internal(format!("the address of a bound port: {error}")))?;
    Ok((listener, address))
}

/// Serves connections until `shutdown`, then lets requests in progress end.
pub(crate) async fn serve(listener: TcpListener, requests: Requests, shutdown: CancellationToken) -> Result<()> {
    let requests = Arc::new(requests);
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => break,
            Some(ended) = connections.join_next() => {
                if let Err(error) = ended {
                    tracing::error!("a connection ended badly: {error}");
                }
            }
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    let Ok(permit) = room.clone().try_acquire_owned() else {
                        tracing::warn!(%peer, "refused: {MAX_CONNECTIONS} connections are open");
                        continue;
                    };
                    let (requests, shutdown) = (requests.clone(), shutdown.clone());
                    connections.spawn(async move {
                        let _permit = permit;
                        if let Err(error) = converse(stream, &requests, &shutdown).await {
                            tracing::debug!(%peer, "connection closed: {error}");
                        }
                    });
                }
                Err(error) => {
                    // Out of file descriptors, mostly: those open will close.
                    tracing::warn!("accepting a connection: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
        }
    }
    drop(listener);
    let drained = tokio::time::timeout(GRACE, async { while connections.join_next().await.is_some() {} }).await;
    if drained.is_err() {
        tracing::warn!(open = connections.len(), "requests were cut off");
    }
    Ok(())
}

/// Answers one request after the other, as Kafka does.
async fn converse(mut stream: TcpStream, requests: &Requests, shutdown: &CancellationToken) -> Result<()> {
    let io = |error: std::io::Error| Error::new(Code::BusUnavailable, error.to_string());
    stream.set_nodelay(true).map_err(io)?;
    loop {
        let frame = tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            frame = read_frame(&mut stream) => frame?,
        };
        let Some(frame) = frame else { return Ok(()) };
        // Not to be cancelled: see `fetch`.
        let response = requests.serve(Context::default(), frame).await.map_err(|error| {
            tracing::warn!("a request failed, its connection is closed: {error}");
            Error::new(Code::BusMalformed, error.to_string())
        })?;
        stream.write_all(&response).await.map_err(io)?;
    }
}

/// A frame with its length in front, `None` when the peer has closed the connection.
async fn read_frame(stream: &mut TcpStream) -> Result<Option<Bytes>> {
    let io = |error: std::io::Error| Error::new(Code::BusUnavailable, error.to_string());
    let length = match stream.read_u32().await {
        Ok(length) => length,
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(io(error)),
    };
    if length > MAX_FRAME_BYTES {
        return Err(Error::new(
            Code::BusMalformed,
            format!("a frame of {length} bytes; at most {MAX_FRAME_BYTES} are taken"),
        ));
    }
    let mut frame = BytesMut::with_capacity(4 + length as usize);
    frame.put_u32(length);
    frame.resize(4 + length as usize, 0);
    stream.read_exact(&mut frame[4..]).await.map_err(io)?;
    Ok(Some(frame.freeze()))
}

/// Asks the broker at `address` for its API versions, as any client does first.
pub(crate) async fn probe(address: SocketAddr) -> Result<()> {
    let dead =
        |cause: String| Error::internal(format!("the broker does not answer on its own port {address}: {cause}"));
    let ask = async {
        let target = if address.ip().is_unspecified() {
            SocketAddr::from((
                if address.is_ipv4() {
                    [127, 0, 0, 1].into()
                } else {
                    std::net::IpAddr::from(std::net::Ipv6Addr::LOCALHOST)
                },
                address.port(),
            ))
        } else {
            address
        };
        let mut stream = TcpStream::connect(target).await.map_err(|error| dead(error.to_string()))?;
        // ApiVersions (18) version 0, correlation id 7, no client id.
        stream.write_all(&[0, 0, 0, 10, 0, 18, 0, 0, 0, 0, 0, 7, 0xff, 0xff]).await.map_err(|e| dead(e.to_string()))?;
        let answer = read_frame(&mut stream).await?.ok_or_else(|| dead("it hung up".to_owned()))?;
        if answer.get(4..10) == Some(&[0, 0, 0, 7, 0, 0]) { Ok(()) } else { Err(dead("a wrong answer".to_owned())) }
    };
    tokio::time::timeout(Duration::from_secs(10), ask)
        .await
        .unwrap_or_else(|_| Err(dead("no answer in 10 s".to_owned())))
}
