//! Two-step stopping. The first signal asks for an orderly stop; the second kills every process
//! group that was started and leaves at once with 130.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use retort_core::{Error, Result};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::{
    signal::unix::{SignalKind, signal},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use crate::outcome::EXIT_INTERRUPTED;

/// The process groups that this command started and has not seen end.
#[derive(Clone, Debug, Default)]
pub struct Groups(Arc<Mutex<Held>>);

#[derive(Debug, Default)]
struct Held {
    leaders: BTreeSet<i32>,
    /// Removed when the command leaves at once.
    file: Option<PathBuf>,
}

impl Groups {
    pub fn add(&self, leader: u32) {
        self.with(|held| held.leaders.insert(leader as i32));
    }

    /// Forgets a group after its leader was waited for, killing what it may have left behind.
    pub fn remove(&self, leader: u32) {
        send(leader as i32, Signal::KILL);
        self.with(|held| held.leaders.remove(&(leader as i32)));
    }

    pub fn terminate(&self, leader: u32) {
        send(leader as i32, Signal::TERM);
    }

    pub fn kill(&self, leader: u32) {
        send(leader as i32, Signal::KILL);
    }

    pub fn kill_all(&self) {
        self.with(|held| held.leaders.iter().for_each(|&leader| send(leader, Signal::KILL)));
    }

    /// A file that says these processes are up, and must not outlive them.
    pub fn announced_in(&self, file: PathBuf) {
        self.with(|held| held.file = Some(file));
    }

    fn with<T>(&self, act: impl FnOnce(&mut Held) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Listens while it lives.
#[derive(Debug)]
pub struct Signals {
    /// Cancelled by the first signal.
    pub stop: CancellationToken,
    pub groups: Groups,
    _listener: JoinSet<()>,
}

impl Signals {
    /// SIGINT, SIGTERM and SIGHUP. Must be called inside a tokio runtime.
    pub fn listen() -> Result<Self> {
        let install =
            |kind| signal(kind).map_err(|error| Error::internal(format!("cannot listen to signals: {error}")));
        let mut interrupt = install(SignalKind::interrupt())?;
        let mut terminate = install(SignalKind::terminate())?;
        let mut hang_up = install(SignalKind::hangup())?;
        let (stop, groups) = (CancellationToken::new(), Groups::default());
        let mut listener = JoinSet::new();
        let (token, kill) = (stop.clone(), groups.clone());
        listener.spawn(async move {
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                    _ = hang_up.recv() => {}
                }
                if token.is_cancelled() {
                    kill.kill_all();
                    if let Some(file) = kill.with(|held| held.file.take()) {
                        let _ = std::fs::remove_file(file);
                    }
                    std::process::exit(i32::from(EXIT_INTERRUPTED));
                }
                token.cancel();
            }
        });
        Ok(Self { stop, groups, _listener: listener })
    }
}

fn send(leader: i32, signal: Signal) {
    // A group that has ended needs no signal.
    if let Some(pid) = Pid::from_raw(leader) {
        let _ = kill_process_group(pid, signal);
    }
}
