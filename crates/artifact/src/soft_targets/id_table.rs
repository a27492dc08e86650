//! The table of a row group's frequent tokens, by which its ids become small numbers.
//!
//! A support is a set, so only its sorted form is stored, as differences. Those are smaller still when
//! the tokens that many supports share lie together: each row group lists its frequent tokens once,
//! and an id's *rank* is its place in that list, or the list's length plus the id when it is not in
//! it. The list is ordered by frequency class (how often, rounded down to a power of two), inside a
//! class by id, so that it compresses well itself.

use std::collections::HashSet;

/// A token that fewer supports of a row group share is not worth its place in the table.
const LEAST_USES: u32 = 3;

/// Tokens by rank, and ranks by token.
#[derive(Debug, Default)]
pub(super) struct IdTable {
    ids: Vec<u32>,
    /// By id; `u32::MAX` for those that are not in the table. Empty while the table is.
    ranks: Vec<u32>,
}

impl IdTable {
    /// Of all supports of a row group laid end to end. Every id is below `vocab_size`.
    pub(super) fn frequent<'a>(ids: impl Iterator<Item = &'a u32>, vocab_size: u32) -> Self {
        let mut uses = vec![0u32; vocab_size as usize];
        for &id in ids {
            uses[id as usize] += 1;
        }
        let mut frequent: Vec<u32> = (0..vocab_size).filter(|&id| uses[id as usize] >= LEAST_USES).collect();
        // Stable, so that ids rise within a class.
        frequent.sort_by_key(|&id| std::cmp::Reverse(uses[id as usize].ilog2()));
        let mut ranks = vec![u32::MAX; vocab_size as usize];
        for (rank, &id) in (0..).zip(&frequent) {
            ranks[id as usize] = rank;
        }
        Self { ids: frequent, ranks }
    }

    pub(super) fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Rank of a token: below the table's length plus the vocabulary's size.
    pub(super) fn rank(&self, id: u32) -> u64 {
        match self.ranks.get(id as usize) {
            Some(&rank) if rank != u32::MAX => rank.into(),
            _ => self.ids.len() as u64 + u64::from(id),
        }
    }
}

/// Checks a table read from a file.
pub(super) fn check(ids: &[u32], vocab_size: u32) -> Result<(), String> {
    if let Some(id) = ids.iter().find(|&&id| id >= vocab_size) {
        return Err(format!("its id table has token {id}, outside the vocabulary of {vocab_size}"));
    }
    let mut seen = HashSet::with_capacity(ids.len());
    match ids.iter().find(|&&id| !seen.insert(id)) {
        Some(id) => Err(format!("its id table has token {id} twice")),
        None => Ok(()),
    }
}

/// The token of a rank; `None` beyond the vocabulary.
pub(super) fn token(table: &[u32], rank: u64, vocab_size: u32) -> Option<u32> {
    match usize::try_from(rank).ok().and_then(|rank| table.get(rank)) {
        Some(&id) => Some(id),
        None => u32::try_from(rank - table.len() as u64).ok().filter(|&id| id < vocab_size),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_has_one_rank_and_frequent_ones_the_smallest() {
        let supports = [5, 5, 5, 5, 9, 9, 9, 2, 2, 2, 2, 2, 7, 3, 3];
        let table = IdTable::frequent(supports.iter(), 12);
        // Four and five uses are one class, by id; two are too few.
        assert_eq!(table.ids(), [2, 5, 9]);
        check(table.ids(), 12).unwrap();
        let mut ranks: Vec<u64> = (0..12).map(|id| table.rank(id)).collect();
        for id in 0..12 {
            assert_eq!(token(table.ids(), table.rank(id), 12), Some(id));
        }
        ranks.sort_unstable();
        ranks.dedup();
        assert_eq!(ranks.len(), 12);
        assert_eq!(token(table.ids(), 15, 12), None);
        assert_eq!(token(table.ids(), u64::MAX, 12), None);
    }

    #[test]
    fn a_table_that_is_no_permutation_is_refused() {
        assert_eq!(check(&[1, 12], 12).unwrap_err(), "its id table has token 12, outside the vocabulary of 12");
        assert_eq!(check(&[1, 3, 1], 12).unwrap_err(), "its id table has token 1 twice");
    }
}
