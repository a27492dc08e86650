//! What is compared with what, and how much it should be.

use serde::Serialize;

use crate::{
    figures::{Spread, rates},
    measure::Measured,
    work::{
        GENERATE_16, GENERATE_64, GENERATE_64_TOP, PRODUCTS, RETORT, RETORT_2, RETORT_16, ROOF, SCORE, TRANSFORMERS,
        VLLM, Work,
    },
};

type Cell = (&'static str, Work);

/// Ours over theirs, and the least it should be, where something was promised.
const COMPARISONS: [(&str, Cell, Cell, Option<f64>); 9] = [
    ("score: retort / transformers", (RETORT, SCORE), (TRANSFORMERS, SCORE), Some(1.5)),
    ("score: retort / vLLM", (RETORT, SCORE), (VLLM, SCORE), Some(4.5)),
    ("score: retort / matrix products alone", (RETORT, SCORE), (ROOF, PRODUCTS), Some(0.8)),
    ("generate: retort with capture / vLLM, top 64", (RETORT, GENERATE_64_TOP), (VLLM, GENERATE_64_TOP), Some(1.4)),
    ("generate: retort with capture / vLLM, text alone", (RETORT, GENERATE_64_TOP), (VLLM, GENERATE_64), None),
    (
        "generate: retort with capture / transformers, text alone",
        (RETORT, GENERATE_64_TOP),
        (TRANSFORMERS, GENERATE_16),
        None,
    ),
    ("score: two stages of one thread / one process of two", (RETORT_2, SCORE), (RETORT, SCORE), Some(0.9)),
    ("score: 16 stages of one thread on the same cores / one process", (RETORT_16, SCORE), (RETORT, SCORE), None),
    (
        "generate: two stages of one thread / one process of two",
        (RETORT_2, GENERATE_64_TOP),
        (RETORT, GENERATE_64_TOP),
        None,
    ),
];

#[derive(Clone, Debug, Serialize)]
pub struct Ratio {
    pub what: &'static str,
    /// Of the medians; none when a side did not run.
    pub ratio: Option<f64>,
    /// The least and the greatest of the rounds, each by its own two figures.
    pub of_rounds: Option<Spread>,
    pub bar: Option<f64>,
}

pub fn ratios(measured: &Measured) -> Vec<Ratio> {
    let of = |(side, work): Cell| {
        let at = crate::work::ROUND.iter().position(|cell| *cell == (side, work))?;
        Some(rates(&measured.answers.get(at)?.2)).filter(|rates| !rates.is_empty())
    };
    let ratio = |(what, ours, theirs, bar): (&'static str, Cell, Cell, Option<f64>)| {
        let both = of(ours).zip(of(theirs));
        let medians = both.as_ref().and_then(|(ours, theirs)| Spread::of(ours).zip(Spread::of(theirs)));
        let of_rounds = both.and_then(|(ours, theirs)| {
            Spread::of(&ours.iter().zip(&theirs).map(|(ours, theirs)| ours / theirs).collect::<Vec<_>>())
        });
        Ratio { what, ratio: medians.map(|(ours, theirs)| ours.median / theirs.median), of_rounds, bar }
    };
    COMPARISONS.into_iter().map(ratio).collect()
}
