//! Bars on a terminal: one a phase, and a line for what concerns the whole job.

use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::state::{Phase, State};
use crate::text;

#[derive(Debug)]
pub struct Bars {
    all: MultiProgress,
    teach: ProgressBar,
    train: ProgressBar,
    evaluate: ProgressBar,
    summary: ProgressBar,
}

impl Bars {
    pub fn new() -> Self {
        let all = MultiProgress::with_draw_target(ProgressDrawTarget::stdout_with_hz(8));
        let bar = |name: &'static str, template: &str| {
            let bar = all.add(ProgressBar::new(1));
            bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_prefix(name);
            bar
        };
        const BAR: &str = "{prefix:<9} {bar:24.cyan/dim} {pos:>5}/{len:<5} {wide_msg}";
        let teach = bar("teach", BAR);
        let train = bar("train", BAR);
        let evaluate = bar("evaluate", BAR);
        let summary = bar("", "{spinner} {elapsed:>5}  {wide_msg}");
        summary.enable_steady_tick(Duration::from_millis(250));
        Self { all, teach, train, evaluate, summary }
    }

    pub fn draw(&self, state: &State) {
        place(&self.teach, state.shards_done, state.shards_total);
        self.teach.set_message(match state.teacher_tokens {
            0 => "shards".to_owned(),
            tokens => format!("shards  {} tokens  {} tok/s", text::count(tokens), text::rate(state.teacher_rate)),
        });
        place(&self.train, state.step, state.steps_total);
        self.train.set_message(match state.loss {
            None => "steps".to_owned(),
            Some(loss) => format!("steps  loss {loss:.4}  {} tok/s", text::rate(state.student_rate)),
        });
        place(&self.evaluate, u32::from(state.evaluated), 1);
        self.evaluate.set_message(kl(state));
        self.summary.set_message(summary(state));
    }

    pub fn print(&self, line: &str) {
        // Only a terminal that has gone refuses; then nobody reads.
        let _ = self.all.println(line);
    }

    pub fn clear(&self) {
        self.summary.disable_steady_tick();
        let _ = self.all.clear();
    }
}

/// `held-out KL 0.8123, was 3.2001`
pub fn kl(state: &State) -> String {
    match (state.latest_kl, state.first_kl) {
        (Some(latest), Some(first)) if first != latest => format!("held-out KL {latest:.4}, was {first:.4}"),
        (Some(latest), _) => format!("held-out KL {latest:.4}"),
        _ => "held-out KL not measured yet".to_owned(),
    }
}

/// `training · 3 min 20 s left · 1 attempt redone`
pub fn summary(state: &State) -> String {
    let phase = match state.phase() {
        Phase::Queued => "queued",
        Phase::Teach if state.step > 0 => "teaching and training",
        Phase::Teach => "teaching",
        Phase::Train => "training",
        Phase::Evaluate => "evaluating",
        Phase::Done => "done",
    };
    let mut parts = vec![phase.to_owned()];
    if let Some(left) = state.left() {
        parts.push(format!("{} left", text::duration(left.as_secs_f64())));
    }
    match state.redone {
        0 => {}
        1 => parts.push("1 attempt redone".to_owned()),
        n => parts.push(format!("{n} attempts redone")),
    }
    parts.join(" · ")
}

fn place(bar: &ProgressBar, done: u32, total: u32) {
    bar.set_length(u64::from(total.max(1)));
    bar.set_position(u64::from(done.min(total)));
}
