//! The fewest GPUs that hold a teacher.

use retort_core::Result;

use crate::{
    Cluster, Engine, Format, Layout, Weights, Work,
    estimate::Subject,
    memory,
    outcome::{Estimate, Smallest},
};

/// Clusters of more nodes are not looked at.
const MOST_NODES: u32 = 64;

/// For each format, the smallest group of GPUs of this kind on which some layout fits: on part of a
/// node, or on whole nodes.
pub(crate) fn fits_from(
    subject: &Subject,
    evaluate: fn(&Subject, Layout) -> Result<Estimate>,
) -> Result<Vec<Smallest>> {
    let mut all = Vec::new();
    for format in Format::ALL {
        let weights = Weights::new(subject.config, format);
        let node_gpus = subject.cluster.gpus;
        let inside = (1..=node_gpus).map(|gpus| (1, gpus));
        let mut found = Smallest { format, gpus: None, nodes: None };
        for (nodes, gpus) in inside.chain((2..=MOST_NODES).map(|nodes| (nodes, node_gpus))) {
            // Less than the bare weights is not worth a look.
            let room = memory::usable(subject.cluster, subject.assumptions).saturating_mul(u64::from(nodes * gpus));
            if room >= weights.bytes() && fits(subject, &weights, format, (nodes, gpus), evaluate)? {
                found = Smallest { format, gpus: Some(nodes * gpus), nodes: Some(nodes) };
                break;
            }
        }
        all.push(found);
    }
    Ok(all)
}

fn fits(
    subject: &Subject,
    weights: &Weights,
    format: Format,
    (nodes, gpus): (u32, u32),
    evaluate: fn(&Subject, Layout) -> Result<Estimate>,
) -> Result<bool> {
    let cluster = Cluster { nodes, gpus, gpu: subject.cluster.gpu.clone() };
    // Where nobody said how many, one sequence at once is enough to fit.
    let work = Work { sequences: subject.work.sequences.or(Some(1)), ..subject.work.clone() };
    let trial = Subject { weights, format, cluster: &cluster, work: &work, ..*subject };
    for engine in [Engine::Native, Engine::Remote] {
        for layout in Layout::of_group(engine, subject.config, nodes, gpus, 1) {
            if evaluate(&trial, layout)?.too_small.is_none() {
                return Ok(true);
            }
        }
    }
    Ok(false)
}
