//! Live progress of a job: bars on a terminal, else one JSON line an event, or text lines.

mod bars;
mod lines;
mod state;

use retort_proto as proto;

use crate::{follow::Update, json, output::Output};
use bars::Bars;
use state::State;

/// How progress is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Bars,
    Plain,
    Json,
}

impl Mode {
    /// `--json` and `--plain` say so; else bars on a terminal and JSON lines off one.
    pub fn choose(json: bool, plain: bool, terminal: bool) -> Self {
        match (json, plain, terminal) {
            (true, _, _) => Self::Json,
            (false, true, _) => Self::Plain,
            (false, false, true) => Self::Bars,
            (false, false, false) => Self::Json,
        }
    }
}

/// Shows one job.
#[derive(Debug)]
pub struct View {
    output: Output,
    state: State,
    bars: Option<Bars>,
}

impl View {
    /// The output that comes with it is the one to use from here on: JSON when progress is.
    pub fn new(mode: Mode, output: &Output) -> (Self, Output) {
        let output = if mode == Mode::Json { output.as_json() } else { output.clone() };
        let bars = (mode == Mode::Bars).then(Bars::new);
        (Self { output: output.clone(), state: State::default(), bars }, output)
    }

    pub fn update(&mut self, update: Update) {
        match update {
            Update::Event(event) => self.event(&event),
            Update::Lost => self.notice("the orchestrator does not answer; waiting for it"),
            Update::Back => self.notice("connected again"),
        }
    }

    /// A remark that stays above the bars.
    pub fn notice(&mut self, text: &str) {
        self.output.json(&json::notice(text));
        let text = retort_process::escaped(text);
        match &self.bars {
            Some(bars) => bars.print(&text),
            None => self.output.text(&text),
        }
    }

    /// Text for people that stays above the bars; whoever reads JSON is told otherwise.
    pub fn say(&mut self, text: &str) {
        for line in text.lines() {
            let line = retort_process::escaped(line);
            match &self.bars {
                Some(bars) => bars.print(&line),
                None => self.output.text(&line),
            }
        }
    }

    /// Clears the bars; what is printed next stands on its own.
    pub fn finish(&mut self) {
        if let Some(bars) = self.bars.take() {
            bars.clear();
        }
    }

    fn event(&mut self, event: &proto::JobEvent) {
        if !self.state.apply(event) {
            return;
        }
        self.output.json(&json::event(event));
        match &self.bars {
            Some(bars) => {
                bars.draw(&self.state);
                if let Some(line) = lines::remarkable(event) {
                    bars.print(&line);
                }
            }
            None => {
                if let Some(line) = lines::line(event, &self.state) {
                    self.output.text(&line);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
