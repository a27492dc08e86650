//! Small programs that stand in for the broker, the orchestrator and the workers, and a `retort`
//! that is told to start them.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::{
    fs,
    io::Read as _,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};

/// Says `pids`, waits, and says when it is told to stop; `sleep` is a child of its own.
pub const OBEDIENT: &str = r#"
note
trap 'echo NAME >> "$HERE/stopped"; exit 0' TERM
sleep 1000 & echo $! >> "$HERE/pids"
ready
wait
"#;

/// Does not stop when asked.
pub const STUBBORN: &str = r#"
note
trap '' TERM
ready
while :; do sleep 1000 & echo $! >> "$HERE/pids"; wait; done
"#;

/// A folder of fake programs and a home.
pub struct Bench {
    pub folder: tempfile::TempDir,
}

impl Bench {
    /// Four obedient programs.
    pub fn new() -> Self {
        let bench = Self { folder: tempfile::tempdir().unwrap() };
        for name in ["broker", "orchestrator", "teacher", "student"] {
            bench.program(name, OBEDIENT);
        }
        bench
    }

    /// Replaces a program by a shell script. `note` writes down its pid and its flags, `ready` says
    /// it is ready on a port that a second start would share, `$HERE` is the folder of notes.
    pub fn program(&self, name: &str, script: &str) {
        let (listen, here) = (free_port(), self.folder.path().display());
        let script = format!(
            "#!/bin/sh\nHERE='{here}'\n\
             note() {{ echo $$ >> \"$HERE/pids\"; echo \"$ARGS\" >> \"$HERE/{name}.args\"; }}\n\
             ready() {{ echo '{{\"ready\":\"{name}\",\"listen\":\"{listen}\"}}'; }}\n\
             ARGS=\"$*\"\n{}",
            script.replace("NAME", name)
        );
        fs::create_dir_all(self.programs()).unwrap();
        let path = self.programs().join(format!("retort-{name}"));
        // Written aside and renamed: a program that is being executed cannot be written to.
        let aside = path.with_extension("new");
        fs::write(&aside, script).unwrap();
        fs::set_permissions(&aside, fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(aside, path).unwrap();
    }

    pub fn programs(&self) -> PathBuf {
        self.folder.path().join("programs")
    }

    pub fn home(&self) -> PathBuf {
        self.folder.path().join("home")
    }

    /// The lines that a program wrote down.
    pub fn notes(&self, name: &str) -> Vec<String> {
        let text = fs::read_to_string(self.folder.path().join(name)).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    pub fn retort(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_retort"));
        command
            .args(args)
            .env_remove("RETORT_ADDRESS")
            .env_remove("RETORT_LOG")
            .env("RETORT_HOME", self.home())
            .env("RETORT_PROGRAMS", self.programs())
            .stdin(Stdio::null());
        command
    }

    /// Starts `retort` with its output in files, so that the test can read it while it runs.
    pub fn start(&self, args: &[&str]) -> Running {
        let (out, err) = (self.folder.path().join("stdout"), self.folder.path().join("stderr"));
        let child = self
            .retort(args)
            .stdout(fs::File::create(&out).unwrap())
            .stderr(fs::File::create(&err).unwrap())
            .spawn()
            .unwrap();
        Running { child, out, err, pids: self.folder.path().join("pids") }
    }

    /// `retort up` on free ports.
    pub fn up(&self, more: &[&str]) -> Running {
        let mut args = vec!["up", "--listen", "127.0.0.1:0", "--broker-listen", "127.0.0.1:0"];
        args.extend(more);
        self.start(&args)
    }

    pub fn run_json(&self) -> Option<serde_json::Value> {
        serde_json::from_str(&fs::read_to_string(self.home().join("run.json")).ok()?).ok()
    }

    pub fn pid(&self, name: &str) -> Option<i64> {
        self.run_json()?["processes"][name].as_i64()
    }

    /// Asserts that no process that wrote down its pid is left. The kernel takes a moment to clear
    /// away what was killed.
    pub fn assert_nothing_left(&self) {
        let left = || -> Vec<String> { self.notes("pids").into_iter().filter(|pid| alive(pid)).collect() };
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline && !left().is_empty() {
            std::thread::yield_now();
        }
        let left = left();
        assert!(left.is_empty(), "still running: {left:?}");
        assert!(!self.home().join("run.json").exists(), "run.json is left");
    }
}

pub struct Running {
    pub child: Child,
    out: PathBuf,
    err: PathBuf,
    pids: PathBuf,
}

impl Running {
    pub fn stdout(&self) -> String {
        read(&self.out)
    }

    pub fn stderr(&self) -> String {
        read(&self.err)
    }

    pub fn signal(&self, signal: Signal) {
        kill(i64::from(self.child.id()), signal);
    }

    /// Waits until `check` finds something.
    pub fn until<T>(&mut self, what: &str, mut check: impl FnMut() -> Option<T>) -> T {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(found) = check() {
                return found;
            }
            if let Some(status) = self.child.try_wait().unwrap() {
                if let Some(found) = check() {
                    return found;
                }
                panic!("ended with {status} before {what}\n{}\n{}", self.stdout(), self.stderr());
            }
            assert!(Instant::now() < deadline, "waited for {what}\n{}\n{}", self.stdout(), self.stderr());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn until_printed(&mut self, text: &str) {
        let (out, err) = (self.out.clone(), self.err.clone());
        self.until(text, || (read(&out).contains(text) || read(&err).contains(text)).then_some(()));
    }

    pub fn ended(&mut self) -> ExitStatus {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "did not end\n{}\n{}", self.stdout(), self.stderr());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // A test that failed half-way leaves nothing either.
        for pid in read(&self.pids).lines().filter(|pid| alive(pid)) {
            kill(pid.parse().unwrap_or(0), Signal::KILL);
        }
    }
}

pub fn kill(pid: i64, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid as i32).filter(|_| pid > 1) {
        let _ = kill_process(pid, signal);
    }
}

/// A zombie that nobody waits for counts as gone.
fn alive(pid: &str) -> bool {
    let Some(raw) = pid.trim().parse().ok().and_then(Pid::from_raw) else { return false };
    let stat = fs::read_to_string(format!("/proc/{}/stat", raw.as_raw_nonzero())).unwrap_or_default();
    test_kill_process(raw).is_ok() && !stat.contains(") Z ")
}

fn free_port() -> std::net::SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn read(path: &Path) -> String {
    let mut text = String::new();
    if let Ok(mut file) = fs::File::open(path) {
        let _ = file.read_to_string(&mut text);
    }
    text
}
