//! SentencePiece's scores out of a list of merges: `tokenizer.json` keeps only the order in which tokens are made, which
//! is all that the scores decide (Kudo and Richardson, "SentencePiece", EMNLP 2018).

use std::collections::HashMap;

use retort_import::gguf::{Token, TokenKind, sentencepiece_merges};

/// One score a token, the first to be made the highest; `None` where no scores give just these merges.
pub(super) fn scores(tokens: &[Token], merges: &[(String, String)]) -> Option<Vec<f32>> {
    let mut ranks = HashMap::new();
    for (left, right) in merges {
        let rank = ranks.len();
        ranks.entry(format!("{left}{right}")).or_insert(rank);
    }
    let mut never_made = ranks.len();
    let scores: Vec<f32> = tokens
        .iter()
        .map(|token| match (token.kind, ranks.get(&token.text)) {
            (TokenKind::Normal, Some(rank)) => -(*rank as f32),
            (TokenKind::Normal, None) => {
                never_made += 1;
                1.0 - never_made as f32
            }
            _ => 0.0,
        })
        .collect();

    // Control and byte tokens are not made by merging, whatever the list says.
    let normal: HashMap<&str, ()> =
        tokens.iter().filter(|token| token.kind == TokenKind::Normal).map(|token| (token.text.as_str(), ())).collect();
    let exact: Vec<f64> = scores.iter().map(|score| f64::from(*score)).collect();
    let given = merges.iter().map(|(left, right)| (left.as_str(), right.as_str()));
    (grouped(given, &normal) == grouped(sentencepiece_merges(tokens, &exact).into_iter(), &normal)).then_some(scores)
}

/// The ways to make each token, in the order of the list, ordered among themselves: those of one token never compete.
fn grouped<'a>(
    merges: impl Iterator<Item = (&'a str, &'a str)>,
    normal: &HashMap<&str, ()>,
) -> Vec<(String, Vec<(&'a str, &'a str)>)> {
    let mut groups: Vec<(String, Vec<(&str, &str)>)> = Vec::new();
    for (left, right) in merges {
        let made = format!("{left}{right}");
        if [left, right, &made].iter().any(|text| !normal.contains_key(text)) {
            continue;
        }
        match groups.last_mut() {
            Some((last, ways)) if *last == made => ways.push((left, right)),
            _ => groups.push((made, vec![(left, right)])),
        }
    }
    groups.iter_mut().for_each(|(_, ways)| ways.sort_unstable());
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(texts: &[&str]) -> Vec<Token> {
        texts.iter().map(|text| Token { text: (*text).to_owned(), kind: TokenKind::Normal }).collect()
    }

    fn pairs(merges: &[&str]) -> Vec<(String, String)> {
        merges.iter().map(|merge| merge.split_once(' ').unwrap()).map(|(a, b)| (a.to_owned(), b.to_owned())).collect()
    }

    #[test]
    fn what_is_made_first_scores_highest() {
        let tokens = tokens(&["a", "b", "c", "abc", "bc", "ab"]);
        let merges = pairs(&["b c", "a b", "a bc", "ab c"]);
        assert_eq!(scores(&tokens, &merges).unwrap(), [-3.0, -4.0, -5.0, -2.0, -0.0, -1.0]);
        // The ways to one token come in any order.
        assert!(scores(&tokens, &pairs(&["b c", "a b", "ab c", "a bc"])).is_some());
    }

    #[test]
    fn merges_that_no_scores_give_are_refused() {
        let tokens = tokens(&["a", "b", "c", "abc", "bc", "ab"]);
        // One way to make "abc" is missing; its two ways lie apart.
        assert!(scores(&tokens, &pairs(&["b c", "a b", "a bc"])).is_none());
        assert!(scores(&tokens, &pairs(&["b c", "a bc", "a b", "ab c"])).is_none());
    }
}
