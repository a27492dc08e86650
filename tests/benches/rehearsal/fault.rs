//! A stage killed in the middle of a shard, and how long it takes to be seen and outlived.

use std::{
    fs,
    time::{Duration, Instant},
};

use retort_tests::retort::Up;
use rustix::process::Signal;

use crate::stages::stats;

/// What the issue of a lost stage may take to be seen.
const SEEN_WITHIN: Duration = Duration::from_secs(10);
const STANDS_WITHIN: Duration = Duration::from_secs(120);

/// `kill -9` of one stage.
pub struct Fault {
    pub stage: usize,
    pub at: Option<Instant>,
    /// Seconds after the kill: until stage 0's log names the lost stage, until the group stands again, and
    /// until the next shard is published.
    pub seen: f64,
    pub stood: f64,
    pub published: Option<f64>,
}

impl Fault {
    pub fn of(stage: usize) -> Self {
        Self { stage, at: None, seen: 0.0, stood: 0.0, published: None }
    }

    /// Kills the stage once it computes, and waits until the group stands again.
    pub fn strike(&mut self, up: &mut Up) {
        let name = format!("teacher-1-stage-{}", self.stage);
        let steps = |up: &Up| stats(up, self.stage)["stages"][0]["steps"].as_u64().unwrap_or(0);
        let before = steps(up);
        up.wait("the next shard's first steps", Duration::from_secs(60), |up| (steps(up) > before).then_some(()));
        let formed = count(up, "the group stands");
        up.signal_process(&name, Signal::KILL);
        let at = Instant::now();
        self.at = Some(at);
        println!("fault          stage {} killed in the middle of a shard", self.stage);
        let lost = format!("lost stage {} of group \"teacher-1\"", self.stage);
        up.wait(&lost, SEEN_WITHIN, |up| (count(up, &lost) > 0).then_some(()));
        self.seen = at.elapsed().as_secs_f64();
        up.wait("the group to stand again", STANDS_WITHIN, |up| (count(up, "the group stands") > formed).then_some(()));
        self.stood = at.elapsed().as_secs_f64();
        println!(
            "fault          seen and named after {:.2} s, the group stands again after {:.1} s",
            self.seen, self.stood
        );
    }

    /// A shard was published after the fault.
    pub fn recovered(&mut self) {
        let since = self.at.map(|at| at.elapsed().as_secs_f64());
        self.published = self.published.or(since);
    }
}

/// How often stage 0's log says `text`.
fn count(up: &Up, text: &str) -> usize {
    let log = fs::read_to_string(up.home.join("logs").join("teacher-1.log")).unwrap_or_default();
    log.matches(text).count()
}
