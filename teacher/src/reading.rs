//! How far the reading of a teacher's weights is, for the log.

use std::{
    path::Path,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Between two lines of the log.
const EVERY: Duration = Duration::from_secs(2);

/// Says every two seconds how many of how many bytes of `dir` are read, and how long the rest will take.
pub fn progress(dir: &Path) -> impl Fn(u64, u64) + Sync {
    let started = Instant::now();
    let said = Mutex::new(started);
    move |read, total| {
        let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.elapsed() < EVERY {
            return;
        }
        *said = Instant::now();
        let (done, rate) = (read as f64 / 1e9, read as f64 / 1e9 / started.elapsed().as_secs_f64());
        let all = total as f64 / 1e9;
        tracing::info!(
            model = %dir.display(),
            "reading weights: {done:.1} of {all:.1} GB, {rate:.1} GB/s, {:.0} s left",
            (all - done).max(0.0) / rate.max(1e-9)
        );
    }
}
