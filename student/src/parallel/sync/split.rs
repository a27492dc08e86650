//! Who computes which rows of a step.

use std::cmp::Reverse;

/// Indices of the rows of each of `workers`, rising; `tokens` says what each row costs. The longest rows are
/// dealt first, each to whoever has least by then (Graham, "Bounds on Multiprocessing Timing Anomalies",
/// 1969), so nobody has more than a third above what the best split would give the most laden. Rows of no tokens stay with the first.
pub(super) fn split(tokens: &[usize], workers: usize) -> Vec<Vec<usize>> {
    let mut parts = vec![Vec::new(); workers.max(1)];
    let mut laden = vec![0; parts.len()];
    let mut order: Vec<usize> = (0..tokens.len()).collect();
    order.sort_by_key(|&row| Reverse(tokens[row]));
    for row in order {
        let least = if tokens[row] == 0 { 0 } else { (0..parts.len()).min_by_key(|&of| laden[of]).unwrap_or(0) };
        laden[least] += tokens[row];
        parts[least].push(row);
    }
    parts.iter_mut().for_each(|part| part.sort_unstable());
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_has_one_worker_and_none_is_overladen() {
        let tokens: Vec<usize> = (0..97).map(|row| row * 31 % 113).collect();
        for workers in 1..=9 {
            let parts = split(&tokens, workers);
            assert_eq!(parts.len(), workers);
            let mut rows = parts.concat();
            rows.sort_unstable();
            assert_eq!(rows, (0..97).collect::<Vec<_>>());
            let laden: Vec<usize> = parts.iter().map(|part| part.iter().map(|&row| tokens[row]).sum()).collect();
            let fair = tokens.iter().sum::<usize>().div_ceil(workers);
            assert!(laden.iter().all(|&tokens| 3 * tokens <= 4 * fair + 3), "{laden:?}");
            assert_eq!(parts, split(&tokens, workers));
        }
    }

    #[test]
    fn more_workers_than_rows_and_rows_without_targets() {
        assert_eq!(split(&[5, 0, 7], 5), [vec![1, 2], vec![0], vec![], vec![], vec![]]);
        assert_eq!(split(&[0, 0], 2), [vec![0, 1], vec![]]);
        assert_eq!(split(&[], 3), vec![Vec::<usize>::new(); 3]);
        assert_eq!(split(&[3, 3], 0), [vec![0, 1]]);
    }
}
