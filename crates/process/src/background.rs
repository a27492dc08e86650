//! Work that gives way to all other work of the process.

use retort_core::{Error, Result};

/// Runs `work` on a thread of its own that gets what cores other threads leave: on Linux, where niceness is a thread's.
/// Dropping the future leaves the work to end by itself.
///
/// # Errors
/// `internal` where no thread can be started or `work` panics.
pub async fn in_background<T: Send + 'static>(
    name: &'static str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (done, result) = tokio::sync::oneshot::channel();
    let thread = std::thread::Builder::new().name(name.to_owned());
    let started = thread.spawn(move || {
        give_way();
        let _ = done.send(work());
    });
    started.map_err(|error| Error::internal(format!("no thread for {name} can be started: {error}")))?;
    result.await.map_err(|_| Error::internal(format!("{name} broke off")))?
}

/// The least share of a contended core for the thread that calls it.
fn give_way() {
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::setpriority_process(None, 19) {
        tracing::debug!("a thread keeps its priority: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_is_done_elsewhere_and_a_panic_is_an_error() {
        let here = std::thread::current().id();
        assert!(in_background("test", move || Ok(std::thread::current().id() != here)).await.unwrap());
        let error = in_background("counting", || -> Result<()> { panic!("as told") }).await.unwrap_err();
        assert!(error.message.contains("counting broke off"), "{}", error.message);
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn it_gives_way_and_nobody_else_does() {
        let niceness = || Ok(rustix::process::getpriority_process(None).unwrap());
        assert_eq!(in_background("test", niceness).await.unwrap(), 19);
        assert!(niceness().unwrap() < 19);
    }
}
