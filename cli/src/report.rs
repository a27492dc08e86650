//! A finished job's report as text: how much of the teacher survived, what it cost, and where
//! everything lies.

use std::path::{Path, PathBuf};

use retort_proto as proto;

use crate::{
    json,
    text::{bytes, clean, count, rate, shorten, table, wrap},
};

/// Columns of a sample's labels.
const LABEL: usize = 16;
/// Longest answer shown, characters.
const MAX_ANSWER: usize = 1200;
const SAMPLES: usize = 3;
const REDONE: usize = 10;
const TAGS: usize = 20;

/// What the report is printed for.
#[derive(Clone, Debug, Default)]
pub struct Surroundings {
    /// Columns of the terminal.
    pub width: usize,
    /// The store's folder, when it is on this machine: artefacts become paths.
    pub store: Option<PathBuf>,
    /// Where the model was exported to, and whether it is only a candidate.
    pub export: Option<(PathBuf, bool)>,
}

/// Renders a job with its report; without one, what is known of the job.
pub fn render(job: &proto::Job, around: &Surroundings) -> String {
    let name = job.spec.as_ref().map_or("", |spec| spec.name.as_str());
    let mut text = format!("{}  {}  {}\n", clean(name), clean(&job.name), json::state(job.state).to_uppercase());
    if let Some(error) = &job.error {
        text.push_str(&format!("{}: {}\n", clean(&error.code), clean(&error.message)));
    }
    if let Some(report) = &job.report {
        for section in [
            cost(job, report),
            quality(job, report),
            tags(report),
            forecast(report),
            gates(report),
            samples(report, around.width),
        ] {
            if !section.is_empty() {
                text.push('\n');
                text.push_str(&section);
            }
        }
        text.push('\n');
        text.push_str(&artifacts(report, around));
    }
    text
}

fn cost(job: &proto::Job, report: &proto::Report) -> String {
    let mut rows = Vec::new();
    let mut row = |name: &str, value: String| rows.push(vec![name.to_owned(), value]);
    if let Some(plan) = &job.plan {
        row("prompts", format!("{} for training, {} held out", count(plan.train_rows), count(plan.held_out_rows)));
    }
    row("soft targets", format!("{} tokens", count(report.target_tokens)));
    row(
        "stored in",
        format!("{}, {} bytes per token to train on", bytes(report.store_bytes), rate(report.bytes_per_token)),
    );
    if let Some(stored) = report.soft_targets.as_ref().and_then(|stored| stored.train.as_ref()) {
        let (kl, kept) = (fixed(stored.kl), percent(stored.argmax_agreement));
        row("rounding", format!("KL {kl} nats/token over what is kept, top-1 kept at {kept}"));
    }
    if let Some(pruning) = &report.pruning {
        row("pruned", depth(pruning));
        if let Some(width) = width(pruning) {
            row("", width);
        }
    }
    if report.reused > 0 {
        let shards = job.plan.as_ref().map_or(0, |plan| u64::from(plan.train_shards) + u64::from(plan.held_out_shards));
        let of = if shards > 0 { format!(" of {}", count(shards)) } else { String::new() };
        row("reused", format!("{}{of} shards, computed for other jobs", count(report.reused.into())));
    }
    if report.reused == 0 || report.teacher_tokens_per_second > 0.0 {
        row("teacher", format!("{} tokens/s", rate(report.teacher_tokens_per_second)));
    }
    row("student", format!("{} tokens/s, {}", rate(report.student_tokens_per_second), processed(report)));
    for (name, value) in trained(job, report) {
        row(name, value);
    }
    let redone = report.redone.len();
    row(
        "redone",
        if redone == 0 {
            "nothing".to_owned()
        } else {
            format!("{redone} attempt{}", if redone == 1 { "" } else { "s" })
        },
    );
    let mut text = table(&rows, &[]);
    for redone in report.redone.iter().take(REDONE) {
        let task = redone.task.rsplit('/').next().unwrap_or_default();
        text.push_str(&format!(
            "  {}\n",
            shorten(&format!("{task} attempt {} on {}: {}", redone.epoch, redone.worker, redone.reason), 120)
        ));
    }
    if redone > REDONE {
        text.push_str(&format!("  and {} more\n", redone - REDONE));
    }
    text
}

/// `103,701 tokens processed, 34,567 of them targets`.
fn processed(report: &proto::Report) -> String {
    let processed = format!("{} tokens processed", count(report.processed_tokens));
    match report.trained_target_tokens {
        0 => processed,
        targets => format!("{processed}, {} of them targets", count(targets)),
    }
}

/// How it was trained, where that is not one worker training the whole student.
fn trained(job: &proto::Job, report: &proto::Report) -> Vec<(&'static str, String)> {
    let mut rows = Vec::new();
    let all = job.plan.as_ref().map_or(0, |plan| plan.student_parameters);
    let of = if all > 0 { format!(" of {}", count(all)) } else { String::new() };
    let trained = format!("{}{of} parameters", count(report.trained_parameters));
    match report.lora_rank {
        0 if report.trained_parameters == 0 || report.trained_parameters == all => {}
        0 => rows.push(("trained", trained)),
        rank if report.trained_parameters == 0 => rows.push(("adapters", format!("LoRA, rank {rank}"))),
        rank => rows.push(("adapters", format!("LoRA, rank {rank}: {trained} trained"))),
    }
    if report.ema_decay > 0.0 {
        rows.push(("averaged", format!("the weights judged are a running average, decay {}", report.ema_decay)));
    }
    let asked = job.spec.as_ref().and_then(|spec| spec.train.as_ref()?.parallel.as_ref()).map_or(1, |of| of.workers);
    if asked > 1 && report.workers > 0 {
        rows.push(("workers", format!("{} trained together, of up to {asked}", report.workers)));
    }
    if report.left_out_steps > 0 {
        let left_out = count(report.left_out_steps.into());
        rows.push(("left out", format!("{left_out} steps whose gradient or loss leapt up (train.guard)")));
    }
    rows
}

/// `layers 0-6, 27-29 of 30, 61.0 % of their influence`.
fn depth(pruning: &proto::Pruning) -> String {
    let layers: Vec<u32> = pruning.layers.iter().map(|layer| layer.layer).collect();
    let runs = layers.chunk_by(|a, b| a.checked_add(1) == Some(*b)).map(|run| match run {
        [first, .., last] => format!("{first}-{last}"),
        one => one.iter().map(u32::to_string).collect(),
    });
    let depth = pruning.depth.unwrap_or_default();
    let mut text = format!("layers {} of {}", runs.collect::<Vec<_>>().join(", "), count(depth.of.into()));
    if let Some(share) = depth.share {
        text.push_str(&format!(", {} of their influence", percent(share)));
    }
    text
}

/// What else was cut, and the share of importance that is left of it; `None` where nothing was.
fn width(pruning: &proto::Pruning) -> Option<String> {
    let axes = [
        ("hidden channels", pruning.hidden),
        ("intermediate channels", pruning.intermediate),
        ("attention heads", pruning.attention_heads),
        ("key-value heads", pruning.key_value_heads),
    ];
    let cut = axes.into_iter().filter_map(|(name, axis)| Some((name, axis?))).filter(|(_, axis)| axis.kept < axis.of);
    let parts: Vec<String> = cut
        .map(|(name, axis)| {
            let share = axis.share.map(|share| format!(" ({})", percent(share))).unwrap_or_default();
            format!("{} of {} {name}{share}", count(axis.kept.into()), count(axis.of.into()))
        })
        .collect();
    (!parts.is_empty()).then(|| format!("{}; of importance on {} rows", parts.join(", "), pruning.calibration_rows))
}

fn quality(job: &proto::Job, report: &proto::Report) -> String {
    let (Some(before), Some(after)) = (&report.before, &report.after) else { return String::new() };
    let row = |cells: [String; 4]| cells.to_vec();
    let rows = [
        row(["held out".to_owned(), "before".to_owned(), "after".to_owned(), "teacher".to_owned()]),
        row(["KL to the teacher, nats/token".to_owned(), fixed(before.kl), fixed(after.kl), String::new()]),
        row([
            "top-1 agreement".to_owned(),
            percent(before.top1_agreement),
            percent(after.top1_agreement),
            String::new(),
        ]),
        row([
            "perplexity".to_owned(),
            perplexity(before.student_perplexity),
            perplexity(after.student_perplexity),
            perplexity(after.teacher_perplexity),
        ]),
    ];
    let mut rows = rows.to_vec();
    if let Some(error) = after.calibration_error {
        let share = |error: Option<f64>| error.map_or_else(String::new, percent);
        let cells = [share(before.calibration_error), percent(error), share(after.teacher_calibration_error)];
        rows.push([vec!["calibration error".to_owned()], cells.to_vec()].concat());
    }
    let mut text = table(&rows, &[1, 2, 3]);
    let kept = if before.kl > 0.0 && after.kl.is_finite() {
        format!("KL is {} of what it was, ", percent(after.kl / before.kl))
    } else {
        String::new()
    };
    text.push_str(&format!("{kept}judged on {} tokens\n", count(after.tokens)));
    if after.kl > before.kl {
        text.push_str("The student is worse than before training: a lower train.learning_rate may help.\n");
    }
    if let Some(point) = passed_by(job, report) {
        text.push_str(&format!(
            "At step {} its KL was lower, {}: train.promote best takes that checkpoint.\n",
            count(point.step.into()),
            fixed(point.kl)
        ));
    }
    text
}

/// The checkpoint with the lowest held-out KL, where the last one, which was judged, is more than a hundredth above it.
fn passed_by<'a>(job: &proto::Job, report: &'a proto::Report) -> Option<&'a proto::CurvePoint> {
    let train = job.spec.as_ref()?.train.as_ref()?;
    let curve = &report.forecast.as_ref()?.curve;
    let last = curve.last()?;
    // There is no checkpoint of step 0.
    let comparable = curve.iter().filter(|point| point.step > 0 && point.tokens == last.tokens);
    let best = comparable.min_by(|a, b| a.kl.total_cmp(&b.kl))?;
    (train.promote() != proto::Promote::Best && last.kl > 1.01 * best.kl).then_some(best)
}

fn tags(report: &proto::Report) -> String {
    let mut tags: Vec<_> = report.after_by_tag.iter().collect();
    tags.sort_by(|a, b| b.1.kl.total_cmp(&a.1.kl).then_with(|| a.0.cmp(b.0)));
    if tags.is_empty() {
        return String::new();
    }
    let heads = ["after, by tag", "KL", "top-1", "perplexity", "teacher's", "calibration", "tokens"];
    let mut rows = vec![heads.map(str::to_owned).to_vec()];
    rows.extend(tags.iter().take(TAGS).map(|(tag, quality)| {
        vec![
            shorten(tag, 40),
            fixed(quality.kl),
            percent(quality.top1_agreement),
            perplexity(quality.student_perplexity),
            perplexity(quality.teacher_perplexity),
            quality.calibration_error.map_or_else(|| "-".to_owned(), percent),
            count(quality.tokens),
        ]
    }));
    let mut text = table(&rows, &[1, 2, 3, 4, 5, 6]);
    if tags.len() > TAGS {
        text.push_str(&format!("and {} more, in the report\n", tags.len() - TAGS));
    }
    text
}

/// A line for each prediction, or one that says why there is none.
fn forecast(report: &proto::Report) -> String {
    let Some(forecast) = &report.forecast else { return String::new() };
    if !forecast.none.is_empty() {
        return format!("no forecast: {}\n", clean(&forecast.none));
    }
    let mut text = String::new();
    for (i, prediction) in forecast.predictions.iter().enumerate() {
        text.push_str(&format!(
            "{:<10}{:>2}x the target tokens: KL {}, {:.0} % interval {} to {}{}\n",
            if i == 0 { "forecast" } else { "" },
            prediction.factor,
            fixed(prediction.kl),
            100.0 * forecast.confidence,
            fixed(prediction.low),
            fixed(prediction.high),
            if forecast.decaying { "; biased, the learning rate fell" } else { "" }
        ));
    }
    text
}

fn gates(report: &proto::Report) -> String {
    if report.gates.is_empty() {
        return "no gates are set\n".to_owned();
    }
    let mut rows = vec![["gate", "limit", "value", ""].map(str::to_owned).to_vec()];
    rows.extend(report.gates.iter().map(|gate| {
        let verdict = match gate.passed {
            true => "passed",
            false if gate.value.is_finite() => "FAILED",
            false => "FAILED: its value is no finite number",
        };
        vec![clean(&gate.gate), fixed(gate.limit), fixed(gate.value), verdict.to_owned()]
    }));
    table(&rows, &[1, 2])
}

fn samples(report: &proto::Report, width: usize) -> String {
    let shown = report.samples.iter().take(SAMPLES);
    let of = report.samples.len().min(SAMPLES);
    let mut text = String::new();
    for (i, sample) in shown.enumerate() {
        if i > 0 {
            text.push('\n');
        }
        text.push_str(&format!("sample {} of {of}: {}\n", i + 1, shorten(&sample.row_id, 60)));
        for (label, words) in [
            ("prompt", &sample.prompt),
            ("teacher", &sample.teacher),
            ("student before", &sample.student_before),
            ("student after", &sample.student_after),
        ] {
            text.push_str(&answer(label, words, width));
        }
    }
    text
}

/// `label`, and the words wrapped beside it.
fn answer(label: &str, words: &str, width: usize) -> String {
    let cleaned = clean(words);
    let mut cut: String = cleaned.chars().take(MAX_ANSWER).collect();
    if cut.len() < cleaned.len() {
        cut.push('…');
    }
    let mut lines = wrap(&cut, width.saturating_sub(LABEL + 2).max(20));
    if lines.is_empty() {
        lines.push("(nothing)".to_owned());
    }
    let mut text = String::new();
    for (i, line) in lines.iter().enumerate() {
        let label = if i == 0 { label } else { "" };
        text.push_str(&format!("  {label:<LABEL$}{line}\n"));
    }
    text
}

fn artifacts(report: &proto::Report, around: &Surroundings) -> String {
    let mut rows = Vec::new();
    let mut row = |name: &str, value: String| rows.push(vec![name.to_owned(), value]);
    row("promoted", if report.promoted.is_empty() { "no".to_owned() } else { clean(&report.promoted) });
    if let Some((path, candidate)) = &around.export {
        row(if *candidate { "exported (a candidate)" } else { "exported" }, path.display().to_string());
    }
    let mut keys: Vec<_> = report.artifacts.iter().collect();
    keys.sort();
    for (name, key) in keys {
        row(&clean(name), place(key, around.store.as_deref()));
    }
    if around.store.is_none() && !report.artifacts.is_empty() {
        row("", "(keys of the object store)".to_owned());
    }
    table(&rows, &[])
}

fn place(key: &str, store: Option<&Path>) -> String {
    match store {
        Some(store) if !key.contains("://") => store.join(clean(key)).display().to_string(),
        _ => clean(key),
    }
}

fn fixed(value: f64) -> String {
    if value.is_finite() { format!("{value:.4}") } else { "-".to_owned() }
}

fn percent(share: f64) -> String {
    if share.is_finite() { format!("{:.1} %", 100.0 * share) } else { "-".to_owned() }
}

fn perplexity(value: f64) -> String {
    match value {
        v if !v.is_finite() => "-".to_owned(),
        v if v >= 1e9 => format!("{v:.2e}"),
        v if v >= 10_000.0 => count(v.round() as u64),
        v => format!("{v:.2}"),
    }
}

#[cfg(test)]
mod tests;
