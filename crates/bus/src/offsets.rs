//! Which offsets of a partition may be committed: the contiguous prefix of those finished.

use std::collections::{BTreeMap, HashMap};

/// The partitions this consumer owns, and what its caller was handed. Pure bookkeeping.
///
/// A partition that is lost is often ours again a moment later, as after a restart of the broker.
/// Its deliveries are remembered meanwhile, so that a task still being computed here is not handed
/// out a second time, and one that was finished in between is committed after all.
#[derive(Debug, Default)]
pub(crate) struct InFlight {
    owned: HashMap<i32, Open>,
    lost: HashMap<i32, Open>,
}

/// Offset -> whether it is finished.
type Open = BTreeMap<i64, bool>;

/// What to do with a record that has arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arrival {
    /// Hand it to the caller.
    New,
    /// The caller is computing it already.
    Open,
    /// The caller finished it while the partition was away: commit it now.
    Finished,
}

impl InFlight {
    /// The partition is ours from here on.
    pub(crate) fn assign(&mut self, partition: i32) {
        self.owned.entry(partition).or_default();
    }

    /// The partition belongs to nobody, or to another consumer, from here on.
    pub(crate) fn revoke(&mut self, partition: i32) {
        if let Some(open) = self.owned.remove(&partition).filter(|open| !open.is_empty()) {
            self.lost.entry(partition).or_default().extend(open);
        }
    }

    pub(crate) fn owns(&self, partition: i32) -> bool {
        self.owned.contains_key(&partition)
    }

    pub(crate) fn owns_nothing(&self) -> bool {
        self.owned.is_empty()
    }

    pub(crate) fn arrived(&mut self, partition: i32, offset: i64) -> Arrival {
        // What lies before it was committed by whoever had the partition in between.
        let known = self.lost.get_mut(&partition).and_then(|lost| {
            *lost = lost.split_off(&offset);
            lost.remove(&offset)
        });
        self.lost.retain(|_, lost| !lost.is_empty());
        self.owned.entry(partition).or_default().insert(offset, known == Some(true));
        match known {
            None => Arrival::New,
            Some(false) => Arrival::Open,
            Some(true) => Arrival::Finished,
        }
    }

    /// Whether a delivery is still ours to compute.
    pub(crate) fn holds(&self, partition: i32, offset: i64) -> bool {
        self.owned.get(&partition).is_some_and(|open| open.contains_key(&offset))
    }

    /// Marks an offset finished. Returns the offset to commit (one past the prefix), `None` when
    /// an earlier delivery is still open or the partition is away.
    pub(crate) fn finished(&mut self, partition: i32, offset: i64) -> Option<i64> {
        if let Some(lost) = self.lost.get_mut(&partition).and_then(|lost| lost.get_mut(&offset)) {
            *lost = true;
        }
        *self.owned.get_mut(&partition)?.get_mut(&offset)? = true;
        self.prefix(partition)
    }

    /// Everything before `next` is committed.
    pub(crate) fn committed(&mut self, partition: i32, next: i64) {
        if let Some(open) = self.owned.get_mut(&partition) {
            *open = open.split_off(&next);
        }
    }

    /// The caller has let go of a delivery without finishing it.
    pub(crate) fn abandoned(&mut self, partition: i32, offset: i64) {
        if let Some(lost) = self.lost.get_mut(&partition)
            && lost.get(&offset) == Some(&false)
        {
            lost.remove(&offset);
        }
    }

    fn prefix(&self, partition: i32) -> Option<i64> {
        let finished = self.owned.get(&partition)?.iter().take_while(|(_, finished)| **finished);
        finished.last().map(|(offset, _)| offset + 1)
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
            assert_eq!(open.arrived(0, offset), Arrival::New);
        }
        assert_eq!(open.finished(0, 5), None, "4 is still open");
        assert_eq!(open.finished(0, 4), Some(6));
        assert_eq!(open.finished(0, 4), Some(6), "until it is committed");
        open.committed(0, 6);
        assert_eq!(open.finished(0, 4), None, "twice changes nothing");
        assert_eq!(open.finished(0, 9), None);
        assert_eq!(open.finished(0, 6), Some(10), "a gap in the log is no open delivery");
    }

    #[test]
    fn a_partition_that_moved_away_commits_nothing() {
        let mut open = InFlight::default();
        open.arrived(2, 1);
        assert!(open.holds(2, 1) && open.owns(2));
        open.revoke(2);
        assert!(!open.holds(2, 1) && !open.owns(2));
        assert_eq!(open.finished(2, 1), None);
    }

    #[test]
    fn a_partition_that_comes_back_goes_on_where_it_was() {
        let mut open = InFlight::default();
        for offset in 0..4 {
            open.arrived(0, offset);
        }
        assert_eq!(open.finished(0, 0), Some(1));
        // Lost before the commit went through; 1 is finished meanwhile, 2 is not, 3 is let go.
        open.revoke(0);
        assert_eq!(open.finished(0, 1), None);
        open.abandoned(0, 3);
        open.assign(0);
        assert_eq!(open.arrived(0, 0), Arrival::Finished);
        assert_eq!(open.arrived(0, 1), Arrival::Finished);
        assert_eq!(open.arrived(0, 2), Arrival::Open);
        assert_eq!(open.arrived(0, 3), Arrival::New);
        assert_eq!(open.finished(0, 2), Some(3));
    }

    #[test]
    fn what_another_consumer_committed_meanwhile_is_forgotten() {
        let mut open = InFlight::default();
        open.arrived(0, 7);
        open.revoke(0);
        assert_eq!(open.arrived(0, 9), Arrival::New);
        assert_eq!(open.finished(0, 7), None);
        assert_eq!(open.finished(0, 9), Some(10));
    }
}
