//! Rows of one optimiser step, cut into micro-batches of documents laid one after another ("packed"): none
//! sees another, and there is no padding.
//!
//! The cut changes only speed: losses are summed over target tokens and divided by their number in
//! the whole step, so any cut gives the same gradient up to rounding.

use retort_core::spec::Train;

use crate::example::Example;

/// How micro-batches are cut: as the spec says, or as the device does best.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most tokens of a micro-batch. A single longer row stands alone.
    pub max_tokens: usize,
}

impl Limits {
    pub fn of(train: &Train, device: tch::Device) -> Self {
        let max_tokens = train.micro_batch_tokens.unwrap_or(match device {
            tch::Device::Cpu => Train::MICRO_BATCH_TOKENS_CPU,
            _ => Train::MICRO_BATCH_TOKENS_GPU,
        });
        Self { max_tokens: max_tokens as usize }
    }
}

/// Inputs of one forward pass and where its targets lie.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MicroBatch {
    /// Of the rows one after another.
    pub ids_n: Vec<i64>,
    /// Tokens of each row.
    pub lengths: Vec<i64>,
    /// Index in `ids_n` of the position whose output predicts each target.
    pub positions_m: Vec<i64>,
    /// Of the rows one after another.
    pub targets: Targets,
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
    /// Which entries have the teacher's exact probability; the others are samples.
    pub heads: Vec<bool>,
    /// Mass at each position that lies on all other tokens together.
    pub residuals: Vec<f32>,
    /// The actual token at each position.
    pub labels: Vec<i64>,
    /// Teacher's most likely token at each position.
    pub top_ids: Vec<i64>,
    /// Teacher's log-probability of each label.
    pub label_logprobs: Vec<f32>,
    /// Of each position in the loss.
    pub weights: Vec<f32>,
}

impl Targets {
    /// Number of positions.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// Teacher's log-probability of its most likely token at position `p`; None where the soft target has it
    /// only as a sample.
    pub fn top_logprob(&self, p: usize) -> Option<f32> {
        let mut entries = self.offsets[p]..self.offsets[p + 1];
        entries.find(|&e| self.heads[e] && self.ids[e] == self.top_ids[p]).map(|e| self.logprobs[e])
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
        self.heads.extend_from_slice(&support.heads);
        self.residuals.extend_from_slice(&support.residuals);
        self.labels.extend((0..example.targets.len()).map(|p| i64::from(example.label(p))));
        self.top_ids.extend(support.top_ids.iter().map(|&id| i64::from(id)));
        self.label_logprobs.extend_from_slice(&support.label_logprobs);
        self.weights.extend_from_slice(&example.weights);
    }
}

/// Cuts `examples` into micro-batches, longest rows first: rows of one length lie side by side, where attention
/// takes them together. Rows without targets need no work and are left out. Deterministic.
pub fn cut(examples: &[Example], limits: Limits) -> Vec<MicroBatch> {
    let mut order: Vec<usize> = (0..examples.len()).filter(|&i| examples[i].input_len() > 0).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(examples[i].input_len()));
    let mut micro_batches: Vec<MicroBatch> = Vec::new();
    for i in order {
        let fits = |micro: &MicroBatch| micro.ids_n.len() + examples[i].input_len() <= limits.max_tokens;
        match micro_batches.last_mut() {
            Some(last) if fits(last) => last.push(i, &examples[i]),
            _ => {
                let mut micro = MicroBatch::default();
                micro.push(i, &examples[i]);
                micro_batches.push(micro);
            }
        }
    }
    micro_batches
}

impl MicroBatch {
    fn push(&mut self, member: usize, example: &Example) {
        let start = self.ids_n.len() as i64;
        let input = &example.token_ids[..example.input_len()];
        self.ids_n.extend(input.iter().map(|&id| i64::from(id)));
        self.lengths.push(input.len() as i64);
        self.positions_m.extend(example.targets.iter().map(|&at| start + i64::from(at) - 1));
        self.targets.push(example);
        self.members.push(member);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::example::tests::example;

    fn rows(lengths: &[(usize, usize)]) -> Vec<Example> {
        lengths.iter().enumerate().map(|(i, &(p, c))| example(i as u64, p, c, 3, 50)).collect()
    }

    fn members(examples: &[Example], max_tokens: usize) -> Vec<Vec<usize>> {
        cut(examples, Limits { max_tokens }).into_iter().map(|micro| micro.members).collect()
    }

    #[test]
    fn the_spec_goes_before_the_device() {
        let of =
            |tokens, device| Limits::of(&Train { micro_batch_tokens: tokens, ..Train::default() }, device).max_tokens;
        let (cpu, gpu) = (tch::Device::Cpu, tch::Device::Cuda(0));
        assert_eq!([of(None, cpu), of(None, gpu), of(Some(96), cpu), of(Some(96), gpu)], [1024, 16_384, 96, 96]);
    }

    #[test]
    fn every_row_with_targets_stands_in_one_micro_batch_within_the_limit() {
        let lengths: Vec<_> = (0..40).map(|i| (1 + i * 7 % 23, i * 13 % 90)).collect();
        let examples = rows(&lengths);
        let micro_batches = cut(&examples, Limits { max_tokens: 256 });
        let mut seen: Vec<usize> = micro_batches.iter().flat_map(|micro| micro.members.clone()).collect();
        seen.sort_unstable();
        let expected: Vec<usize> = (0..40).filter(|&i| lengths[i].1 > 0).collect();
        assert_eq!(seen, expected);
        for micro in &micro_batches {
            assert!(micro.ids_n.len() <= 256, "{:?}", micro.lengths);
            assert_eq!(micro.lengths.iter().sum::<i64>(), micro.ids_n.len() as i64);
            assert!(micro.lengths.iter().rev().is_sorted());
        }
        let tokens: usize = examples.iter().map(Example::input_len).sum();
        assert!(micro_batches.len() <= tokens.div_ceil(256 - 112), "{}", micro_batches.len());
    }

    #[test]
    fn targets_point_at_the_position_before_them() {
        let examples = rows(&[(3, 2), (2, 5)]);
        let [micro] = &cut(&examples, Limits { max_tokens: 256 })[..] else { panic!("one micro-batch") };
        // Longest first: the second row reads 6 tokens, the first 4.
        assert_eq!((&micro.lengths[..], micro.ids_n.len()), (&[6, 4][..], 10));
        assert_eq!(micro.positions_m, [1, 2, 3, 4, 5, 8, 9]);
        assert_eq!(micro.targets.len(), 7);
        let flat: Vec<i64> =
            examples[1].token_ids[2..].iter().chain(&examples[0].token_ids[3..]).map(|&id| id.into()).collect();
        assert_eq!(micro.targets.labels, flat);
        let read: Vec<i64> =
            examples[1].token_ids[..6].iter().chain(&examples[0].token_ids[..4]).map(|&id| id.into()).collect();
        assert_eq!(micro.ids_n, read);
        assert_eq!(*micro.targets.offsets.last().unwrap(), micro.targets.ids.len());
    }

    #[test]
    fn a_row_longer_than_the_limit_stands_alone_and_no_rows_give_nothing() {
        let examples = rows(&[(300, 10), (5, 5), (4, 0)]);
        assert_eq!(members(&examples, 256), [vec![0], vec![1]]);
        assert!(members(&[], 256).is_empty());
        assert!(members(&rows(&[(4, 0)]), 256).is_empty());
    }
}
