//! The one form in which prompt sets lie in the store.

use retort_core::{Code, Error, Result};
use serde::Serialize;

use super::{MAX_FILE_BYTES, MAX_LINE_BYTES, Message, Piece, Row, Split, line_of};

/// The form that lies in the store: keys in one order and all of them written but those that say nothing, training
/// rows first, then held-out ones, each in file order. A row without a split counts as training.
///
/// [`super::parse`] reads it back to the same rows, as far as [`check_stored`] lets it pass.
pub fn to_jsonl(rows: &[Row]) -> Vec<u8> {
    #[derive(Serialize)]
    struct Line<'a> {
        id: &'a str,
        messages: &'a [Message],
        tags: &'a [String],
        split: &'static str,
        #[serde(skip_serializing_if = "Option::is_none")]
        completion: Option<Completion<'a>>,
        // Left out where it is 1: a set of prompts is named by its content.
        #[serde(skip_serializing_if = "Option::is_none")]
        weight: Option<f64>,
    }
    let mut text = Vec::new();
    for (_, row) in in_order(rows) {
        let line = Line {
            id: &row.id,
            messages: &row.messages,
            tags: &row.tags,
            split: split_of(row).as_str(),
            completion: row.completion.as_deref().map(|text| Completion::of(text, &row.pieces)),
            weight: unless_one(row.weight),
        };
        // Strings and lists of strings always have a JSON form, and a Vec always takes it.
        if serde_json::to_writer(&mut text, &line).is_ok() {
            text.push(b'\n');
        }
    }
    text
}

/// Refuses rows that no worker could read as they are `stored`, though their file could be: what a file may leave out
/// is written there. `text` is what the rows were parsed from, `name` how errors call it.
pub fn check_stored(name: &str, text: &[u8], rows: &[Row], stored: &[u8]) -> Result<()> {
    let refuse = |why: String| Err(Error::new(Code::PromptMalformed, format!("{name}{why}")));
    if stored.len() as u64 > MAX_FILE_BYTES {
        let bytes = stored.len();
        return refuse(format!(
            ": it takes {bytes} bytes as it is stored, at most {MAX_FILE_BYTES}; split it into several jobs"
        ));
    }
    let mut lines = stored.split(|&byte| byte == b'\n').zip(in_order(rows));
    let Some((line, (index, _))) = lines.find(|(line, _)| line.len() > MAX_LINE_BYTES) else { return Ok(()) };
    refuse(format!(
        " line {}: it takes {} bytes as it is stored, at most {MAX_LINE_BYTES} fit in one line; shorten it",
        line_of(text, index),
        line.len()
    ))
}

/// Rows in the order of their lines in the store, each with its place in the file.
fn in_order(rows: &[Row]) -> impl Iterator<Item = (usize, &Row)> {
    let of = move |wanted: Split| rows.iter().enumerate().filter(move |(_, row)| split_of(row) == wanted);
    [Split::Train, Split::HeldOut].into_iter().flat_map(of)
}

fn split_of(row: &Row) -> Split {
    row.split.unwrap_or(Split::Train)
}

/// Readers take a weight that is not there for 1.
fn unless_one(weight: f64) -> Option<f64> {
    (weight != 1.0).then_some(weight)
}

/// A completion as it lies in the store.
#[derive(Serialize)]
#[serde(untagged)]
enum Completion<'a> {
    Text(&'a str),
    Pieces(Vec<WeightedText<'a>>),
}

#[derive(Serialize)]
struct WeightedText<'a> {
    text: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    weight: Option<f64>,
}

impl<'a> Completion<'a> {
    fn of(text: &'a str, pieces: &[Piece]) -> Self {
        if pieces.is_empty() {
            return Self::Text(text);
        }
        let mut rest = text;
        let texts = pieces.iter().map_while(|piece| {
            let (text, behind) = rest.split_at_checked(piece.bytes)?;
            rest = behind;
            Some(WeightedText { text, weight: unless_one(piece.weight) })
        });
        Self::Pieces(texts.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompts::parse;

    fn longest(stored: &[u8]) -> usize {
        stored.split(|&byte| byte == b'\n').map(<[u8]>::len).max().unwrap_or_default()
    }

    #[test]
    fn a_line_of_many_pieces_fits_as_it_is_stored_too() {
        let start = r#"{"id":"a","messages":[{"role":"user","content":"x"}],"completion":[{"text":"no","weight":0}"#;
        let piece = r#",{"text":"b"}"#;
        // What is stored besides: the tags, the split and the weight's fraction.
        let room = MAX_LINE_BYTES - start.len() - "]}".len() - 64;
        let text = format!("{start}{}]}}", piece.repeat(room / piece.len()));
        let mut rows = parse("p", text.as_bytes()).unwrap();
        rows[0].split = Some(Split::Train);
        assert!(rows[0].pieces.len() > 80_000);
        let stored = to_jsonl(&rows);
        check_stored("p", text.as_bytes(), &rows, &stored).unwrap();
        assert_eq!(parse("stored", &stored).unwrap(), rows);
    }

    #[test]
    fn a_line_that_no_worker_could_read_is_refused_by_its_place_in_the_file() {
        let (start, end) = (r#"{"messages":[{"role":"user","content":""#, r#""}]}"#);
        let long = format!("{start}{}{end}", "x".repeat(MAX_LINE_BYTES - start.len() - end.len()));
        let short = format!(r#"{start}y"}}],"split":"held_out"}}"#);
        // Stored before the held-out row.
        let text = format!("{short}\n\n{long}\n");
        let rows = parse("prompts.jsonl", text.as_bytes()).unwrap();
        let stored = to_jsonl(&rows);
        let error = check_stored("prompts.jsonl", text.as_bytes(), &rows, &stored).unwrap_err();
        assert_eq!(error.code, Code::PromptMalformed);
        assert_eq!(
            error.message,
            format!(
                "prompts.jsonl line 3: it takes {} bytes as it is stored, at most 1048576 fit in one line; shorten it",
                longest(&stored)
            )
        );
        assert_eq!(parse("stored", &stored).unwrap_err().code, Code::PromptMalformed);
        check_stored("prompts.jsonl", short.as_bytes(), &rows[..1], &to_jsonl(&rows[..1])).unwrap();
    }
}
