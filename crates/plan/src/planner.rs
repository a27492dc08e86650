//! From a teacher, a cluster and work to a plan.

use retort_core::{Code, Error, Result};
use retort_model::Config;

use crate::{
    Assumptions, Cluster, Engine, Format, Layout, Mode, Weights, Work,
    estimate::Subject,
    memory::{self, cache_bytes},
    outcome::{Estimate, Job, Plan, Route, Section, Smallest, Teacher},
    ways_out::fits_from,
};

/// What takes less than this much longer is as good: small groups as large ones, the native engine as a
/// second system.
const MUCH: f64 = 1.1;

type Evaluate = fn(&Subject, Layout) -> Result<Estimate>;

/// Plans this work of a teacher called `name` on a cluster.
///
/// `SpecInvalid` where a figure is out of its bounds or rows exceed the teacher's context. A teacher
/// that fits nowhere is no error: its sections say why and what would do.
pub fn plan(
    name: &str,
    config: &Config,
    format: Format,
    cluster: &Cluster,
    work: &Work,
    assumptions: &Assumptions,
) -> Result<Plan> {
    cluster.validate()?;
    work.validate()?;
    assumptions.validate()?;
    config.validate()?;
    let context = config.max_position_embeddings.unsigned_abs();
    if work.row_tokens() > context {
        return Err(Error::new(
            Code::SpecInvalid,
            format!(
                "a row has {} prompt and {} new tokens, but the context of {name} is {context}; shorten one of them",
                work.prompt_tokens, work.new_tokens
            ),
        ));
    }
    let weights = Weights::new(config, format);
    let subject = Subject { config, weights: &weights, format, cluster, work, assumptions };
    let wanted = |mode: Mode| work.mode == mode || work.mode == Mode::Both;
    let score =
        if wanted(Mode::Score) { Some(section(&subject, |subject, layout| subject.score(layout))?) } else { None };
    let generate = if wanted(Mode::Generate) {
        Some(section(&subject, |subject, layout| subject.generate(layout))?)
    } else {
        None
    };
    let routes = match (&score, &generate) {
        (Some(score), Some(generate)) => routes(score, generate),
        _ => Vec::new(),
    };
    Ok(Plan {
        teacher: Teacher {
            name: name.to_owned(),
            parameters: config.parameters(),
            layers: config.num_hidden_layers.unsigned_abs(),
            format,
            weight_bytes: weights.bytes(),
            cache_bytes_per_token: cache_bytes(config, 1) * config.num_hidden_layers.unsigned_abs(),
            hop_bytes_per_token: 2 * config.hidden_size.unsigned_abs(),
        },
        cluster: cluster.clone(),
        work: work.clone(),
        assumptions: *assumptions,
        score,
        generate,
        routes,
    })
}

fn section(subject: &Subject, evaluate: Evaluate) -> Result<Section> {
    let mut layouts = Vec::new();
    for engine in [Engine::Native, Engine::Remote] {
        layouts.extend(best_of_each_kind(subject, engine, evaluate)?);
    }
    let fits_from = fits_from(subject, evaluate)?;
    let native = fastest(&layouts, Engine::Native);
    let remote = fastest(&layouts, Engine::Remote);
    let (recommended, reason) = match (native, remote) {
        (Some(native), Some(remote)) => choose(native, remote),
        (Some(native), None) => (Some(native), "no layout of a remote engine fits".to_owned()),
        (None, Some(remote)) => (Some(remote), "the native pipeline does not fit".to_owned()),
        (None, None) => {
            let fewer = fewer_sequences(subject, evaluate)?;
            (None, nothing_fits(&layouts, &fits_from, fewer))
        }
    };
    Ok(Section { recommended: recommended.cloned(), reason, layouts, fits_from })
}

/// For each kind of layout the first that none beats by much; where none fits, the largest.
fn best_of_each_kind(subject: &Subject, engine: Engine, evaluate: Evaluate) -> Result<Vec<Estimate>> {
    let mut best: Vec<Estimate> = Vec::new();
    let usable = memory::usable(subject.cluster, subject.assumptions);
    for layout in Layout::all(engine, subject.config, subject.cluster) {
        // Without room for the bare weights only the largest group is of interest: it says what lacks.
        let room = usable.saturating_mul(u64::from(layout.group_gpus()));
        let known = best.iter().find(|known| known.layout.is_like(&layout));
        if room < subject.weights.bytes() && known.is_some_and(|it| it.layout.group_gpus() >= layout.group_gpus()) {
            continue;
        }
        let estimate = evaluate(subject, layout)?;
        match best.iter_mut().find(|known| known.layout.is_like(&layout)) {
            None => best.push(estimate),
            Some(known) => {
                let better = match (seconds(known), seconds(&estimate)) {
                    (Some(known), Some(new)) => new * MUCH < known,
                    (None, Some(_)) => true,
                    (None, None) => estimate.layout.group_gpus() > known.layout.group_gpus(),
                    (Some(_), None) => false,
                };
                if better {
                    *known = estimate;
                }
            }
        }
    }
    best.sort_by_key(|estimate| (estimate.layout.tensor, estimate.layout.in_turn));
    Ok(best)
}

fn seconds(estimate: &Estimate) -> Option<f64> {
    estimate.speed.as_ref().map(|speed| speed.job.seconds)
}

fn fastest(layouts: &[Estimate], engine: Engine) -> Option<&Estimate> {
    let fitting = layouts.iter().filter(|estimate| estimate.layout.engine == engine && estimate.speed.is_some());
    fitting.min_by(|a, b| seconds(a).unwrap_or(f64::MAX).total_cmp(&seconds(b).unwrap_or(f64::MAX)))
}

/// Which of the two, and why.
fn choose<'a>(native: &'a Estimate, remote: &'a Estimate) -> (Option<&'a Estimate>, String) {
    let (ours, theirs) = (seconds(native).unwrap_or(f64::MAX), seconds(remote).unwrap_or(f64::MAX));
    let against = format!("{} of {}", remote.layout.describe(), Engine::Remote.as_str());
    if ours <= theirs {
        (Some(native), format!("the native pipeline takes {:.2} of the time of {against}", ours / theirs))
    } else if ours <= theirs * MUCH {
        let reason =
            format!("{against} would take {:.2} of the time: too little gained for a second system", theirs / ours);
        (Some(native), reason)
    } else {
        (Some(remote), format!("{against} takes {:.2} of the time of the native pipeline", theirs / ours))
    }
}

/// Where a number of sequences was asked for: the most that fit on this cluster.
fn fewer_sequences(subject: &Subject, evaluate: Evaluate) -> Result<Option<u64>> {
    if subject.work.sequences.is_none() {
        return Ok(None);
    }
    let work = Work { sequences: None, ..subject.work.clone() };
    let free = Subject { work: &work, ..*subject };
    let mut most = None;
    for engine in [Engine::Native, Engine::Remote] {
        for estimate in best_of_each_kind(&free, engine, evaluate)? {
            most = most.max(estimate.speed.and_then(|speed| speed.sequences));
        }
    }
    Ok(most)
}

fn nothing_fits(layouts: &[Estimate], fits_from: &[Smallest], fewer: Option<u64>) -> String {
    let why = layouts.iter().find_map(|estimate| estimate.too_small.clone());
    let fewer = fewer.map(|sequences| format!("`--sequences {sequences}`"));
    let ways: Vec<_> = fewer
        .into_iter()
        .chain(fits_from.iter().filter_map(|smallest| {
            let (gpus, nodes) = (smallest.gpus?, smallest.nodes?);
            let nodes = if nodes == 1 { "1 node".to_owned() } else { format!("{nodes} nodes") };
            Some(format!("`{}` with {gpus} such GPUs on {nodes}", smallest.format.flags()))
        }))
        .collect();
    let why = why.unwrap_or_else(|| "no layout can be cut so".to_owned());
    match ways.is_empty() {
        true => format!("{why}; ways out: GPUs of more memory, fewer sequences or a smaller micro-batch"),
        false => format!("{why}; ways out: {}", ways.join(", or ")),
    }
}

/// Completions with soft targets: in one pass, or generated by the fastest and scored after.
fn routes(score: &Section, generate: &Section) -> Vec<Route> {
    let mut routes = Vec::new();
    let job = |estimate: &Estimate| estimate.speed.as_ref().map(|speed| speed.job);
    if let Some(job) = fastest(&generate.layouts, Engine::Native).and_then(job) {
        routes.push(Route { name: "generate natively, capturing soft targets in the same pass".to_owned(), job });
    }
    let scorer = score.recommended.as_ref();
    if let (Some(first), Some(second), Some(scorer)) =
        (fastest(&generate.layouts, Engine::Remote).and_then(job), scorer.and_then(job), scorer)
    {
        let cost = first.cost.zip(second.cost).map(|(a, b)| a + b);
        let job = Job { seconds: first.seconds + second.seconds, gpu_hours: first.gpu_hours + second.gpu_hours, cost };
        let engine = scorer.layout.engine.as_str();
        routes.push(Route { name: format!("generate with {}, then score ({engine})", Engine::Remote.as_str()), job });
    }
    routes.sort_by(|a, b| a.job.seconds.total_cmp(&b.job.seconds));
    routes
}

#[cfg(test)]
mod tests;
