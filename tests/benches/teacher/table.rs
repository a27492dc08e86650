//! The figures as Markdown, for people and for `docs/teacher-speed.md`.

use std::fmt::Write as _;

use retort_tests::ticks::Others;

use crate::{
    bars::ratios,
    figures::{Spread, rates},
    machine::Machine,
    measure::Measured,
    memory::Memory,
};

pub fn markdown(machine: &Machine, others: Others, measured: &Measured, memory: &[Memory], quick: bool) -> String {
    let mut text = String::new();
    let Machine { cpu, cores, threads, dtype, because } = machine;
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{cpu}, {cores} cores, {threads} for each side; {dtype}: {because}.");
    let _ = writeln!(
        text,
        "Rounds: {}. Others used {:.2} cores meanwhile, and the host kept {:.2}.",
        measured.rounds, others.used, others.stolen
    );
    if quick {
        let _ =
            writeln!(text, "\n**A trial of an eighth of the work: these figures show that it runs, nothing else.**");
    }
    if !others.quiet() {
        let _ = writeln!(text, "\n**Something else was running: do not quote these figures.**");
    }
    text += "\n| side | work | tokens/s | least | greatest |\n|---|---|---|---|---|\n";
    for (side, work, answers) in &measured.answers {
        let spread = Spread::of(&rates(answers));
        let figures = spread.map_or_else(
            || "did not run | |".to_owned(),
            |Spread { median, least, greatest }| format!("{median:.0} | {least:.0} | {greatest:.0}"),
        );
        let _ = writeln!(text, "| {side} | {} | {figures} |", work.name());
    }
    text += "\n| ratio of medians | | least and greatest of a round | wanted | |\n|---|---|---|---|---|\n";
    for ratio in ratios(measured) {
        let told = ratio.ratio.map_or_else(|| "not measured".to_owned(), |ratio| format!("{ratio:.2}"));
        let rounds = ratio.of_rounds.map(|of| format!("{:.2} to {:.2}", of.least, of.greatest)).unwrap_or_default();
        let (bar, met) = match (ratio.bar, ratio.ratio) {
            (Some(bar), Some(_)) if quick => (format!("{bar:.2}"), "not judged"),
            (Some(bar), Some(ratio)) => (format!("{bar:.2}"), if ratio >= bar { "met" } else { "**missed**" }),
            (Some(bar), None) => (format!("{bar:.2}"), "not measured"),
            (None, _) => (String::new(), ""),
        };
        let _ = writeln!(text, "| {} | {told} | {rounds} | {bar} | {met} |", ratio.what);
    }
    text += "\n| scoring in one process | tokens | loaded, MB | peak, MB | more, MB | float32 logits of all, MB |\n";
    text += "|---|---|---|---|---|---|\n";
    for Memory { side, tokens, before_mb, peak_mb, logits_mb } in memory {
        let more = peak_mb.saturating_sub(*before_mb);
        let _ = writeln!(text, "| {side} | {tokens} | {before_mb} | {peak_mb} | {more} | {logits_mb} |");
    }
    text += "\n";
    for (side, about) in &measured.sides {
        let _ = match about {
            Ok(about) => writeln!(text, "- {side}: {}; {}, {} threads", about.version, about.dtype, about.threads),
            Err(why) => writeln!(text, "- {side}: left out: {why}"),
        };
    }
    text
}
