//! Which rows are held out.

use retort_core::{
    Code, Error, Result,
    random::{Counter, Purpose},
};

use super::{
    Row, Split,
    overlap::{groups, overlaps},
};

/// Holds out about `fraction` of the rows, at least one, and leaves at least one to train on.
///
/// Only where no row says its split; where some do, the others train. The choice depends on
/// `seed` alone. Rows that overlap, as [`overlaps`] tells, go to the same side; if all of them do,
/// all train, and [`check_splits`] says so.
pub fn assign_splits(rows: &mut [Row], fraction: f64, seed: u64) {
    let stated = rows.iter().any(|row| row.split.is_some());
    let wanted = ((rows.len() as f64 * fraction).round() as usize).clamp(1, rows.len().saturating_sub(1).max(1));
    let group_of = if stated { Vec::new() } else { groups(rows) };
    for row in rows.iter_mut() {
        row.split.get_or_insert(Split::Train);
    }
    let mut sizes = vec![0usize; rows.len()];
    group_of.iter().for_each(|&group| sizes[group] += 1);
    let mut order: Vec<usize> = (0..group_of.len()).filter(|&group| sizes[group] > 0).collect();
    if order.len() < 2 {
        return;
    }
    Counter::new(seed, Purpose::Split, 0, 0).shuffle(&mut order);
    // A group that would overshoot is passed over; the smallest one is taken if none fits.
    let mut held_out = vec![false; rows.len()];
    let mut count = 0;
    for &group in &order {
        if count + sizes[group] <= wanted {
            held_out[group] = true;
            count += sizes[group];
        }
    }
    if count == 0
        && let Some(&smallest) = order.iter().min_by_key(|&&group| sizes[group])
    {
        held_out[smallest] = true;
    }
    for (row, group) in rows.iter_mut().zip(group_of) {
        if held_out[group] {
            row.split = Some(Split::HeldOut);
        }
    }
}

/// Whether a split prompt set can be distilled and judged: rows on both sides
/// (`PromptSetTooSmall`), and no held-out prompt that overlaps with a training prompt
/// (`PromptSetLeaks`).
pub fn check_splits(name: &str, rows: &[Row]) -> Result<()> {
    let held_out = rows.iter().filter(|row| row.split == Some(Split::HeldOut)).count();
    let train = rows.len() - held_out;
    if train == 0 || held_out == 0 {
        return Err(Error::new(
            Code::PromptSetTooSmall,
            format!(
                "{name}: {train} rows to train on and {held_out} held out; each side needs at least one row that does \
                 not repeat the other's: add prompts, or say \"split\": \"held_out\" in some rows and \"train\" in others"
            ),
        ));
    }
    let overlaps = overlaps(rows);
    let Some(first) = overlaps.first() else { return Ok(()) };
    let others = match overlaps.len() - 1 {
        0 => String::new(),
        1 => ", and one more held-out row overlaps".to_owned(),
        n => format!(", and {n} more held-out rows overlap"),
    };
    Err(Error::new(
        Code::PromptSetLeaks,
        format!(
            "{name}: held-out row {:?} shares {:?} with training row {:?}{others}; put such rows in one split, or leave \
             \"split\" out everywhere",
            first.held_out_id, first.words, first.train_id
        ),
    ))
}
