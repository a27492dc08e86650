//! SentencePiece's BPE keeps a score a token; `tokenizer.json` keeps an ordered list of merges. A
//! token can come from any split into two tokens, and the best score merges first, so the list is
//! every split of every token by falling score (Kudo and Richardson, "SentencePiece", EMNLP 2018).

use std::collections::HashMap;

use super::vocabulary::{Token, TokenKind};

/// Pairs of token texts, the one that merges first in front.
pub fn merges<'a>(tokens: &'a [Token], scores: &[f64]) -> Vec<(&'a str, &'a str)> {
    // Control, unknown and byte tokens never come from merging.
    let ids: HashMap<&str, usize> = tokens
        .iter()
        .enumerate()
        .filter(|(_, token)| matches!(token.kind, TokenKind::Normal | TokenKind::UserDefined))
        .map(|(id, token)| (token.text.as_str(), id))
        .collect();
    let mut found = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        if token.kind != TokenKind::Normal {
            continue;
        }
        for (at, _) in token.text.char_indices().skip(1) {
            let (left, right) = token.text.split_at(at);
            if let (Some(left_id), Some(right_id)) = (ids.get(left), ids.get(right)) {
                found.push((id, *left_id, *right_id, left, right));
            }
        }
    }
    found.sort_by(|one, other| {
        scores[other.0].total_cmp(&scores[one.0]).then((one.0, one.1, one.2).cmp(&(other.0, other.1, other.2)))
    });
    found.into_iter().map(|(_, _, _, left, right)| (left, right)).collect()
}
