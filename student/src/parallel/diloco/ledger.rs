//! Which batches are still to be trained, and by whom. Pure.

use serde::{Deserialize, Serialize};

/// Batches of a run, counted as the steps of one worker would be. Each is given to one worker; what a lost
/// worker had comes back and goes out again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    /// The first that nobody was ever given.
    next: u32,
    /// Given and given back, rising.
    returned: Vec<u32>,
    end: u32,
}

impl Ledger {
    pub fn new(batches: u32) -> Self {
        Self { next: 0, returned: Vec::new(), end: batches }
    }

    /// That nobody has now or has done.
    pub fn left(&self) -> u32 {
        self.end - self.next + self.returned.len() as u32
    }

    /// Of how many a run consists.
    pub fn total(&self) -> u32 {
        self.end
    }

    /// Whether it may be read back from outside.
    pub fn is_sound(&self, batches: u32) -> bool {
        self.end == batches
            && self.next <= self.end
            && self.returned.windows(2).all(|pair| pair[0] < pair[1])
            && self.returned.last().is_none_or(|&last| last < self.next)
    }

    /// For each worker at most as many batches as it wants, those given back first, in rising order. Where
    /// fewer are left than are wanted, they are dealt out one by one from the first worker on.
    pub fn take(&mut self, wanted: &[u32]) -> Vec<Vec<u32>> {
        let mut counts = vec![0; wanted.len()];
        let mut left = self.left();
        while left > 0 && counts.iter().zip(wanted).any(|(count, wanted)| count < wanted) {
            for (count, wanted) in counts.iter_mut().zip(wanted) {
                if *count < *wanted && left > 0 {
                    *count += 1;
                    left -= 1;
                }
            }
        }
        counts.into_iter().map(|count| (0..count).filter_map(|_| self.pop()).collect()).collect()
    }

    pub fn give_back(&mut self, batches: &[u32]) {
        self.returned.extend_from_slice(batches);
        self.returned.sort_unstable();
    }

    fn pop(&mut self) -> Option<u32> {
        if !self.returned.is_empty() {
            return Some(self.returned.remove(0));
        }
        if self.next >= self.end {
            return None;
        }
        self.next += 1;
        Some(self.next - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_batch_goes_out_once_and_again_only_when_given_back() {
        let mut ledger = Ledger::new(23);
        let mut done = Vec::new();
        let mut round = 0;
        while ledger.left() > 0 {
            assert!(ledger.is_sound(23));
            let parts = ledger.take(&[4, 4, 2]);
            assert!(!parts[0].is_empty(), "the first worker has work for as long as there is any");
            for (worker, part) in parts.into_iter().enumerate() {
                // One worker is lost in two rounds.
                if worker == 1 && round < 2 {
                    ledger.give_back(&part);
                } else {
                    done.extend(part);
                }
            }
            round += 1;
        }
        done.sort_unstable();
        assert_eq!(done, (0..23).collect::<Vec<_>>());
    }

    #[test]
    fn few_batches_are_shared_out_evenly() {
        let mut ledger = Ledger::new(5);
        assert_eq!(ledger.take(&[4, 4, 4]), [vec![0, 1], vec![2, 3], vec![4]]);
        assert_eq!(ledger.take(&[4]), [Vec::<u32>::new()]);
        ledger.give_back(&[2, 3]);
        assert_eq!(ledger.take(&[1, 9]), [vec![2], vec![3]]);
        let strange = Ledger { next: 9, returned: vec![], end: 5 };
        assert!(!strange.is_sound(5) && !Ledger::new(5).is_sound(6));
        assert!(!Ledger { next: 2, returned: vec![1, 1], end: 5 }.is_sound(5));
    }
}
