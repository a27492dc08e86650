//! Child processes: started in order, restarted when they die, stopped in reverse order.
//!
//! Each child leads its own process group, so that Ctrl-C in a terminal reaches `retort` alone,
//! which then stops the workers, the orchestrator and the broker, one after the other. A child
//! that dies after it was ready once is restarted with the same flags, and with the port it had.

mod bond;
mod child;
mod log_file;
mod restart;
mod space;

use std::{path::PathBuf, time::Duration};

use retort_core::Result;
use retort_process::Ready;
use tokio::{sync::mpsc, task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::signals::Groups;
pub use bond::Bond;
use bond::Share;
use child::Running;
use log_file::LogFile;
use restart::Backoff;

/// Remarks held for a reader that is busy; further ones are dropped.
const NOTICES: usize = 256;

/// A process to keep alive.
#[derive(Clone, Debug)]
pub struct Program {
    /// `broker`, `orchestrator`, `teacher-1`...: names the log file and the remarks.
    pub name: String,
    pub path: PathBuf,
    pub args: Vec<String>,
    /// `--listen`; a port of 0 becomes the port that was chosen at the first start.
    pub listen: Option<String>,
    /// Shared by those that are ended and started again together.
    pub bond: Option<Bond>,
}

/// Started from the first to the last, stopped from the last to the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    Broker,
    Orchestrator,
    Worker,
}

#[derive(Clone, Debug)]
pub struct Options {
    pub logs: PathBuf,
    /// How long a child may take until its readiness line.
    pub ready_timeout: Duration,
    /// Between SIGTERM and SIGKILL.
    pub grace: Duration,
}

/// What happened to a child after its first start.
#[derive(Clone, Debug)]
pub enum Notice {
    Died { name: String, how: String, restart_in: Duration, log: PathBuf },
    Restarted { name: String, pid: u32 },
    DiskFull { folder: PathBuf },
    RoomAgain { folder: PathBuf },
}

impl Notice {
    /// One line for people.
    pub fn text(&self) -> String {
        match self {
            Self::Died { name, how, restart_in, log } => {
                format!("{name} {how}; restarting in {} s (log: {})", restart_in.as_secs(), log.display())
            }
            Self::Restarted { name, pid } => format!("{name} is back (process {pid})"),
            Self::DiskFull { folder } => format!(
                "disk-full: no space is left in {}; free some, and the work goes on by itself",
                folder.display()
            ),
            Self::RoomAgain { folder } => format!("there is space in {} again", folder.display()),
        }
    }
}

/// A child that is up for the first time.
#[derive(Clone, Debug)]
pub struct Started {
    pub name: String,
    pub pid: u32,
    pub ready: Ready,
}

#[derive(Debug)]
pub struct Supervisor {
    options: Options,
    groups: Groups,
    sender: mpsc::Sender<Notice>,
    stages: Vec<(Stage, CancellationToken, JoinSet<()>)>,
    /// Ends with the supervisor.
    _space: JoinSet<()>,
}

impl Supervisor {
    pub fn new(options: Options, groups: Groups) -> (Self, mpsc::Receiver<Notice>) {
        let (sender, notices) = mpsc::channel(NOTICES);
        let mut space = JoinSet::new();
        space.spawn(space::watch(options.logs.clone(), sender.clone()));
        (Self { options, groups, sender, stages: Vec::new(), _space: space }, notices)
    }

    /// Starts programs of one stage side by side and waits until each is ready.
    ///
    /// Errors: the first that could not be started, died, or said nothing in time, with the end
    /// of its log. Those that did start are kept; [`Supervisor::stop`] ends them.
    pub async fn start(&mut self, stage: Stage, programs: Vec<Program>) -> Result<Vec<Started>> {
        let mut starting = JoinSet::new();
        for (index, mut program) in programs.into_iter().enumerate() {
            let (options, groups) = (self.options.clone(), self.groups.clone());
            starting.spawn(async move {
                let mut log = LogFile::rotate(&options.logs, &program.name)?;
                let share = program.bond.as_ref().map(Bond::join);
                let (running, ready) = Running::start(&program, &mut log, options.ready_timeout, &groups).await?;
                if program.listen.is_some() && ready.listen.is_some() {
                    program.listen.clone_from(&ready.listen);
                }
                Ok((index, program, log, running, ready, share))
            });
        }
        let mut started = Vec::new();
        let mut failure = None;
        while let Some(joined) = starting.join_next().await {
            match joined.unwrap_or_else(|error| Err(retort_core::Error::internal(format!("a start panicked: {error}"))))
            {
                Ok((index, program, log, running, ready, share)) => {
                    started.push((index, Started { name: program.name.clone(), pid: running.pid(), ready }));
                    self.tend(stage, program, log, running, share);
                }
                Err(error) => {
                    failure.get_or_insert(error);
                    // Dropping a start that is under way kills its child.
                    starting.abort_all();
                }
            }
        }
        match failure {
            Some(error) => Err(error),
            None => {
                started.sort_by_key(|(index, _)| *index);
                Ok(started.into_iter().map(|(_, started)| started).collect())
            }
        }
    }

    /// Stops all, the last stage first: SIGTERM, a grace period, SIGKILL.
    pub async fn stop(mut self) {
        self.stages.sort_by_key(|(stage, _, _)| std::cmp::Reverse(*stage));
        for (_, token, mut tasks) in self.stages {
            token.cancel();
            while tasks.join_next().await.is_some() {}
        }
        // Nothing should be left; what a panic left behind goes now.
        self.groups.kill_all();
    }

    fn tend(&mut self, stage: Stage, program: Program, log: LogFile, running: Running, share: Option<Share>) {
        if !self.stages.iter().any(|(known, _, _)| *known == stage) {
            self.stages.push((stage, CancellationToken::new(), JoinSet::new()));
        }
        let (options, groups, sender) = (self.options.clone(), self.groups.clone(), self.sender.clone());
        if let Some((_, token, tasks)) = self.stages.iter_mut().find(|(known, _, _)| *known == stage) {
            tasks.spawn(keep_alive(program, log, running, share, options, groups, sender, token.clone()));
        }
    }
}

/// Watches one child and restarts it until told to stop.
#[allow(clippy::too_many_arguments)] // a task owns all it needs
async fn keep_alive(
    program: Program,
    mut log: LogFile,
    mut running: Running,
    mut share: Option<Share>,
    options: Options,
    groups: Groups,
    notices: mpsc::Sender<Notice>,
    stop: CancellationToken,
) {
    let mut backoff = Backoff::default();
    let mut since = Instant::now();
    loop {
        let mut how = tokio::select! {
            how = running.wait(&mut log) => how,
            () = over(share.as_ref()) => running.end(&mut log, options.grace).await,
            () = stop.cancelled() => return running.stop(&mut log, options.grace).await,
        };
        share.iter().for_each(Share::end);
        let mut lived = since.elapsed();
        running = loop {
            let restart_in = backoff.after(lived);
            let log_path = log.path().to_owned();
            let _ = notices.try_send(Notice::Died { name: program.name.clone(), how, restart_in, log: log_path });
            tokio::select! {
                () = tokio::time::sleep(restart_in) => {}
                () = stop.cancelled() => return,
            }
            log.mark("restarted");
            share = program.bond.as_ref().map(Bond::join);
            since = Instant::now();
            let start = Running::start(&program, &mut log, options.ready_timeout, &groups);
            let outcome = tokio::select! {
                outcome = start => outcome,
                // Dropping the start kills the child it began.
                () = stop.cancelled() => return,
            };
            match outcome {
                Ok((running, _)) => break running,
                Err(error) => {
                    how = format!("did not come back: {}", error.message.lines().next().unwrap_or_default());
                    lived = Duration::ZERO;
                    share.iter().for_each(Share::end);
                }
            }
        };
        let _ = notices.try_send(Notice::Restarted { name: program.name.clone(), pid: running.pid() });
    }
}

/// Waits until another process of the same group has ended; for ever where there is no group.
async fn over(share: Option<&Share>) {
    match share {
        Some(share) => share.over().await,
        None => std::future::pending().await,
    }
}
