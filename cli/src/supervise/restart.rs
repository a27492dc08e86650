//! How long to wait before a process that died is started again.

use std::time::Duration;

const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(30);
/// A life this long forgives the deaths before it.
const FORGIVEN_AFTER: Duration = Duration::from_secs(60);

/// 1 s, 2 s, 4 s... up to 30 s, and back to 1 s after a life of 60 s.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backoff {
    deaths: u32,
}

impl Backoff {
    /// The wait after a process that lived this long has died.
    pub fn after(&mut self, lived: Duration) -> Duration {
        if lived >= FORGIVEN_AFTER {
            self.deaths = 0;
        }
        let wait = FIRST.saturating_mul(1 << self.deaths.min(5)).min(LONGEST);
        self.deaths = self.deaths.saturating_add(1);
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_to_the_longest_and_forgives_a_long_life() {
        let mut backoff = Backoff::default();
        let mut waits = |lives: &[u64]| -> Vec<u64> {
            lives.iter().map(|&seconds| backoff.after(Duration::from_secs(seconds)).as_secs()).collect()
        };
        assert_eq!(waits(&[0, 3, 59, 0, 1, 2, 0]), [1, 2, 4, 8, 16, 30, 30]);
        assert_eq!(waits(&[60, 0]), [1, 2]);
    }
}
