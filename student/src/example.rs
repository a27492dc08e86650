//! One training row in memory, and its form in the local spill file.

use std::mem::size_of;

use retort_artifact::soft_targets::{DecodedSequence, SparseTargets};
use retort_core::{Code, Error, Result};

/// A sequence and the teacher's soft targets, checked: every id lies in the vocabulary, every
/// target has a token before it, every offset lies in its array.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Example {
    pub token_ids: Vec<u32>,
    /// Index in `token_ids` of each target token, rising, none 0; the token before it predicts it.
    pub targets: Vec<u32>,
    /// One position for each of `targets`.
    pub support: SparseTargets,
    /// Of each of `targets` in the loss, above 0.
    pub weights: Vec<f32>,
}

impl Example {
    /// Checks what a decoder cannot: that the ids are the student's. With a temperature other than 1, and which
    /// of the shard's it is, the targets are at that.
    pub fn from_sequence(
        sequence: DecodedSequence,
        vocab_size: u32,
        temperature: Option<(usize, f64)>,
    ) -> Result<Self> {
        let targets: Vec<u32> =
            (0u32..).zip(&sequence.target_mask).filter(|(_, target)| **target).map(|(at, _)| at).collect();
        let weights = vec![1.0; targets.len()];
        let mut example = Self { token_ids: sequence.token_ids, targets, support: sequence.targets, weights };
        if let Some((index, temperature)) = temperature {
            example.support = example.support.at_temperature(index, temperature).ok_or_else(|| {
                let message = format!(
                    "row {:?} of a soft-target shard was not captured for temperature {temperature}",
                    sequence.row_id
                );
                Error::new(Code::ShardCorrupt, message)
            })?;
        }
        example.support.log_sum_exps = Vec::new();
        example.check(vocab_size).map_err(|why| {
            Error::new(Code::ShardCorrupt, format!("row {:?} of a soft-target shard: {why}", sequence.row_id))
        })?;
        Ok(example)
    }

    /// With another weight of each target token, one for each; what weighs 0, or nearly so in f32, is a target no more.
    pub fn weighing(mut self, weights: &[f64]) -> Self {
        let weighty = |&p: &usize| weights.get(p).is_some_and(|&weight| weight as f32 >= f32::MIN_POSITIVE);
        let kept: Vec<usize> = (0..self.targets.len()).filter(weighty).collect();
        if kept.len() < self.targets.len() {
            self.targets = kept.iter().map(|&p| self.targets[p]).collect();
            self.support = at_positions(&self.support, &kept);
        }
        self.weights = kept.iter().map(|&p| weights[p] as f32).collect();
        self
    }

    /// Tokens the student has to read: those up to the last target, which itself is only predicted.
    pub fn input_len(&self) -> usize {
        self.targets.last().map_or(0, |&last| last as usize)
    }

    /// Token that stands at target `p`.
    pub fn label(&self, p: usize) -> u32 {
        self.token_ids[self.targets[p] as usize]
    }

    /// What a row must hold whoever made it; the text says which does not.
    pub(crate) fn check(&self, vocab_size: u32) -> Result<(), String> {
        let support = &self.support;
        let positions = self.targets.len();
        if self.weights.len() != positions {
            return Err(format!("{positions} target tokens, but weights of {}", self.weights.len()));
        }
        if let Some(weight) = self.weights.iter().find(|weight| !(**weight > 0.0 && weight.is_finite())) {
            return Err(format!("a weight of a target token is {weight}"));
        }
        let per_position = [support.label_logprobs.len(), support.top_ids.len(), support.residuals.len()];
        if per_position.iter().any(|&length| length != positions) {
            return Err(format!("{positions} target tokens, but soft targets for {}", support.label_logprobs.len()));
        }
        if support.offsets.len() != positions + 1 || support.offsets[0] != 0 || !support.offsets.is_sorted() {
            return Err("the offsets of its soft targets do not rise from 0".to_owned());
        }
        let entries = support.ids.len();
        if support.offsets[positions] as usize != entries
            || support.masses.len() != entries
            || support.logprobs.len() != entries
            || support.heads.len() != entries
        {
            return Err(format!("{entries} support ids do not fit the offsets, masses and log-probabilities"));
        }
        if self.targets.first() == Some(&0)
            || self.targets.last().is_some_and(|&at| at as usize >= self.token_ids.len())
        {
            return Err("a target token has no token before it".to_owned());
        }
        if !self.targets.is_sorted_by(|before, after| before < after) {
            return Err("its target tokens do not rise".to_owned());
        }
        let mut ids = self.token_ids.iter().chain(&support.ids).chain(&support.top_ids);
        match ids.find(|&&id| id >= vocab_size) {
            Some(id) => Err(format!("token id {id} lies outside the vocabulary of {vocab_size}")),
            None => Ok(()),
        }
    }

    /// Little-endian lengths, then the arrays end to end.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let support = &self.support;
        let mut bytes = Vec::with_capacity(self.spilled_bytes());
        for len in [self.token_ids.len(), self.targets.len(), support.ids.len()] {
            bytes.extend_from_slice(&(len as u64).to_le_bytes());
        }
        for words in [&self.token_ids, &self.targets, &support.offsets, &support.ids, &support.top_ids] {
            bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        }
        for numbers in [&support.masses, &support.logprobs, &support.label_logprobs, &support.residuals, &self.weights]
        {
            bytes.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        }
        bytes.extend(support.heads.iter().map(|&head| u8::from(head)));
        bytes
    }

    /// Reads what [`Example::to_bytes`] wrote; `None` for anything else.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader { bytes };
        let (tokens, positions, entries) = (reader.length()?, reader.length()?, reader.length()?);
        let (token_ids, targets) = (reader.words(tokens)?, reader.words(positions)?);
        let mut support = SparseTargets {
            offsets: reader.words(positions.checked_add(1)?)?,
            ids: reader.words(entries)?,
            top_ids: reader.words(positions)?,
            masses: reader.numbers(entries)?,
            logprobs: reader.numbers(entries)?,
            label_logprobs: reader.numbers(positions)?,
            residuals: reader.numbers(positions)?,
            log_sum_exps: Vec::new(),
            heads: Vec::new(),
        };
        let weights = reader.numbers(positions)?;
        support.heads = reader.flags(entries)?;
        Some(Self { token_ids, targets, support, weights }).filter(|_| reader.bytes.is_empty())
    }

    pub(crate) fn spilled_bytes(&self) -> usize {
        let words = self.token_ids.len() + 6 * self.targets.len() + 1 + 3 * self.support.ids.len();
        3 * size_of::<u64>() + words * size_of::<u32>() + self.support.heads.len()
    }
}

/// The soft targets of some positions, in their order.
fn at_positions(support: &SparseTargets, kept: &[usize]) -> SparseTargets {
    let mut of = SparseTargets { offsets: vec![0], ..SparseTargets::default() };
    for &p in kept {
        let entries = support.range(p);
        of.ids.extend_from_slice(&support.ids[entries.clone()]);
        of.masses.extend_from_slice(&support.masses[entries.clone()]);
        of.logprobs.extend_from_slice(&support.logprobs[entries.clone()]);
        of.heads.extend_from_slice(&support.heads[entries]);
        of.offsets.push(of.ids.len() as u32);
        of.residuals.push(support.residuals[p]);
        of.top_ids.push(support.top_ids[p]);
        of.label_logprobs.push(support.label_logprobs[p]);
    }
    of
}

struct Reader<'a> {
    bytes: &'a [u8],
}

impl Reader<'_> {
    fn length(&mut self) -> Option<usize> {
        let (head, rest) = self.bytes.split_first_chunk::<8>()?;
        self.bytes = rest;
        usize::try_from(u64::from_le_bytes(*head)).ok()
    }

    fn words(&mut self, count: usize) -> Option<Vec<u32>> {
        self.array(count, u32::from_le_bytes)
    }

    fn numbers(&mut self, count: usize) -> Option<Vec<f32>> {
        self.array(count, f32::from_le_bytes)
    }

    fn flags(&mut self, count: usize) -> Option<Vec<bool>> {
        let (head, rest) = self.bytes.split_at_checked(count)?;
        self.bytes = rest;
        head.iter().all(|&byte| byte < 2).then(|| head.iter().map(|&byte| byte == 1).collect())
    }

    fn array<T>(&mut self, count: usize, read: impl Fn([u8; 4]) -> T) -> Option<Vec<T>> {
        let (head, rest) = self.bytes.split_at_checked(count.checked_mul(4)?)?;
        self.bytes = rest;
        Some(head.as_chunks::<4>().0.iter().map(|chunk| read(*chunk)).collect())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use retort_core::random::{Counter, Purpose};

    use super::*;

    /// A row of `prompt` + `completion` random tokens with `support` random entries a position.
    pub(crate) fn example(seed: u64, prompt: usize, completion: usize, support: usize, vocab_size: u32) -> Example {
        let mut random = Counter::new(seed, Purpose::Sample, 0, 0);
        let mut id = || random.below(u64::from(vocab_size)) as u32;
        let token_ids: Vec<u32> = (0..prompt + completion).map(|_| id()).collect();
        let mut example = Example {
            token_ids,
            targets: (prompt as u32..(prompt + completion) as u32).collect(),
            support: SparseTargets { offsets: vec![0], ..SparseTargets::default() },
            weights: vec![1.0; completion],
        };
        let mut random = Counter::new(seed, Purpose::Tail, 0, 0);
        for p in 0..completion {
            let mut ids: Vec<u32> = (0..support).map(|_| random.below(u64::from(vocab_size)) as u32).collect();
            ids.sort_unstable();
            ids.dedup();
            let weights: Vec<f64> = ids.iter().map(|_| random.next_f64() + 0.01).collect();
            let total: f64 = weights.iter().sum::<f64>() * 1.01;
            let top = weights.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(at, _)| ids[at]);
            example.support.masses.extend(weights.iter().map(|weight| (weight / total) as f32));
            example.support.logprobs.extend(weights.iter().map(|weight| (weight / total).ln() as f32));
            example.support.heads.extend(ids.iter().map(|_| true));
            example.support.ids.extend(ids);
            example.support.offsets.push(example.support.ids.len() as u32);
            example.support.top_ids.push(top);
            example.support.residuals.push(0.0);
            example.support.label_logprobs.push(-1.0 - p as f32 / 100.0);
        }
        example
    }

    #[test]
    fn spilled_and_read_back_is_the_same() {
        let weights = [2.5, 0.0, 1.0, 0.25, 1000.0, 0.0, 3.0];
        for example in [example(1, 5, 7, 4, 100), example(2, 3, 0, 4, 100), example(1, 5, 7, 4, 100).weighing(&weights)]
        {
            let bytes = example.to_bytes();
            assert_eq!(bytes.len(), example.spilled_bytes());
            assert_eq!(Example::from_bytes(&bytes).unwrap(), example);
        }
    }

    #[test]
    fn what_weighs_nothing_is_no_target() {
        let whole = example(4, 5, 6, 3, 100);
        let masked = whole.clone().weighing(&[0.0, 2.0, 0.0, 1.0, 0.5, 0.0]);
        masked.check(100).unwrap();
        assert_eq!(masked.weights, [2.0, 1.0, 0.5]);
        assert_eq!((&masked.token_ids, &masked.targets[..]), (&whole.token_ids, &[6, 8, 9][..]));
        assert_eq!(masked.input_len(), 9, "the student reads up to the last target");
        for (kept, p) in [1, 3, 4].into_iter().enumerate() {
            let (of, from) = (masked.support.range(kept), whole.support.range(p));
            assert_eq!(masked.support.ids[of.clone()], whole.support.ids[from.clone()]);
            assert_eq!(masked.support.masses[of.clone()], whole.support.masses[from.clone()]);
            assert_eq!(masked.support.logprobs[of.clone()], whole.support.logprobs[from.clone()]);
            assert_eq!(masked.support.heads[of], whole.support.heads[from]);
            assert_eq!(masked.support.label_logprobs[kept], whole.support.label_logprobs[p]);
            assert_eq!(masked.support.top_ids[kept], whole.support.top_ids[p]);
            assert_eq!(masked.label(kept), whole.label(p));
        }
        assert_eq!(whole.clone().weighing(&[1.0; 6]), whole);
    }

    #[test]
    fn damaged_bytes_are_refused_without_panic() {
        let bytes = example(1, 5, 7, 4, 100).to_bytes();
        for len in 0..bytes.len() {
            assert!(Example::from_bytes(&bytes[..len]).is_none(), "{len}");
        }
        let mut longer = bytes.clone();
        longer.push(0);
        assert!(Example::from_bytes(&longer).is_none());
        let mut huge = bytes;
        huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(Example::from_bytes(&huge).is_none());
    }

    #[test]
    fn ids_outside_the_vocabulary_are_refused() {
        let sound = example(3, 2, 3, 4, 100);
        sound.check(100).unwrap();
        let mut bad = sound.clone();
        bad.token_ids[0] = 100;
        assert!(bad.check(100).unwrap_err().contains("token id 100"));
        let mut bad = sound.clone();
        bad.support.ids[1] = u32::MAX;
        assert!(bad.check(100).is_err());
        let mut bad = sound.clone();
        bad.targets[0] = 0;
        assert!(bad.check(100).unwrap_err().contains("no token before it"));
        let mut bad = sound.clone();
        bad.targets[1] = 999;
        assert!(bad.check(100).unwrap_err().contains("do not rise"));
        let mut bad = sound.clone();
        bad.weights[1] = f32::NAN;
        assert!(bad.check(100).unwrap_err().contains("weight"));
        let mut bad = sound.clone();
        bad.weights.pop();
        assert!(bad.check(100).unwrap_err().contains("3 target tokens, but weights of 2"));
        for nothing in [0.0, 1e-50, 1e-40] {
            let none = sound.clone().weighing(&[nothing; 3]);
            none.check(100).unwrap();
            assert_eq!((none.targets.len(), none.input_len()), (0, 0));
        }
        let little = sound.clone().weighing(&[1e-37; 3]);
        little.check(100).unwrap();
        assert_eq!(little.targets.len(), 3);
        let mut bad = sound;
        bad.support.offsets[1] = 999;
        assert!(bad.check(100).is_err());
    }
}
