//! Which held-out prompts a model could have seen in training, by shared runs of words.
//!
//! The measure is the 13-gram overlap of "Language Models are Few-Shot Learners" (Brown et al.,
//! 2020, appendix C), and as there a run that many documents share is boilerplate, not a leak.

use std::{collections::HashMap, hash::Hasher};

use super::{Role, Row, Split};

/// Words in a row that count as an overlap.
pub const NGRAM_WORDS: usize = 13;
/// A run in more rows than this is boilerplate: a form, a signature, a template.
const BOILERPLATE_ROWS: u32 = 10;

/// A held-out prompt that shares words with a training prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlap {
    pub held_out_id: String,
    /// The first training row it overlaps with.
    pub train_id: String,
    /// The first words that they share; at most 13 are given.
    pub words: String,
    /// How many runs of the held-out prompt are found in training rows.
    pub shared: usize,
}

/// Overlaps between held-out rows and the others, one for each held-out row that has any.
///
/// The user's and the assistant's turns are compared as one text, word for word without case and
/// punctuation; system prompts are expected to be shared. Two rows overlap if they have 13 words
/// in a row in common that no more than 10 rows have, or if they are the same altogether.
pub fn overlaps(rows: &[Row]) -> Vec<Overlap> {
    let held_out = |row: &Row| row.split == Some(Split::HeldOut);
    // Only the held-out rows' runs are kept; the other rows stream past them.
    let mut found: HashMap<u64, Found> = HashMap::new();
    for row in rows.iter().filter(|row| held_out(row)) {
        for_each_run(row, |run| {
            found.entry(run.hash).or_default();
        });
    }
    for (index, row) in rows.iter().enumerate() {
        for_each_run(row, |run| {
            if let Some(found) = found.get_mut(&run.hash) {
                found.add(index, !held_out(row));
            }
        });
    }
    let mut overlaps = Vec::new();
    for row in rows.iter().filter(|row| held_out(row)) {
        let mut overlap: Option<Overlap> = None;
        for_each_run(row, |run| {
            let Some(Found { train: Some(train), rows: in_rows, .. }) = found.get(&run.hash) else { return };
            if !run.whole && *in_rows > BOILERPLATE_ROWS {
                return;
            }
            let overlap = overlap.get_or_insert_with(|| Overlap {
                held_out_id: row.id.clone(),
                train_id: rows[*train].id.clone(),
                words: run.words[..run.words.len().min(NGRAM_WORDS)].join(" "),
                shared: 0,
            });
            overlap.shared += 1;
        });
        overlaps.extend(overlap);
    }
    overlaps
}

/// Groups of rows that overlap: a number for each row, the same within a group.
pub(super) fn groups(rows: &[Row]) -> Vec<usize> {
    let mut runs: Vec<(u64, bool, usize)> = Vec::new();
    for (index, row) in rows.iter().enumerate() {
        for_each_run(row, |run| runs.push((run.hash, run.whole, index)));
    }
    runs.sort_unstable();
    runs.dedup();
    let mut parent: Vec<usize> = (0..rows.len()).collect();
    for same in runs.chunk_by(|a, b| (a.0, a.1) == (b.0, b.1)) {
        if !same[0].1 && same.len() > BOILERPLATE_ROWS as usize {
            continue;
        }
        for pair in same.windows(2) {
            let (a, b) = (root(&mut parent, pair[0].2), root(&mut parent, pair[1].2));
            parent[a.max(b)] = a.min(b);
        }
    }
    (0..rows.len()).map(|row| root(&mut parent, row)).collect()
}

fn root(parent: &mut [usize], mut of: usize) -> usize {
    while parent[of] != of {
        parent[of] = parent[parent[of]];
        of = parent[of];
    }
    of
}

/// Rows that have a run.
#[derive(Clone, Copy, Default)]
struct Found {
    /// The first training row among them.
    train: Option<usize>,
    last: Option<usize>,
    rows: u32,
}

impl Found {
    fn add(&mut self, row: usize, trains: bool) {
        if trains {
            self.train = self.train.or(Some(row));
        }
        if self.last != Some(row) {
            self.last = Some(row);
            self.rows = self.rows.saturating_add(1);
        }
    }
}

struct Run<'a> {
    hash: u64,
    words: &'a [&'a str],
    /// The whole text, not 13 words of it.
    whole: bool,
}

fn for_each_run(row: &Row, mut visit: impl FnMut(Run<'_>)) {
    let mut text = String::new();
    for message in row.messages.iter().filter(|message| message.role != Role::System) {
        text.push_str(&message.content.to_lowercase());
        text.push(' ');
    }
    let words: Vec<&str> = text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).collect();
    if words.is_empty() {
        return; // punctuation alone tells nothing
    }
    for run in words.windows(NGRAM_WORDS) {
        visit(Run { hash: hash(run, false), words: run, whole: false });
    }
    visit(Run { hash: hash(&words, true), words: &words, whole: true });
}

fn hash(words: &[&str], whole: bool) -> u64 {
    // Keyless, so that two runs of the program group alike.
    let mut hasher = std::hash::DefaultHasher::new();
    hasher.write_u8(u8::from(whole));
    for word in words {
        hasher.write(word.as_bytes());
        hasher.write_u8(0xff);
    }
    hasher.finish()
}
