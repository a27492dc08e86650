//! `retort up` in a home of its own, and what a test asks of it.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{Mutex, MutexGuard},
    time::{Duration, Instant},
};

use retort_proto as proto;
use rustix::process::{Pid, Signal, kill_process};
use tonic::transport::Channel;

/// One cluster at a time: two cores hold no more.
static MACHINE: Mutex<()> = Mutex::new(());

/// The folder of the built binaries: tests run from `deps/` inside it, examples from `examples/`.
pub fn programs() -> PathBuf {
    let mut path = std::env::current_exe().expect("a test has a path");
    path.pop();
    if path.ends_with("deps") || path.ends_with("examples") {
        path.pop();
    }
    path
}

/// The `retort` command, ready for arguments.
pub fn retort() -> Command {
    let path = programs().join("retort");
    assert!(path.exists(), "{} is not built: run `make build`", path.display());
    let mut command = Command::new(path);
    command.env_remove("RETORT_HOME").env_remove("RETORT_ADDRESS").env("RETORT_THREADS", "1").stdin(Stdio::null());
    command
}

/// A running `retort up`; dropped, it is stopped and nothing stays behind.
pub struct Up {
    pub home: PathBuf,
    /// What it printed; outside the home, whose disk a test may fill.
    printed: tempfile::NamedTempFile,
    child: Child,
    _machine: MutexGuard<'static, ()>,
}

/// Addresses of a running retort.
pub struct Running {
    pub address: String,
    pub brokers: String,
    pub store: String,
}

impl Up {
    pub fn start(home: &Path, more: &[&str]) -> Self {
        Self::start_on(home, 1, more)
    }

    /// As [`Up::start`], with workers that compute on this many cores each.
    pub fn start_on(home: &Path, threads: usize, more: &[&str]) -> Self {
        Self::start_at(home, "127.0.0.1", threads, more)
    }

    /// As [`Up::start_on`]; orchestrator and broker listen at this address of the machine.
    pub fn start_at(home: &Path, host: &str, threads: usize, more: &[&str]) -> Self {
        let machine = MACHINE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let printed = tempfile::NamedTempFile::new().expect("a log");
        let log = printed.reopen().expect("a handle");
        let child = retort()
            .args(["up", "--listen", &format!("{host}:0"), "--broker-listen", &format!("{host}:0"), "--home"])
            .arg(home)
            .args(more)
            .env("RETORT_THREADS", threads.to_string())
            .stdout(log.try_clone().expect("a handle"))
            .stderr(log)
            .spawn()
            .expect("retort starts");
        let mut up = Self { home: home.to_owned(), printed, child, _machine: machine };
        up.wait("retort up", Duration::from_secs(90), |up| {
            if let Ok(Some(status)) = up.child.try_wait() {
                panic!("retort up ended with {status}:\n{}", up.log());
            }
            up.run_json().is_some().then_some(())
        });
        up
    }

    pub fn log(&self) -> String {
        let mut text = fs::read_to_string(self.printed.path()).unwrap_or_default();
        for entry in fs::read_dir(self.home.join("logs")).into_iter().flatten().flatten() {
            let log = fs::read_to_string(entry.path()).unwrap_or_default();
            let tail: Vec<&str> = log.lines().rev().take(40).collect();
            text += &format!("\n--- {}\n", entry.path().display());
            text.extend(tail.iter().rev().flat_map(|line| [line, "\n"]));
        }
        text
    }

    fn run_json(&self) -> Option<serde_json::Value> {
        serde_json::from_str(&fs::read_to_string(self.home.join("run.json")).ok()?).ok()
    }

    /// Where workers that the test starts itself find things.
    pub fn running(&self) -> Running {
        let run = self.run_json().expect("run.json");
        let text = |key: &str| run[key].as_str().expect("a text").to_owned();
        Running { address: text("address"), brokers: text("brokers"), store: text("store") }
    }

    pub fn processes(&self) -> BTreeMap<String, i32> {
        let run = self.run_json().expect("run.json");
        let processes = run["processes"].as_object().expect("processes");
        processes.iter().map(|(name, pid)| (name.clone(), pid.as_i64().expect("a pid") as i32)).collect()
    }

    /// SIGKILL, and waits until the supervisor has started another one.
    pub fn kill(&mut self, name: &str) {
        let pid = self.processes()[name];
        kill_process(Pid::from_raw(pid).expect("a pid"), Signal::KILL).expect("killed");
        self.wait(&format!("another {name}"), Duration::from_secs(60), |up| {
            up.processes().get(name).is_some_and(|now| *now != pid).then_some(())
        });
    }

    /// As [`Up::kill`], at a moment when this worker is at work on a task claimed since now: it is stopped, its log
    /// read, and it runs on until that log claims a task of which it says nothing more.
    pub fn kill_at_work(&mut self, name: &str) {
        let path = self.home.join("logs").join(format!("{name}.log"));
        let read = || fs::read_to_string(&path).unwrap_or_default();
        let seen = read().len();
        self.wait(&format!("a task of {name}"), Duration::from_secs(60), |up| {
            up.signal_process(name, Signal::STOP);
            if at_work(&read()[seen..]) {
                return Some(());
            }
            up.signal_process(name, Signal::CONT);
            None
        });
        self.kill(name);
    }

    /// Sends a signal to one of the processes.
    pub fn signal_process(&self, name: &str, signal: Signal) {
        kill_process(Pid::from_raw(self.processes()[name]).expect("a pid"), signal).expect("signalled");
    }

    /// Waits until the log of one of these processes says `text`.
    pub fn wait_for_log(&mut self, names: &[&str], text: &str, within: Duration) {
        self.wait(text, within, |up| {
            let read = |name: &&str| fs::read_to_string(up.home.join("logs").join(format!("{name}.log"))).ok();
            names.iter().filter_map(read).any(|log| log.contains(text)).then_some(())
        });
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.child.id() as i32).expect("a pid"), signal).expect("signalled");
    }

    /// Waits for `retort up` itself to end.
    pub fn ended(&mut self, within: Duration) -> std::process::ExitStatus {
        self.wait("the end of retort up", within, |up| up.child.try_wait().expect("waited"))
    }

    /// Waits until `retort up` has printed `text`.
    pub fn wait_for(&mut self, text: &str, within: Duration) {
        self.wait(text, within, |up| fs::read_to_string(up.printed.path()).ok()?.contains(text).then_some(()));
    }

    /// Asks `check` until it answers; a test that waits longer has failed.
    pub fn wait<T>(&mut self, what: &str, within: Duration, mut check: impl FnMut(&mut Self) -> Option<T>) -> T {
        let deadline = Instant::now() + within;
        loop {
            if let Some(found) = check(self) {
                return found;
            }
            assert!(Instant::now() < deadline, "waited {within:?} for {what}:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Runs a `retort` command on this home; its output, whatever it was.
    pub fn command(&self, args: &[&str]) -> Output {
        retort().args(args).arg("--home").arg(&self.home).output().expect("retort runs")
    }

    /// Submits a spec through the command line and returns `jobs/{job}`.
    pub fn create(&self, spec: &Path) -> String {
        let output = self.command(&["job", "create", spec.to_str().expect("a path"), "--json"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let job: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        job["name"].as_str().expect("a name").to_owned()
    }

    pub async fn jobs(&self) -> proto::job_service_client::JobServiceClient<Channel> {
        let address = self.run_json().expect("run.json")["address"].as_str().expect("an address").to_owned();
        proto::job_service_client::JobServiceClient::connect(address).await.expect("the orchestrator answers")
    }

    /// Follows a job across restarts of the orchestrator until `stop` says so or the job ends.
    /// Returns the events in order; each sequence number came once.
    pub async fn follow(
        &mut self,
        job: &str,
        within: Duration,
        mut stop: impl FnMut(&mut Self, &proto::JobEvent) -> bool,
    ) -> Vec<proto::JobEvent> {
        let deadline = Instant::now() + within;
        let mut events: Vec<proto::JobEvent> = Vec::new();
        loop {
            assert!(Instant::now() < deadline, "waited {within:?} for {job}:\n{}", self.log());
            let after = events.last().map_or(0, |event| event.sequence);
            let address = self.run_json().expect("run.json")["address"].as_str().expect("an address").to_owned();
            let stream = async {
                let mut client = proto::job_service_client::JobServiceClient::connect(address).await.ok()?;
                let request = proto::WatchJobRequest { name: job.to_owned(), after_sequence: after };
                Some(client.watch_job(request).await.ok()?.into_inner())
            };
            let Some(mut stream) = stream.await else {
                tokio::time::sleep(Duration::from_millis(200)).await;
                continue;
            };
            loop {
                let next = tokio::time::timeout(deadline.saturating_duration_since(Instant::now()), stream.message());
                let Ok(Ok(message)) = next.await else { break };
                let Some(event) = message else { return events };
                assert_eq!(event.sequence, events.last().map_or(1, |last| last.sequence + 1), "events are numbered");
                let stopped = stop(self, &event);
                events.push(event);
                if stopped {
                    return events;
                }
            }
        }
    }

    /// Keys of the store's objects below `prefix`. A file with a `#` in its name is none: it is what a writer that
    /// was killed had not named yet, and the store never lists it.
    pub fn objects(&self, prefix: &str) -> Vec<String> {
        fn walk(folder: &Path, root: &Path, keys: &mut Vec<String>) {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.is_dir() {
                    walk(&path, root, keys);
                } else if let Ok(key) = path.strip_prefix(root)
                    && !key.to_string_lossy().contains('#')
                {
                    keys.push(key.display().to_string());
                }
            }
        }
        let root = self.home.join("store");
        let mut keys = Vec::new();
        walk(&root.join(prefix), &root, &mut keys);
        keys.sort();
        keys
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        let pids: Vec<i32> = self.run_json().map(|_| self.processes().into_values().collect()).unwrap_or_default();
        let _ = kill_process(Pid::from_raw(self.child.id() as i32).expect("a pid"), Signal::TERM);
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline && !matches!(self.child.try_wait(), Ok(Some(_))) {
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        for pid in pids {
            if let Some(pid) = Pid::from_raw(pid) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}

/// Whether the last task that a worker's log claims is one of which it says nothing more. While a worker writes one
/// shard it is at work on the next, so that what is said last may be of another task.
fn at_work(log: &str) -> bool {
    let Some((before, after)) = log.rsplit_once(": claimed ") else { return false };
    let span = before.rsplit(" task=").next().and_then(|rest| rest.split_once('}'));
    span.is_some_and(|(task, _)| !after.contains(&format!(" task={task}}}")))
}

#[cfg(test)]
mod tests {
    use super::at_work;

    #[test]
    fn a_worker_that_writes_one_shard_is_at_work_on_the_next() {
        let line = |task: u32, said: &str| format!("INFO task{{job=1 task=shard-{task}}}: retort: {said}\n");
        let mut log = line(1, "claimed epoch=1");
        assert!(at_work(&log));
        log += &line(1, "shard written");
        assert!(!at_work(&log), "its shard is written");
        log += &line(2, "claimed epoch=1");
        log += &line(1, "done");
        assert!(at_work(&log), "the next one is begun");
        assert!(!at_work(&line(1, "done")), "nothing is claimed");
    }
}
