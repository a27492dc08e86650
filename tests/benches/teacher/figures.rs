//! Everything that was measured, as `figures.json` holds it.

use retort_tests::ticks::Others;
use serde::Serialize;
use serde_json::{Value, json};

use crate::{Options, bars::ratios, machine::Machine, measure::Measured, memory::Memory, side::Answer};

/// The median of some figures, and how far they lie apart.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Spread {
    pub median: f64,
    pub least: f64,
    pub greatest: f64,
}

impl Spread {
    /// None of none.
    pub fn of(figures: &[f64]) -> Option<Self> {
        let mut sorted = figures.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (&least, &greatest) = (sorted.first()?, sorted.last()?);
        let half = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 { sorted[half] } else { (sorted[half - 1] + sorted[half]) / 2.0 };
        Some(Self { median, least, greatest })
    }
}

/// Tokens a second, round after round.
pub fn rates(answers: &[Answer]) -> Vec<f64> {
    answers.iter().map(|answer| answer.tokens as f64 / answer.seconds).collect()
}

pub fn whole(options: &Options, machine: &Machine, others: Others, measured: &Measured, memory: &[Memory]) -> Value {
    let side = |(name, about): (&&str, &Result<_, String>)| match about {
        Ok(about) => json!({ "side": name, "about": about }),
        Err(why) => json!({ "side": name, "left_out": why }),
    };
    let works = measured.answers.iter().map(|(side, work, answers)| {
        json!({
            "side": side, "work": work, "name": work.name(), "tokens_per_s": Spread::of(&rates(answers)),
            "answers": answers,
        })
    });
    json!({
        "quick": options.quick,
        "rounds": measured.rounds,
        "seconds": measured.seconds,
        "model": options.model,
        "machine": machine,
        "others": others,
        "sides": measured.sides.iter().map(side).collect::<Vec<_>>(),
        "works": works.collect::<Vec<_>>(),
        "ratios": ratios(measured),
        "memory": memory,
    })
}
