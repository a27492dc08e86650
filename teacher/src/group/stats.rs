//! What a stage's model thread does with its time.

use std::{
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use retort_proto as proto;

/// What the time went to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spent {
    Busy,
    WaitingForInput,
    WaitingForOutput,
}

/// Counters of one stage, written by its model thread and read by whoever reports.
#[derive(Clone, Debug)]
pub(super) struct Meter {
    counted: Arc<Mutex<proto::StageStats>>,
}

impl Meter {
    pub(super) fn new(stage: usize, address: &str) -> Self {
        let counted = proto::StageStats { stage: stage as u32, address: address.to_owned(), ..Default::default() };
        Self { counted: Arc::new(Mutex::new(counted)) }
    }

    /// Starts from nothing with these layers.
    pub(super) fn loaded(&self, layers: &Range<usize>, bytes_read: u64) {
        self.with(|stats| {
            let (first_layer, end_layer) = (layers.start as u32, layers.end as u32);
            let proto::StageStats { stage, address, .. } = std::mem::take(stats);
            *stats = proto::StageStats { stage, address, first_layer, end_layer, bytes_read, ..Default::default() };
        });
    }

    /// Runs `work` and counts its time.
    pub(super) fn spend<T>(&self, on: Spent, work: impl FnOnce() -> T) -> T {
        let started = Instant::now();
        let done = work();
        self.add(on, started.elapsed());
        done
    }

    pub(super) fn add(&self, on: Spent, time: Duration) {
        self.with(|stats| {
            *match on {
                Spent::Busy => &mut stats.busy_seconds,
                Spent::WaitingForInput => &mut stats.waiting_for_input_seconds,
                Spent::WaitingForOutput => &mut stats.waiting_for_output_seconds,
            } += time.as_secs_f64();
        });
    }

    pub(super) fn step(&self, tokens: usize, bytes_sent: usize) {
        self.with(|stats| {
            stats.steps += 1;
            stats.tokens += tokens as u64;
            stats.bytes_sent += bytes_sent as u64;
        });
    }

    pub(super) fn read(&self) -> proto::StageStats {
        self.with(|stats| stats.clone())
    }

    fn with<T>(&self, change: impl FnOnce(&mut proto::StageStats) -> T) -> T {
        change(&mut self.counted.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What was counted between two readings of the same stage.
pub(super) fn since(before: &proto::StageStats, now: &proto::StageStats) -> proto::StageStats {
    if now.steps < before.steps {
        // Other layers were loaded between.
        return now.clone();
    }
    proto::StageStats {
        steps: now.steps - before.steps,
        tokens: now.tokens.saturating_sub(before.tokens),
        bytes_sent: now.bytes_sent.saturating_sub(before.bytes_sent),
        busy_seconds: now.busy_seconds - before.busy_seconds,
        waiting_for_input_seconds: now.waiting_for_input_seconds - before.waiting_for_input_seconds,
        waiting_for_output_seconds: now.waiting_for_output_seconds - before.waiting_for_output_seconds,
        ..now.clone()
    }
}

/// Share of the counted time in which the stage computed, from 0 to 1.
pub(super) fn busy_share(stats: &proto::StageStats) -> f64 {
    let all = stats.busy_seconds + stats.waiting_for_input_seconds + stats.waiting_for_output_seconds;
    if all > 0.0 { stats.busy_seconds / all } else { 0.0 }
}
