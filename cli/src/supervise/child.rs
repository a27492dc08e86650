//! One life of one child process.

use std::{
    os::unix::process::ExitStatusExt as _,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use retort_core::{Code, Error, Result};
use retort_process::Ready;
use tokio::{
    io::AsyncReadExt as _,
    process::{Child, ChildStdout, Command},
};

use super::{Program, log_file::LogFile};
use crate::signals::Groups;

/// Most a child may print before its readiness line, bytes.
const MAX_PREAMBLE: usize = 64 * 1024;

#[derive(Debug)]
pub struct Running {
    child: Child,
    stdout: Option<ChildStdout>,
    group: GroupGuard,
}

/// Kills the group when dropped, whatever the path that leads there.
#[derive(Debug)]
struct GroupGuard {
    leader: u32,
    groups: Groups,
}

impl Drop for GroupGuard {
    fn drop(&mut self) {
        self.groups.remove(self.leader);
    }
}

impl Running {
    /// Starts the program and waits for its readiness line.
    pub async fn start(
        program: &Program,
        log: &mut LogFile,
        timeout: Duration,
        groups: &Groups,
    ) -> Result<(Self, Ready)> {
        let mut command = Command::new(&program.path);
        command
            .args(&program.args)
            .arg("--die-with-parent")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log.stdio()?)
            .process_group(0)
            .kill_on_drop(true);
        if let Some(listen) = &program.listen {
            command.args(["--listen", listen]);
        }
        let mut child = command.spawn().map_err(|error| {
            Error::new(Code::ComponentFailed, format!("cannot start {}: {error}", program.path.display()))
        })?;
        let (Some(leader), stdout) = (child.id(), child.stdout.take()) else {
            return Err(Error::internal(format!("{} ended before it was seen", program.name)));
        };
        groups.add(leader);
        let mut running = Self { child, stdout, group: GroupGuard { leader, groups: groups.clone() } };
        match tokio::time::timeout(timeout, running.until_ready(log)).await {
            Ok(Ok(ready)) => Ok((running, ready)),
            Ok(Err(how)) => Err(explain(program, log, &how)),
            Err(_) => Err(explain(program, log, &format!("was not ready after {} s", timeout.as_secs_f32()))),
        }
    }

    pub fn pid(&self) -> u32 {
        self.group.leader
    }

    /// Waits for the end of this life, copying what the child prints into its log, and says how it
    /// ended: `ended with exit code 1`. Safe to cancel.
    pub async fn wait(&mut self, log: &mut LogFile) -> String {
        let mut buffer = [0u8; 4096];
        loop {
            tokio::select! {
                status = self.child.wait() => return status.map_or_else(|error| format!("was lost: {error}"), describe),
                read = read(&mut self.stdout, &mut buffer) => log.append(&buffer[..read]),
            }
        }
    }

    /// A grace period for a process that should see by itself that its group is over, then SIGKILL, which
    /// ends a stopped one too; says how it ended.
    pub async fn end(&mut self, log: &mut LogFile, grace: Duration) -> String {
        match tokio::time::timeout(grace, self.wait(log)).await {
            Ok(how) => how,
            Err(_) => {
                log.mark("killed: it hung when its group had ended");
                self.group.groups.kill(self.group.leader);
                self.wait(log).await;
                "hung when its group had ended".to_owned()
            }
        }
    }

    /// SIGTERM, a grace period, SIGKILL.
    pub async fn stop(mut self, log: &mut LogFile, grace: Duration) {
        self.group.groups.terminate(self.group.leader);
        if tokio::time::timeout(grace, self.wait(log)).await.is_err() {
            log.mark("killed: it did not stop in time");
            self.group.groups.kill(self.group.leader);
            self.wait(log).await;
        }
    }

    /// The first line that is a readiness line; other lines go to the log like everything else.
    async fn until_ready(&mut self, log: &mut LogFile) -> std::result::Result<Ready, String> {
        let mut seen = Vec::new();
        let mut buffer = [0u8; 4096];
        loop {
            tokio::select! {
                read = read(&mut self.stdout, &mut buffer) => {
                    log.append(&buffer[..read]);
                    seen.extend_from_slice(&buffer[..read]);
                    if let Some(ready) = ready_line(&seen) {
                        return Ok(ready);
                    }
                    if seen.len() > MAX_PREAMBLE {
                        return Err("printed too much before it was ready".to_owned());
                    }
                }
                status = self.child.wait() => {
                    return Err(status.map_or_else(|error| format!("was lost: {error}"), describe));
                }
            }
        }
    }
}

/// Bytes read; never returns once the other end is closed.
async fn read(stdout: &mut Option<ChildStdout>, buffer: &mut [u8]) -> usize {
    if let Some(pipe) = stdout {
        match pipe.read(buffer).await {
            Ok(read) if read > 0 => return read,
            _ => *stdout = None,
        }
    }
    std::future::pending().await
}

fn ready_line(seen: &[u8]) -> Option<Ready> {
    let complete = &seen[..=seen.iter().rposition(|&byte| byte == b'\n')?];
    complete.split(|&byte| byte == b'\n').find_map(|line| serde_json::from_slice(line).ok())
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit code {code}"),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => "ended".to_owned(),
    }
}

/// Why a start failed: in the child's own words when it left an `error[code]: message`, else what
/// was seen and the end of its log.
fn explain(program: &Program, log: &LogFile, how: &str) -> Error {
    let tail = log.tail();
    let own = tail.lines().rev().find_map(|line| {
        let (code, message) = line.strip_prefix("error[")?.split_once("]: ")?;
        Some((Code::parse(code)?, message.to_owned()))
    });
    let path = log.path().display();
    match own {
        Some((code, message)) => Error::new(code, format!("{} {how}: {message} (log: {path})", program.name)),
        None if tail.is_empty() => {
            Error::new(Code::ComponentFailed, format!("{} {how} and logged nothing (log: {path})", program.name))
        }
        None => {
            let tail = tail.lines().map(|line| format!("  | {line}")).collect::<Vec<_>>().join("\n");
            Error::new(Code::ComponentFailed, format!("{} {how}; the end of {path}:\n{tail}", program.name))
        }
    }
}
