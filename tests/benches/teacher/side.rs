//! A process that does teacher's work when asked: a JSON object a line in, a JSON object a line out.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::work::Request;

/// Longest that loading or one piece of work may take.
const PATIENCE: Duration = Duration::from_secs(600);
/// Longest that a side may take to end once nothing more will be asked.
const END: Duration = Duration::from_secs(15);

pub struct Side {
    pub about: About,
    child: Child,
    asks: Option<ChildStdin>,
    answers: Receiver<String>,
}

/// What a side says of itself once it is loaded.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct About {
    pub version: String,
    pub dtype: String,
    pub threads: usize,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Answer {
    /// Distributions delivered, or tokens written.
    pub tokens: u64,
    pub seconds: f64,
    /// Highest resident size of the process while it worked.
    pub peak_mb: u64,
    /// Resident size before.
    pub before_mb: u64,
    /// What else it has to say.
    #[serde(default)]
    pub detail: Value,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Ready(About),
    Error(String),
    #[serde(untagged)]
    Answer(Answer),
}

impl Side {
    /// Starts a program and waits until its model is loaded. The error is why it cannot run here.
    pub fn start(mut command: Command, log: &Path) -> Result<Self, String> {
        let program = command.get_program().display().to_string();
        let wrong = |what: &str, error: std::io::Error| format!("{what}: {error}");
        let errors = File::create(log).map_err(|error| wrong(&log.display().to_string(), error))?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(errors);
        let mut child = command.spawn().map_err(|error| wrong(&program, error))?;
        let (tell, answers) = channel();
        if let Some(output) = child.stdout.take() {
            // Ends with the child's output.
            std::thread::spawn(move || {
                BufReader::new(output).lines().map_while(Result::ok).all(|line| tell.send(line).is_ok())
            });
        }
        let asks = child.stdin.take();
        let about = About { version: String::new(), dtype: String::new(), threads: 0 };
        let mut side = Self { about, child, asks, answers };
        match side.line()? {
            Line::Ready(about) => side.about = about,
            Line::Error(why) => return Err(why),
            Line::Answer(_) => return Err("it answered before it was asked".to_owned()),
        }
        Ok(side)
    }

    /// Has it do one piece of work. The error is why it is of no more use.
    pub fn ask(&mut self, request: &Request) -> Result<Answer, String> {
        let mut line = serde_json::to_vec(request).map_err(|error| error.to_string())?;
        line.push(b'\n');
        let asks = self.asks.as_mut().ok_or("it takes no requests")?;
        asks.write_all(&line).and_then(|()| asks.flush()).map_err(|error| format!("{}: {error}", request.work))?;
        match self.line()? {
            Line::Answer(answer) if answer.seconds > 0.0 => Ok(answer),
            Line::Answer(_) => Err(format!("{}: it says that it took no time", request.work)),
            Line::Error(why) => Err(format!("{}: {why}", request.work)),
            Line::Ready(_) => Err("it answered that it is ready, again".to_owned()),
        }
    }

    fn line(&mut self) -> Result<Line, String> {
        match self.answers.recv_timeout(PATIENCE) {
            Ok(line) => serde_json::from_str(&line).map_err(|error| format!("it answered {line:?}: {error}")),
            Err(RecvTimeoutError::Timeout) => Err(format!("no answer within {} s", PATIENCE.as_secs())),
            Err(RecvTimeoutError::Disconnected) => Err(match self.child.wait() {
                Ok(status) => format!("it ended, {status}"),
                Err(error) => format!("it ended: {error}"),
            }),
        }
    }
}

impl Drop for Side {
    /// A side ends when its input does, or is ended.
    fn drop(&mut self) {
        self.asks = None;
        let asked = Instant::now();
        while asked.elapsed() < END {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
