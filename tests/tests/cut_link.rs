//! A teacher group over two network namespaces, whose link is cut in mid-job. Needs root; without it the
//! test says that it was skipped.

#![allow(clippy::unwrap_used)] // helpers of tests unwrap as tests do

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use retort_proto::{self as proto, job_event::What};
use retort_tests::{
    prompts::{self, Shape},
    published::published_once,
    retort::{Up, programs},
    teacher,
};

const PATIENCE: Duration = Duration::from_secs(300);
const SEEN_WITHIN: Duration = Duration::from_secs(10);
/// Stage 0's end of the link, and stage 1's.
const ENDS: [&str; 2] = ["10.201.77.1", "10.201.77.2"];

fn ip(args: &[&str]) -> Result<(), String> {
    let output = Command::new("ip").args(args).output().map_err(|error| error.to_string())?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("ip {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim())),
    }
}

/// A network namespace and the link to it; dropped, both are gone.
struct Far {
    name: String,
}

impl Far {
    fn new() -> Result<Self, String> {
        let far = Self { name: format!("retort-{}", std::process::id()) };
        let (name, near) = (far.name.as_str(), "retort-near");
        ip(&["netns", "add", name])?;
        ip(&["link", "add", near, "type", "veth", "peer", "name", "retort-far", "netns", name])?;
        ip(&["addr", "add", &format!("{}/24", ENDS[0]), "dev", near])?;
        ip(&["link", "set", near, "up"])?;
        ip(&["-n", name, "addr", "add", &format!("{}/24", ENDS[1]), "dev", "retort-far"])?;
        ip(&["-n", name, "link", "set", "lo", "up"])?;
        far.link("up")?;
        Ok(far)
    }

    fn link(&self, state: &str) -> Result<(), String> {
        ip(&["-n", &self.name, "link", "set", "retort-far", state])
    }
}

impl Drop for Far {
    fn drop(&mut self) {
        let _ = ip(&["link", "delete", "retort-near"]);
        let _ = ip(&["netns", "delete", &self.name]);
    }
}

/// The two stages, and where they log.
struct Stages {
    children: Vec<Child>,
    logs: Vec<PathBuf>,
}

impl Stages {
    fn start(up: &Up, far: &Far, folder: &Path, life: u32) -> Self {
        let mut stages = Self { children: Vec::new(), logs: Vec::new() };
        let peers = format!("{}:7475,{}:7475", ENDS[0], ENDS[1]);
        for stage in 0..2 {
            let program = programs().join("retort-teacher");
            let mut command = match stage {
                0 => Command::new(program),
                _ => {
                    let mut command = Command::new("ip");
                    command.args(["netns", "exec", &far.name]).arg(program);
                    command
                }
            };
            let log = folder.join(format!("stage-{stage}-{life}.log"));
            let running = up.running();
            command
                .args(["--orchestrator", &running.address, "--brokers", &running.brokers, "--store", &running.store])
                .args(["--threads", "1", "--group", "cut", "--stage", &format!("{stage}/2"), "--peers", &peers])
                .arg("--plaintext")
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(File::create(&log).unwrap());
            stages.children.push(command.spawn().unwrap());
            stages.logs.push(log);
        }
        stages
    }

    /// Waits until both have ended.
    fn ended(&mut self, within: Duration) -> bool {
        let deadline = Instant::now() + within;
        loop {
            let running = self.children.iter_mut().filter_map(|child| child.try_wait().unwrap()).count() < 2;
            if !running || Instant::now() > deadline {
                return !running;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn log(&self, stage: usize) -> String {
        std::fs::read_to_string(&self.logs[stage]).unwrap_or_default()
    }
}

impl Drop for Stages {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_link_between_two_stages_is_cut() {
    let far = match Far::new() {
        Ok(far) => far,
        Err(why) => {
            println!("SKIPPED: no network namespace can be made here ({why}); run it as root");
            return;
        }
    };
    let folder = tempfile::tempdir().unwrap();
    teacher::tiny(&folder.path().join("teacher"), 4);
    let shape = Shape { name: "cut", train: 40, ..Shape::default() };
    let spec = prompts::spec(folder.path(), &folder.path().join("teacher"), &shape);
    let mut up = Up::start(folder.path(), &["--teachers", "0"]);
    let mut stages = Stages::start(&up, &far, folder.path(), 1);
    let job = up.create(&spec);
    let published = |event: &proto::JobEvent| event.progress.as_ref().map_or(0, |progress| progress.shards_published);
    let before = up.follow(&job, PATIENCE, |_, event| published(event) >= 2).await;
    assert_eq!(before.last().unwrap().state, proto::JobState::Running as i32, "{}", up.log());

    far.link("down").unwrap();
    let cut = Instant::now();
    let ended = stages.ended(SEEN_WITHIN + Duration::from_secs(2));
    assert!(ended, "both stages end: {}\n{}", stages.log(0), stages.log(1));
    println!("both stages had ended {:.1} s after the cut", cut.elapsed().as_secs_f64());
    let lost = format!("stage 0 lost stage 1 of group \"cut\" at {}:7475: nothing heard for 6 s", ENDS[1]);
    assert!(stages.log(0).contains(&lost), "{}", stages.log(0));
    let lost = format!("stage 1 lost stage 0 of group \"cut\" at {}:7475: nothing heard for 6 s", ENDS[0]);
    assert!(stages.log(1).contains(&lost), "{}", stages.log(1));

    // As whoever watches over a group does.
    far.link("up").unwrap();
    let _stages = Stages::start(&up, &far, folder.path(), 2);
    let events = up.follow(&job, PATIENCE, |_, _| false).await;
    let end = up.jobs().await.get_job(proto::GetJobRequest { name: job.clone() }).await.unwrap().into_inner();
    assert_eq!(end.state, proto::JobState::Succeeded as i32, "{:?}\n{}", end.error, up.log());
    published_once(&up, &job, &shape, &events);
    let reasons: Vec<String> = events
        .into_iter()
        .filter_map(|event| match event.what {
            Some(What::AttemptLost(lost)) => lost.redone.map(|redone| redone.reason),
            _ => None,
        })
        .collect();
    assert!(reasons.iter().any(|reason| reason.contains("stage 1 of group \"cut\"")), "{reasons:?}");
}
