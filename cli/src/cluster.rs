//! A whole retort on this machine: broker, orchestrator, teachers and students, under supervision.

mod group;

use std::{
    collections::BTreeMap,
    net::TcpListener,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Args;
use retort_core::{Code, Error, Result};
use tokio::sync::mpsc;

use crate::{
    home::{Home, Lock, Running},
    signals::Signals,
    supervise::{self, Notice, Program, Stage, Started, Supervisor},
};

/// Most workers of one kind on one machine.
const MAX_WORKERS: u32 = 64;

/// Flags that `up` and `run` share.
#[derive(Clone, Debug, Args)]
pub struct ClusterArgs {
    /// Object store: a folder or a URL [default: HOME/store]
    #[arg(long, value_name = "URL")]
    pub store: Option<String>,
    /// Teacher processes
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=i64::from(MAX_WORKERS)))]
    pub teachers: u32,
    /// Processes of each teacher, which share its layers: a teacher group on this machine
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_WORKERS)))]
    pub teacher_stages: u32,
    /// Student processes
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=i64::from(MAX_WORKERS)))]
    pub students: u32,
    /// Start no broker; use these Kafka brokers
    #[arg(long, requires = "brokers")]
    pub no_broker: bool,
    /// Kafka bootstrap servers, with --no-broker
    #[arg(long, value_name = "HOST:PORT", requires = "no_broker")]
    pub brokers: Option<String>,
    /// Where workers compute: auto, cpu, cuda:0
    #[arg(long, value_name = "DEVICE", value_parser = device)]
    pub device: Option<String>,
    /// Number format of the workers: auto, f32, bf16
    #[arg(long, value_name = "DTYPE", value_parser = ["auto", "f32", "bf16"])]
    pub dtype: Option<String>,
    /// How teachers keep the weights of projections in memory: stored, bf16, int8, fp8
    #[arg(long, value_name = "HOW", value_parser = ["stored", "bf16", "int8", "fp8"])]
    pub weights: Option<String>,
    /// Folder of retort-broker, retort-orchestrator, retort-teacher and retort-student [default: that of this program]
    #[arg(long, env = "RETORT_PROGRAMS", value_name = "DIR")]
    pub programs: Option<PathBuf>,
    /// How long a process may take to be ready, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub ready_timeout: u64,
}

impl ClusterArgs {
    /// The flags that decide what is computed and where it goes, as they were given.
    pub fn given(&self) -> String {
        let numbers =
            [("teachers", self.teachers), ("teacher-stages", self.teacher_stages), ("students", self.students)];
        let numbers = numbers.into_iter().filter(|(_, n)| *n != 1).map(|(flag, n)| (flag, n.to_string()));
        let texts = [
            ("store", &self.store),
            ("brokers", &self.brokers),
            ("device", &self.device),
            ("dtype", &self.dtype),
            ("weights", &self.weights),
        ];
        let texts = texts.into_iter().filter_map(|(flag, text)| Some((flag, text.clone()?)));
        let flags: String = texts.chain(numbers).map(|(flag, value)| format!(" --{flag} {value}")).collect();
        if self.no_broker { format!(" --no-broker{flags}") } else { flags }
    }
}

/// Whether the device is there, only a worker can say.
fn device(text: &str) -> Result<String, String> {
    let index = text.strip_prefix("cuda:").map(str::parse::<u32>);
    match (text, index) {
        ("auto" | "cpu", _) | (_, Some(Ok(_))) => Ok(text.to_owned()),
        _ => Err("say auto, cpu or cuda:0".to_owned()),
    }
}

/// What a particular cluster is for, beside its flags.
#[derive(Clone, Debug)]
pub struct Purpose {
    /// `up` or `run`, as `run.json` says it.
    pub command: &'static str,
    /// `host:port`; port 0 takes a free one.
    pub listen: String,
    pub broker_listen: String,
    pub teacher_pool: String,
    pub student_pool: String,
    /// Once the job's teacher is done, nothing else needs its cores.
    pub one_job: bool,
    pub log: Option<String>,
}

#[derive(Debug)]
pub struct Cluster {
    supervisor: Supervisor,
    notices: mpsc::Receiver<Notice>,
    home: Home,
    running: Running,
    _lock: Lock,
}

impl Cluster {
    /// Starts everything in order. On an error, and on a signal, what was started is stopped;
    /// `Ok(None)` says that a signal came first.
    pub async fn start(home: &Home, args: &ClusterArgs, purpose: &Purpose, signals: &Signals) -> Result<Option<Self>> {
        let programs = Programs::find(args)?;
        let lock = home.lock()?;
        free("--listen", &purpose.listen)?;
        if !args.no_broker {
            free("--broker-listen", &purpose.broker_listen)?;
        }
        let options = supervise::Options {
            logs: home.logs(),
            ready_timeout: Duration::from_secs(args.ready_timeout),
            grace: Duration::from_secs(5),
        };
        let (mut supervisor, notices) = Supervisor::new(options, signals.groups.clone());
        let started = tokio::select! {
            started = bring_up(&mut supervisor, home, args, purpose, &programs) => started.map(Some),
            () = signals.stop.cancelled() => Ok(None),
        };
        match started {
            Ok(Some(running)) => {
                if let Err(error) = home.write_running(&running) {
                    supervisor.stop().await;
                    return Err(error);
                }
                signals.groups.announced_in(home.run_file());
                Ok(Some(Self { supervisor, notices, home: home.clone(), running, _lock: lock }))
            }
            Ok(None) => {
                supervisor.stop().await;
                Ok(None)
            }
            Err(error) => {
                supervisor.stop().await;
                Err(error)
            }
        }
    }

    pub fn running(&self) -> &Running {
        &self.running
    }

    /// The next thing that happened to a process. Pending for ever when nothing does.
    pub async fn notice(&mut self) -> Notice {
        let Some(notice) = self.notices.recv().await else { return std::future::pending().await };
        if let Notice::Restarted { name, pid } = &notice {
            self.running.processes.insert(name.clone(), *pid);
            if let Err(error) = self.home.write_running(&self.running) {
                tracing::warn!("run.json keeps an old process id: {}", error.chain());
            }
        }
        notice
    }

    /// Workers, then the orchestrator, then the broker.
    pub async fn stop(self) {
        self.supervisor.stop().await;
    }
}

async fn bring_up(
    supervisor: &mut Supervisor,
    home: &Home,
    args: &ClusterArgs,
    purpose: &Purpose,
    programs: &Programs,
) -> Result<Running> {
    let store = match &args.store {
        Some(store) => crate::home::absolute_store(store)?,
        None => home.store().display().to_string(),
    };
    let text = |path: PathBuf| path.display().to_string();
    let mut processes = BTreeMap::new();
    let brokers = match &args.brokers {
        Some(brokers) => brokers.clone(),
        None => {
            let flags = vec![("--data", text(home.broker()))];
            let broker = program("broker", &programs.broker, flags, Some(purpose.broker_listen.as_str()), purpose);
            let started = supervisor.start(Stage::Broker, vec![broker]).await?;
            note(&mut processes, &started);
            listens(&started)?
        }
    };
    let flags = vec![("--database", text(home.database())), ("--store", store.clone()), ("--brokers", brokers.clone())];
    let orchestrator = program("orchestrator", &programs.orchestrator, flags, Some(purpose.listen.as_str()), purpose);
    let started = supervisor.start(Stage::Orchestrator, vec![orchestrator]).await?;
    note(&mut processes, &started);
    let address = format!("http://{}", listens(&started)?);

    let threads = threads_a_worker(args.teachers * args.teacher_stages + args.students);
    let alone = threads_a_worker(args.students).filter(|_| purpose.one_job);
    let worker = |name: String, path: &Path, pool: &str, alone: Option<usize>| {
        let mut flags = vec![
            ("--orchestrator", address.clone()),
            ("--brokers", brokers.clone()),
            ("--store", store.clone()),
            ("--pool", pool.to_owned()),
        ];
        flags.extend(args.device.clone().map(|device| ("--device", device)));
        flags.extend(args.dtype.clone().map(|dtype| ("--dtype", dtype)));
        flags.extend(threads.map(|threads| ("--threads", threads.to_string())));
        flags.extend(alone.map(|threads| ("--threads-alone", threads.to_string())));
        program(&name, path, flags, None, purpose)
    };
    let mut workers = Vec::new();
    for n in 1..=args.teachers {
        let stage = |name: String| {
            let mut program = worker(name, &programs.teacher, &purpose.teacher_pool, None);
            program.args.extend(args.weights.iter().flat_map(|how| ["--weights".to_owned(), how.clone()]));
            program
        };
        match args.teacher_stages {
            1 => workers.push(stage(format!("teacher-{n}"))),
            stages => workers.extend(group::stages(n, stages, stage)?),
        }
    }
    let student = |n| worker(format!("student-{n}"), &programs.student, &purpose.student_pool, alone);
    workers.extend((1..=args.students).map(student));
    note(&mut processes, &supervisor.start(Stage::Worker, workers).await?);
    Ok(Running { command: purpose.command.to_owned(), pid: std::process::id(), address, brokers, store, processes })
}

/// Cores shared out, because workers that each use all of them wait for one another at every step.
/// `None` leaves it to `$RETORT_THREADS`.
fn threads_a_worker(workers: u32) -> Option<usize> {
    if std::env::var_os("RETORT_THREADS").is_some() {
        return None;
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Some((cores / workers.max(1) as usize).max(1))
}

fn program(name: &str, path: &Path, flags: Vec<(&str, String)>, listen: Option<&str>, purpose: &Purpose) -> Program {
    let log = purpose.log.iter().map(|log| ("--log", log.clone()));
    Program {
        name: name.to_owned(),
        path: path.to_owned(),
        args: flags.into_iter().chain(log).flat_map(|(flag, value)| [flag.to_owned(), value]).collect(),
        listen: listen.map(str::to_owned),
        bond: None,
    }
}

fn note(processes: &mut BTreeMap<String, u32>, started: &[Started]) {
    processes.extend(started.iter().map(|started| (started.name.clone(), started.pid)));
}

fn listens(started: &[Started]) -> Result<String> {
    started.first().and_then(|started| started.ready.listen.clone()).ok_or_else(|| {
        let name = started.first().map_or("a process", |started| started.name.as_str());
        Error::new(Code::ComponentFailed, format!("{name} is ready but did not say where it listens"))
    })
}

/// The four programs, each known to exist before any is started.
#[derive(Debug)]
struct Programs {
    broker: PathBuf,
    orchestrator: PathBuf,
    teacher: PathBuf,
    student: PathBuf,
}

impl Programs {
    fn find(args: &ClusterArgs) -> Result<Self> {
        let folder = program_folder(args.programs.as_deref())?;
        let find = |name: &str, needed: bool| {
            let path = folder.join(name);
            if needed && !path.is_file() { Err(missing(name, &folder)) } else { Ok(path) }
        };
        Ok(Self {
            broker: find("retort-broker", !args.no_broker)?,
            orchestrator: find("retort-orchestrator", true)?,
            teacher: find("retort-teacher", args.teachers > 0)?,
            student: find("retort-student", args.students > 0)?,
        })
    }
}

/// The folder given, else that of the program that runs.
pub fn program_folder(given: Option<&Path>) -> Result<PathBuf> {
    let folder = match given {
        Some(folder) => Some(folder.to_owned()),
        None => std::env::current_exe().ok().and_then(|exe| exe.parent().map(Path::to_owned)),
    };
    folder.and_then(|folder| std::path::absolute(folder).ok()).ok_or_else(|| {
        Error::new(Code::ProgramMissing, "cannot tell the folder of retort's programs; name it with --programs DIR")
    })
}

pub fn missing(name: &str, folder: &Path) -> Error {
    Error::new(
        Code::ProgramMissing,
        format!(
            "{name} is not in {}; build it (`cargo build -p {name}`, or `make build` for all), or name its folder with --programs DIR",
            folder.display()
        ),
    )
}

/// Refuses a port that another process holds before anything is started.
fn free(flag: &str, listen: &str) -> Result<()> {
    match TcpListener::bind(listen) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => Err(Error::new(
            Code::PortInUse,
            format!(
                "{listen} is in use by another process; stop it, or choose another with {flag} 127.0.0.1:0 (any free port)"
            ),
        )),
        Err(error) => Err(Error::new(
            Code::RequestInvalid,
            format!("cannot listen on {flag} {listen:?}: {error}; give HOST:PORT, such as 127.0.0.1:0"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Flags {
        #[command(flatten)]
        cluster: ClusterArgs,
    }

    fn given(flags: &str) -> String {
        let words = std::iter::once("retort").chain(flags.split_whitespace());
        Flags::try_parse_from(words).unwrap().cluster.given()
    }

    #[test]
    fn flags_that_were_given_are_told_back_and_defaults_are_not() {
        assert_eq!(given(""), "");
        assert_eq!(given("--teachers 1 --teacher-stages 1 --students 1 --ready-timeout 60"), "");
        let flags = [
            "--no-broker",
            "--store /srv/store",
            "--brokers kafka:9092",
            "--device cuda:1",
            "--dtype bf16",
            "--weights int8",
            "--teachers 2",
            "--teacher-stages 3",
            "--students 0",
        ];
        let all = flags.map(|flag| format!(" {flag}")).concat();
        assert_eq!(given(&all), all);
        // A broker's two flags are of no use one by one.
        for flag in &flags[3..] {
            assert_eq!(given(flag), format!(" {flag}"));
        }
    }
}
