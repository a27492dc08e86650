//! The prompts of a shard in the order in which they are begun, and what they have in common.

use std::{cmp::Reverse, collections::VecDeque};

use crate::engine::Text;

/// A common beginning shorter than this is computed with each prompt: it is not worth a step.
const LEAST_SHARED: usize = 16;

pub(super) struct Prompts {
    /// Not yet begun, the longest first.
    waiting: VecDeque<Prompt>,
    sequences: Vec<(usize, u32)>,
    longest: u32,
    shared: u32,
}

/// A prompt and the completions of it that begin together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Prompt {
    /// Index of its text.
    pub(super) text: usize,
    /// Number of its first completion.
    pub(super) first: u32,
    pub(super) count: u32,
    /// Index of its first completion among all.
    pub(super) sequence: usize,
}

impl Prompts {
    pub(super) fn new(texts: &[Text], completions: u32) -> Self {
        let completions = completions.max(1);
        let length = |at: usize| texts[at].token_ids.len();
        let mut order: Vec<usize> = (0..texts.len()).collect();
        order.sort_by_key(|&at| (Reverse(length(at)), at));
        let prompt =
            |&text: &usize| Prompt { text, first: 0, count: completions, sequence: text * completions as usize };
        let of = |text| (0..completions).map(move |completion| (text, completion));
        Self {
            waiting: order.iter().map(prompt).collect(),
            sequences: (0..texts.len()).flat_map(of).collect(),
            longest: order.first().map_or(0, |&at| length(at)) as u32,
            shared: shared(texts) as u32,
        }
    }

    /// Lets completions begin one by one where a lane has no room for all those of a prompt.
    pub(super) fn fit(&mut self, slots: u32) {
        let alone = |prompt: &Prompt| {
            let prompt = *prompt;
            (0..prompt.count).map(move |more| Prompt {
                first: prompt.first + more,
                count: 1,
                sequence: prompt.sequence + more as usize,
                ..prompt
            })
        };
        if self.waiting.iter().any(|prompt| prompt.count > slots) {
            self.waiting = self.waiting.iter().flat_map(alone).collect();
        }
    }

    pub(super) fn longest(&self) -> u32 {
        self.longest
    }

    /// How many tokens all prompts begin with; 0 when too few to tell.
    pub(super) fn shared(&self) -> u32 {
        self.shared
    }

    /// Text and number of every completion, text after text.
    pub(super) fn sequences(&self) -> &[(usize, u32)] {
        &self.sequences
    }

    pub(super) fn peek(&self) -> Option<&Prompt> {
        self.waiting.front()
    }

    pub(super) fn pop(&mut self) -> Option<Prompt> {
        self.waiting.pop_front()
    }
}
/// The common beginning, which leaves every prompt a token of its own to go on from.
fn shared(texts: &[Text]) -> usize {
    let [first, others @ ..] = texts else { return 0 };
    if others.is_empty() {
        return 0;
    }
    let most = texts.iter().map(|text| text.token_ids.len().saturating_sub(1)).min().unwrap_or(0);
    let alike = |other: &Text| first.token_ids.iter().zip(&other.token_ids).take_while(|(a, b)| a == b).count();
    let common = others.iter().map(alike).min().unwrap_or(0).min(most);
    if common < LEAST_SHARED { 0 } else { common }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(token_ids: Vec<u32>) -> Text {
        Text { row: 0, row_id: String::new(), tags: Vec::new(), prompt_tokens: token_ids.len(), token_ids }
    }

    #[test]
    fn what_all_begin_with_leaves_each_a_token() {
        let system: Vec<u32> = (0..20).collect();
        let with = |more: &[u32]| text([system.as_slice(), more].concat());
        assert_eq!(shared(&[with(&[90, 91]), with(&[90, 92]), with(&[93])]), 20);
        assert_eq!(shared(&[with(&[90]), with(&[])]), 19);
        assert_eq!(shared(&[with(&[90])]), 0, "nothing to share with");
        assert_eq!(shared(&[text(vec![1, 2, 3]), text(vec![1, 2, 4])]), 0, "too few");
    }

    #[test]
    fn the_longest_begins_first() {
        let texts: Vec<Text> = [3, 9, 5].map(|length| text((0..length).collect())).into();
        let mut prompts = Prompts::new(&texts, 2);
        assert_eq!((prompts.longest(), prompts.sequences().len()), (9, 6));
        prompts.fit(2);
        let order: Vec<Prompt> = std::iter::from_fn(|| prompts.pop()).collect();
        assert_eq!(order.iter().map(|prompt| prompt.text).collect::<Vec<_>>(), [1, 2, 0]);
        assert_eq!(order[0], Prompt { text: 1, first: 0, count: 2, sequence: 2 });
    }

    #[test]
    fn completions_that_find_no_room_together_begin_alone() {
        let mut prompts = Prompts::new(&[text(vec![1]), text(vec![1, 2])], 3);
        prompts.fit(2);
        let order: Vec<(usize, u32, usize)> =
            std::iter::from_fn(|| prompts.pop()).map(|p| (p.text, p.first, p.sequence)).collect();
        assert_eq!(order, [(1, 0, 3), (1, 1, 4), (1, 2, 5), (0, 0, 0), (0, 1, 1), (0, 2, 2)]);
    }
}
