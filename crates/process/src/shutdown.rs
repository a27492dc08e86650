use retort_core::{Error, Result};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// The first SIGINT or SIGTERM cancels the token, the second ends the process at once with 130.
///
/// Must be called inside a tokio runtime.
pub fn on_signals() -> Result<CancellationToken> {
    let install = |kind| signal(kind).map_err(|error| Error::internal(format!("cannot listen to signals: {error}")));
    let mut interrupt = install(SignalKind::interrupt())?;
    let mut terminate = install(SignalKind::terminate())?;
    let token = CancellationToken::new();
    let cancel = token.clone();
    // Lives as long as the process: nothing joins it and it can return no error.
    tokio::spawn(async move {
        let mut received = false;
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            if received {
                std::process::exit(130);
            }
            received = true;
            cancel.cancel();
        }
    });
    Ok(token)
}

/// Asks the kernel to send SIGTERM to this process when the one that started it dies, so that a
/// killed supervisor leaves no orphans. Linux only; elsewhere nothing happens.
pub fn die_with_parent() {
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM)) {
        tracing::warn!("cannot follow the parent's death: {error}");
    }
}
