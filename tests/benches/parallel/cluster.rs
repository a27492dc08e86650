//! `retort up` without students, students of one thread started beside it, and what they log.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use retort_proto as proto;
use retort_tests::retort::{Up, programs};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::{
    Failure,
    far::{FAR, Far, NEAR},
};

/// What takes longer has failed.
pub const PATIENCE: Duration = Duration::from_secs(400);
const LOOK_AGAIN: Duration = Duration::from_millis(100);

pub struct Cluster<'a> {
    // Before what they are connected to.
    students: Vec<Student>,
    pub up: Up,
    pub far: &'a Far,
    pub folder: PathBuf,
    started: u32,
}

/// Where the second student is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Here,
    /// Behind the link.
    There,
}

impl<'a> Cluster<'a> {
    /// With a teacher of this many threads, and one student here.
    pub fn start(folder: &Path, far: &'a Far, threads: usize) -> Result<Self, Failure> {
        let home = folder.join("home");
        fs::create_dir_all(&home)?;
        let up = Up::start_at(&home, NEAR, threads, &["--students", "0", "--dtype", "f32"]);
        let mut cluster = Self { students: Vec::new(), up, far, folder: folder.to_owned(), started: 0 };
        cluster.add(Place::Here)?;
        Ok(cluster)
    }

    /// Has a second student, at this place and nowhere else.
    pub fn second_at(&mut self, place: Option<Place>) -> Result<(), Failure> {
        self.students.truncate(1);
        place.map_or(Ok(()), |place| self.add(place))
    }

    fn add(&mut self, place: Place) -> Result<(), Failure> {
        self.started += 1;
        let name = format!("student-{}", self.started);
        let (running, program) = (self.up.running(), programs().join("retort-student"));
        let (mut command, host) = match place {
            Place::Here => (Command::new(program), NEAR),
            Place::There => (self.far.command(program), FAR),
        };
        let log = self.folder.join(format!("{name}.log"));
        command
            .args(["--orchestrator", &running.address, "--brokers", &running.brokers, "--store", &running.store])
            .args(["--threads", "1", "--dtype", "f32", "--device", "cpu", "--die-with-parent"])
            .args(["--listen", &format!("{host}:0"), "--plaintext", "--log", "info", "--log-format", "json"])
            .env("RETORT_WORK_DIR", self.folder.join(&name))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log)?);
        fs::create_dir_all(self.folder.join(&name))?;
        self.students.push(Student { child: command.spawn()?, log });
        Ok(())
    }

    /// What the students have logged of a job, one by one.
    pub fn said(&mut self, job: &str) -> Result<Vec<Said>, Failure> {
        let id = job.trim_start_matches("jobs/");
        let mut said = Vec::new();
        for student in &mut self.students {
            if let Some(status) = student.child.try_wait()? {
                let log = fs::read_to_string(&student.log).unwrap_or_default();
                return Err(format!("a student ended with {status}: {}", log.lines().last().unwrap_or_default()).into());
            }
            let log = fs::read_to_string(&student.log)?;
            said.extend(log.lines().filter(|line| line.contains(id)).filter_map(Said::read));
        }
        said.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
        Ok(said)
    }

    /// Asks `check` for what it looks for in what was said of a job, until it has it.
    pub async fn wait<T>(&mut self, job: &str, what: &str, check: impl Fn(&[Said]) -> Option<T>) -> Result<T, Failure> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let said = self.said(job)?;
            if let Some(found) = check(&said) {
                return Ok(found);
            }
            let failed = said.iter().find(|said| said.message.starts_with("failed: "));
            if let Some(failed) = failed {
                return Err(format!("{job}: {}", failed.message).into());
            }
            if Instant::now() > deadline {
                let last = said.last().map_or("nothing", |said| &said.message);
                return Err(format!("waited {PATIENCE:?} for {what} of {job}; said last: {last}").into());
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Cancels a job, and waits until no student works at it.
    pub async fn cancel(&mut self, job: &str) -> Result<(), Failure> {
        self.up.jobs().await.cancel_job(proto::CancelJobRequest { name: job.to_owned() }).await?;
        let over = |said: &[Said]| {
            let count =
                |of: &[&str]| said.iter().filter(|said| of.iter().any(|of| said.message.starts_with(of))).count();
            (count(&["claimed"]) == count(&["left: ", "done", "handed back: "])).then_some(())
        };
        self.wait(job, "the end", over).await
    }

    /// Writes a spec beside the jobs' folder.
    pub fn spec(&self, name: &str, spec: &Value) -> Result<PathBuf, Failure> {
        let path = self.folder.join(format!("{name}.yaml"));
        fs::write(&path, spec.to_string())?;
        Ok(path)
    }
}

struct Student {
    child: Child,
    log: PathBuf,
}

impl Drop for Student {
    fn drop(&mut self) {
        if let Some(pid) = Pid::from_raw(self.child.id() as i32) {
            let _ = kill_process(pid, Signal::TERM);
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline && !matches!(self.child.try_wait(), Ok(Some(_))) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A line of a student's log.
pub struct Said {
    /// Since some midnight.
    pub seconds: f64,
    pub message: String,
    fields: Value,
}

impl Said {
    fn read(line: &str) -> Option<Self> {
        let line: Value = serde_json::from_str(line).ok()?;
        let (date, time) = line["timestamp"].as_str()?.trim_end_matches('Z').split_once('T')?;
        let day: f64 = date.rsplit_once('-')?.1.parse().ok()?;
        let mut seconds = 0.0;
        for part in time.split(':') {
            seconds = 60.0 * seconds + part.parse::<f64>().ok()?;
        }
        let fields = line["fields"].clone();
        let message = fields["message"].as_str()?.to_owned();
        Some(Self { seconds: 86_400.0 * day + seconds, message, fields })
    }

    pub fn number(&self, field: &str) -> Option<f64> {
        self.fields[field].as_f64()
    }
}

/// Ends every process that this one has started, and waits for it.
pub fn end_children() {
    let own = std::process::id().to_string();
    let children = || -> Vec<Pid> {
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        let stats = processes.filter_map(|entry| fs::read_to_string(entry.path().join("stat")).ok());
        let child = |stat: String| {
            let (name, rest) = stat.rsplit_once(')')?;
            let mut rest = rest.split_whitespace();
            let (state, parent) = (rest.next()?, rest.next()?);
            let pid = name.split_once(' ')?.0.parse().ok()?;
            (parent == own && state != "Z").then(|| Pid::from_raw(pid)).flatten()
        };
        stats.filter_map(child).collect()
    };
    let deadline = Instant::now() + Duration::from_secs(25);
    for signal in [Signal::TERM, Signal::KILL] {
        for pid in children() {
            let _ = kill_process(pid, signal);
        }
        // What is started meanwhile by who does not know yet is ended in the second turn.
        while !children().is_empty() && signal == Signal::TERM && Instant::now() < deadline {
            std::thread::sleep(LOOK_AGAIN);
        }
    }
}
