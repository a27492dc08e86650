//! Which offsets of a partition may be committed: the contiguous prefix of those finished.

use std::collections::{BTreeMap, HashMap};

/// The partitions this consumer owns, and what it was handed and has not committed. Pure
/// bookkeeping.
#[derive(Debug, Default)]
pub(crate) struct InFlight {
    /// Partition -> offset -> finished.
    partitions: HashMap<i32, BTreeMap<i64, bool>>,
}

impl InFlight {
    /// The partition is ours from here on.
    pub(crate) fn assign(&mut self, partition: i32) {
        self.partitions.entry(partition).or_default();
    }

    /// The partition belongs to another consumer now; so do its open deliveries.
    pub(crate) fn revoke(&mut self, partition: i32) {
        self.partitions.remove(&partition);
    }

    pub(crate) fn owns(&self, partition: i32) -> bool {
        self.partitions.contains_key(&partition)
    }

    pub(crate) fn delivered(&mut self, partition: i32, offset: i64) {
        self.partitions.entry(partition).or_default().insert(offset, false);
    }

    /// Whether a delivery is still ours to compute.
    pub(crate) fn holds(&self, partition: i32, offset: i64) -> bool {
        self.partitions.get(&partition).is_some_and(|open| open.contains_key(&offset))
    }

    /// Marks an offset finished. Returns the offset to commit (one past the prefix), when the
    /// prefix grew; `None` when an earlier delivery is still open or the partition has moved away.
    pub(crate) fn finished(&mut self, partition: i32, offset: i64) -> Option<i64> {
        let open = self.partitions.get_mut(&partition)?;
        *open.get_mut(&offset)? = true;
        let mut next = None;
        while let Some(first) = open.first_entry().filter(|first| *first.get()) {
            next = Some(first.key() + 1);
            first.remove();
        }
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_contiguous_finished_prefix_is_committed() {
        let mut open = InFlight::default();
        open.assign(0);
        for offset in [4, 5, 6, 9] {
            open.delivered(0, offset);
        }
        assert_eq!(open.finished(0, 5), None, "4 is still open");
        assert_eq!(open.finished(0, 4), Some(6));
        assert_eq!(open.finished(0, 4), None, "twice changes nothing");
        assert_eq!(open.finished(0, 9), None);
        assert_eq!(open.finished(0, 6), Some(10), "a gap in the log is no open delivery");
    }

    #[test]
    fn a_partition_that_moved_away_commits_nothing() {
        let mut open = InFlight::default();
        open.delivered(2, 1);
        assert!(open.holds(2, 1) && open.owns(2));
        open.revoke(2);
        assert!(!open.holds(2, 1) && !open.owns(2));
        assert_eq!(open.finished(2, 1), None);
        open.delivered(2, 1);
        assert_eq!(open.finished(2, 1), Some(2), "delivered again, finished again");
    }
}
