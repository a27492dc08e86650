//! The figures as Markdown, for people and for docs/parallel-training.md.

use std::fmt::Write as _;

use crate::{
    Figures,
    quality::{How, Quality},
    speed::{Link, Speed},
};

pub fn markdown(figures: &Figures) -> String {
    let mut text = String::new();
    let Figures { cpu, cores, quick, seconds, others, speed, quality } = figures;
    // Writing to a string cannot fail.
    let _ = writeln!(
        text,
        "{cpu}, {cores} cores, one thread a student, f32; {seconds:.0} s. Others used {:.2} cores meanwhile, and the host \
         kept {:.2}.",
        others.used, others.stolen
    );
    if *quick {
        let _ = writeln!(text, "\n**A trial: these figures show that it runs, nothing else.**");
    }
    if !others.quiet() {
        let _ = writeln!(text, "\n**Something else was running: do not quote these figures.**");
    }
    if let Some(speed) = speed {
        self::speed(&mut text, speed);
    }
    if let Some(quality) = quality {
        self::quality(&mut text, quality);
    }
    text
}

fn speed(text: &mut String, speed: &Speed) {
    let _ = writeln!(text, "\nSeconds a step of {:.0} tokens.", speed.tokens_a_step);
    *text +=
        "\n| trained | link | one worker | two, synchronous | by the formula | speed-up |\n|---|---|---|---|---|---|\n";
    for size in &speed.sizes {
        for shared in &size.synchronous {
            let _ = writeln!(
                text,
                "| {:.1} M | {} | {:.2} | {:.2} | {:.2} | {:.2} |",
                size.trained / 1e6,
                name(shared.link),
                size.alone,
                shared.seconds,
                shared.computed,
                size.alone / shared.seconds
            );
        }
    }
    *text += "\n| trained | an exchange, each way | link | carried in, there and back, s |\n|---|---|---|---|\n";
    for size in &speed.sizes {
        for carried in &size.carried {
            let _ = writeln!(
                text,
                "| {:.1} M | {:.1} MB | {} | {:.2} + {:.2} |",
                size.trained / 1e6,
                size.exchange_bytes as f64 / 1e6,
                name(carried.link),
                carried.there,
                carried.back
            );
        }
    }
    *text += "\n| trained | inner steps | one worker | two, DiLoCo, store in a folder |";
    let links: Vec<Link> = speed.sizes.first().map_or(Vec::new(), |size| {
        size.carried.iter().map(|carried| carried.link).filter(|link| *link != Link::Loopback).collect()
    });
    for link in &links {
        let _ = write!(text, " with an exchange over {} added |", name(*link));
    }
    let _ = writeln!(text, "\n|---|---|---|---|{}", "---|".repeat(links.len()));
    for size in &speed.sizes {
        for exchanging in &size.diloco {
            let _ = write!(
                text,
                "| {:.1} M | {} | {:.2} | {:.2} ({:.2} times) |",
                size.trained / 1e6,
                exchanging.inner_steps,
                size.alone,
                exchanging.seconds,
                size.alone / exchanging.seconds
            );
            for carried in size.carried.iter().filter(|carried| links.contains(&carried.link)) {
                // Of two workers' steps in a round.
                let steps = f64::from(2 * exchanging.inner_steps);
                let seconds = exchanging.seconds + (carried.there + carried.back) / steps;
                let _ = write!(text, " {seconds:.2} ({:.2} times) |", size.alone / seconds);
            }
            *text += "\n";
        }
    }
}

fn quality(text: &mut String, quality: &Quality) {
    let Quality { steps, target_tokens, held_out_tokens, trained, before, runs } = quality;
    let _ = writeln!(
        text,
        "\n{steps} steps over the same {target_tokens} published target tokens, {:.1} M trained parameters; held-out KL on \
         {held_out_tokens} tokens, {before:.4} before training.",
        trained / 1e6
    );
    *text += "\n| | outer momentum | rounds | together | held-out KL | to one worker's | top-1 | training, s |\n\
              |---|---|---|---|---|---|---|---|\n";
    let alone = runs.iter().find(|run| run.how == How::Alone).map_or(f64::NAN, |run| run.kl);
    for run in runs {
        let (how, momentum, rounds) = match run.how {
            How::Alone => ("one worker".to_owned(), String::new(), String::new()),
            How::Synchronous => ("two, synchronous".to_owned(), String::new(), String::new()),
            How::Diloco { inner_steps, learning_rate, momentum } => (
                format!("two, DiLoCo, {inner_steps} inner steps"),
                format!("{momentum} (learning rate {learning_rate})"),
                run.rounds.to_string(),
            ),
        };
        let together = if run.how == How::Alone { String::new() } else { format!("{:.0} %", 100.0 * run.together) };
        let _ = writeln!(
            text,
            "| {how} | {momentum} | {rounds} | {together} | {:.4} | {:+.1} % | {:.1} % | {:.0} |",
            run.kl,
            100.0 * (run.kl / alone - 1.0),
            100.0 * run.top1_agreement,
            run.seconds
        );
    }
}

fn name(link: Link) -> String {
    match link {
        Link::Loopback => "loopback".to_owned(),
        Link::Mbit(1000) => "1 Gbit/s".to_owned(),
        Link::Mbit(mbit) => format!("{mbit} Mbit/s"),
    }
}
