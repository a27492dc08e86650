//! Rows of one optimiser step, cut into right-padded micro-batches of like lengths.
//!
//! The cut changes only speed: losses are summed over target tokens and divided by their number in
//! the whole step, so any cut gives the same gradient up to rounding.

use crate::example::Example;

/// How micro-batches are cut; a device's property, not a job's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most tokens of a micro-batch, padding included. A single longer row stands alone.
    pub max_tokens: usize,
    /// Tokens whose computation takes as long as what each micro-batch costs by itself; padding up
    /// to this much is cheaper than another micro-batch.
    pub overhead_tokens: usize,
}

impl Limits {
    pub fn for_device(device: tch::Device) -> Self {
        match device {
            tch::Device::Cpu => Self { max_tokens: 1024, overhead_tokens: 48 },
            _ => Self { max_tokens: 16_384, overhead_tokens: 1024 },
        }
    }
}

/// Most rows of a micro-batch; bounds the search for the best cut.
const MAX_ROWS: usize = 256;

/// Inputs of one forward pass and where its targets lie.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MicroBatch {
    pub rows: usize,
    /// Positions a row, padding included.
    pub width: usize,
    /// `rows * width` ids, padded with 0 on the right.
    pub ids_bt: Vec<i64>,
    /// Index in the flattened `b * t` positions whose output predicts each target.
    pub positions_n: Vec<i64>,
    /// Of the rows one after another.
    pub targets: Targets,
    /// Ids that are no padding.
    pub tokens: usize,
    /// Index of each row among the examples that were cut.
    pub members: Vec<usize>,
}

/// Soft targets of `n` positions, their supports laid end to end: position `p` has entries
/// `offsets[p]..offsets[p + 1]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Targets {
    /// `n + 1` rising numbers.
    pub offsets: Vec<usize>,
    pub ids: Vec<i64>,
    pub masses: Vec<f32>,
    /// Teacher's log-probability of each entry.
    pub logprobs: Vec<f32>,
    /// Mass at each position that lies on all other tokens together.
    pub residuals: Vec<f32>,
    /// The actual token at each position.
    pub labels: Vec<i64>,
    /// Teacher's most likely token at each position.
    pub top_ids: Vec<i64>,
    /// Teacher's log-probability of each label.
    pub label_logprobs: Vec<f32>,
}

impl Targets {
    /// Number of positions.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// Appends every position of a row.
    pub fn push(&mut self, example: &Example) {
        let support = &example.support;
        if self.offsets.is_empty() {
            self.offsets.push(0);
        }
        let base = self.ids.len();
        self.offsets.extend(support.offsets[1..].iter().map(|&offset| base + offset as usize));
        self.ids.extend(support.ids.iter().map(|&id| i64::from(id)));
        self.masses.extend_from_slice(&support.masses);
        self.logprobs.extend_from_slice(&support.logprobs);
        self.residuals.extend_from_slice(&support.residuals);
        self.labels.extend((0..example.targets.len()).map(|p| i64::from(example.label(p))));
        self.top_ids.extend(support.top_ids.iter().map(|&id| i64::from(id)));
        self.label_logprobs.extend_from_slice(&support.label_logprobs);
    }
}

/// Cuts `examples` into micro-batches, longest rows first; rows without targets need no work and
/// are left out. Deterministic.
pub fn cut(examples: &[Example], limits: Limits) -> Vec<MicroBatch> {
    groups(examples, limits).iter().map(|group| assemble(examples, group)).collect()
}

/// Indices of the rows of each micro-batch.
fn groups(examples: &[Example], limits: Limits) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..examples.len()).filter(|&i| examples[i].input_len() > 0).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(examples[i].input_len()));
    // best[i]: least cost of the first i rows in this order, and where their last group starts.
    let mut best = vec![(usize::MAX, 0); order.len() + 1];
    best[0] = (0, 0);
    for start in 0..order.len() {
        let width = examples[order[start]].input_len();
        let so_far = best[start].0;
        #[allow(clippy::needless_range_loop)] // `end` is also the group's end
        for end in start + 1..=order.len().min(start + MAX_ROWS) {
            let padded = width.saturating_mul(end - start);
            if padded > limits.max_tokens && end > start + 1 {
                break;
            }
            let cost = so_far.saturating_add(padded).saturating_add(limits.overhead_tokens);
            if cost < best[end].0 {
                best[end] = (cost, start);
            }
        }
    }
    let mut groups = Vec::new();
    let mut end = order.len();
    while end > 0 {
        let start = best[end].1;
        groups.push(order[start..end].to_vec());
        end = start;
    }
    groups.reverse();
    groups
}

fn assemble(examples: &[Example], group: &[usize]) -> MicroBatch {
    let width = group.iter().map(|&i| examples[i].input_len()).max().unwrap_or(0);
    let mut micro = MicroBatch { rows: group.len(), width, members: group.to_vec(), ..MicroBatch::default() };
    micro.ids_bt.reserve(group.len() * width);
    for (row, &i) in group.iter().enumerate() {
        let example = &examples[i];
        let input = &example.token_ids[..example.input_len()];
        micro.ids_bt.extend(input.iter().map(|&id| i64::from(id)));
        micro.ids_bt.resize((row + 1) * width, 0);
        micro.positions_n.extend(example.targets.iter().map(|&at| (row * width) as i64 + i64::from(at) - 1));
        micro.targets.push(example);
        micro.tokens += input.len();
    }
    micro
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::example::tests::example;

    const LIMITS: Limits = Limits { max_tokens: 256, overhead_tokens: 16 };

    fn rows(lengths: &[(usize, usize)]) -> Vec<Example> {
        lengths.iter().enumerate().map(|(i, &(p, c))| example(i as u64, p, c, 3, 50)).collect()
    }

    #[test]
    fn every_row_with_targets_stands_in_one_group_within_the_limit() {
        let lengths: Vec<_> = (0..40).map(|i| (1 + i * 7 % 23, i * 13 % 90)).collect();
        let examples = rows(&lengths);
        let groups = groups(&examples, LIMITS);
        let mut seen: Vec<usize> = groups.concat();
        seen.sort_unstable();
        let expected: Vec<usize> = (0..40).filter(|&i| lengths[i].1 > 0).collect();
        assert_eq!(seen, expected);
        for group in &groups {
            let width = group.iter().map(|&i| examples[i].input_len()).max().unwrap();
            assert!(width * group.len() <= 256 || group.len() == 1, "{group:?}");
        }
        let tokens: usize = examples.iter().map(Example::input_len).sum();
        let padded: usize = cut(&examples, LIMITS).iter().map(|micro| micro.ids_bt.len()).sum();
        assert!(padded * 100 <= tokens * 115, "{padded} positions for {tokens} tokens");
    }

    #[test]
    fn targets_point_at_the_position_before_them() {
        let examples = rows(&[(3, 2), (2, 5)]);
        let [micro] = &cut(&examples, Limits { max_tokens: 256, overhead_tokens: 1000 })[..] else {
            panic!("one group")
        };
        // Longest first: the second row reads 6 tokens, the first 4.
        assert_eq!((micro.rows, micro.width, micro.tokens), (2, 6, 10));
        assert_eq!(micro.positions_n, [1, 2, 3, 4, 5, 8, 9]);
        assert_eq!(micro.targets.len(), 7);
        let flat: Vec<i64> =
            examples[1].token_ids[2..].iter().chain(&examples[0].token_ids[3..]).map(|&id| id.into()).collect();
        assert_eq!(micro.targets.labels, flat);
        assert_eq!(micro.ids_bt[10..], [0, 0]);
        assert_eq!(*micro.targets.offsets.last().unwrap(), micro.targets.ids.len());
    }

    #[test]
    fn a_row_longer_than_the_limit_stands_alone_and_no_rows_give_nothing() {
        let examples = rows(&[(300, 10), (5, 5), (4, 0)]);
        let groups = groups(&examples, LIMITS);
        assert_eq!(groups, [vec![0], vec![1]]);
        assert!(cut(&[], LIMITS).is_empty());
        assert!(cut(&rows(&[(4, 0)]), LIMITS).is_empty());
    }
}
