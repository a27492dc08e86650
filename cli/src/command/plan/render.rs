//! A plan as text. Per process or stage, not per GPU: `--json` has each.

use retort_plan::{Estimate, Plan, Section, Speed, Stage};

use crate::text::{bytes, count, duration, rate, table};

const GIB: f64 = (1_u64 << 30) as f64;

pub fn text(plan: &Plan) -> String {
    let mut text = head(plan);
    for (name, section) in [("score", &plan.score), ("generate", &plan.generate)] {
        if let Some(section) = section {
            text.push_str(&one(plan, name, section));
        }
    }
    if !plan.routes.is_empty() {
        text.push_str("\nboth: completions and their soft targets\n");
        let row = |route: &retort_plan::Route| {
            vec![route.name.clone(), duration(route.job.seconds), gpu_hours(route.job), price(route.job)]
        };
        text.push_str(&indent(&table(&plan.routes.iter().map(row).collect::<Vec<_>>(), &[1, 2, 3])));
    }
    text.push_str("\nArithmetic, not a measurement: docs/planning.md says what it rests on.\n");
    text
}

fn head(plan: &Plan) -> String {
    let (teacher, cluster, work, rates) = (&plan.teacher, &plan.cluster, &plan.work, &plan.assumptions);
    let gpu = &cluster.gpu;
    let usable = gpu.memory_bytes as f64 * rates.memory_utilization / GIB;
    let products = match rates.measured_flops {
        Some(flops) => format!("{:.0} TFLOP/s of products as measured", flops / 1e12),
        None => format!("{:.0} % of the peak of products", 100.0 * rates.compute_efficiency),
    };
    format!(
        "teacher  {}: {} parameters in {} layers; {}, {}\n\
         \x20        {} bytes of cache a token, {} bytes a token over a hop\n\
         cluster  {} x {} {}: {:.1} GiB each, {usable:.1} usable; {:.0} TFLOP/s bf16,\n\
         \x20        {} GB/s from memory, {} GB/s in a node, {} GB/s to another\n\
         taken    {products}, {:.0} % of the memory's rate, {:.0} % of the links',\n\
         \x20        {} GB/s over a native hop, {:.1} times as long for remote log-probabilities of prompts\n\
         work     {} rows of {} prompt and {} new tokens, {} rows a shard\n",
        teacher.name,
        count(teacher.parameters),
        teacher.layers,
        teacher.format.as_str(),
        bytes(teacher.weight_bytes),
        count(teacher.cache_bytes_per_token),
        count(teacher.hop_bytes_per_token),
        several(u64::from(cluster.nodes), "node"),
        cluster.gpus,
        gpu.name,
        gpu.memory_bytes as f64 / GIB,
        gpu.bf16_flops / 1e12,
        giga(gpu.memory_bandwidth),
        giga(gpu.node_link),
        giga(gpu.network),
        100.0 * rates.bandwidth_efficiency,
        100.0 * rates.link_efficiency,
        giga(rates.hop_bandwidth),
        rates.remote_scoring_cost,
        count(work.rows),
        count(work.prompt_tokens),
        count(work.new_tokens),
        count(work.shard_rows),
    )
}

fn one(plan: &Plan, name: &str, section: &Section) -> String {
    let mut text = format!("\n{name}: ");
    match section.recommended.as_ref().and_then(|estimate| Some((estimate, estimate.speed.as_ref()?))) {
        None => text.push_str(&format!("does not fit\n  {}\n", section.reason)),
        Some((estimate, speed)) => {
            let layout = &estimate.layout;
            let groups = several(u64::from(layout.copies), "group");
            text.push_str(&format!("take {}, {}, {groups}\n", layout.engine.as_str(), layout.describe()));
            text.push_str(&format!("  {}\n  {}\n  why: {}\n", pace(speed), bill(plan, speed), section.reason));
            text.push_str(&indent(&stages(plan, estimate)));
            text.push_str(&links(plan, speed));
        }
    }
    text.push_str("  the fastest of each kind of layout\n");
    text.push_str(&indent(&indent(&layouts(section))));
    text.push_str("  a group fits from");
    for (index, smallest) in section.fits_from.iter().enumerate() {
        let separator = if index == 0 { " " } else { "; " };
        let place = match (smallest.gpus, smallest.nodes) {
            (Some(gpus), Some(1)) => several(u64::from(gpus), "GPU"),
            (Some(gpus), Some(nodes)) => format!("{gpus} GPUs on {nodes} nodes"),
            _ => "not on 64 nodes".to_owned(),
        };
        text.push_str(&format!("{separator}{} {place}", smallest.format.flags()));
    }
    text.push('\n');
    text
}

fn pace(speed: &Speed) -> String {
    let batch = match speed.sequences {
        None => format!("micro-batches of {} tokens", count(speed.micro_batch)),
        Some(sequences) => format!(
            "{} at once in micro-batches of {}, {} tokens/s once prompts are read",
            several(sequences, "sequence"),
            speed.micro_batch,
            rate(speed.decode_tokens_per_second.unwrap_or(0.0)),
        ),
    };
    format!(
        "{} tokens/s, bound by {}; {batch}; stages busy {:.0} % of the time",
        rate(speed.tokens_per_second),
        speed.bound.as_str(),
        100.0 * speed.busy
    )
}

fn bill(plan: &Plan, speed: &Speed) -> String {
    let tokens = count(plan.work.target_tokens());
    let mut text =
        format!("job: {tokens} targets in {}, {} GPU-hours", duration(speed.job.seconds), gpu_hours(speed.job));
    if speed.job.cost.is_some() {
        text.push_str(&format!(", cost {}", price(speed.job)));
    }
    text
}

/// One row a stage; for stages of one GPU, one row a node.
fn stages(plan: &Plan, estimate: &Estimate) -> String {
    let place = if estimate.layout.tensor == 1 { "node" } else { "stage" };
    let mut rows = vec![
        [place, "layers", "GPUs", "parameters", "weights a GPU", "cache", "activations", "of usable"]
            .map(str::to_owned)
            .to_vec(),
    ];
    let usable = plan.cluster.gpu.memory_bytes as f64 * plan.assumptions.memory_utilization;
    let same = |a: &Stage, b: &Stage| estimate.layout.tensor == 1 && a.node == b.node;
    for (index, stages) in estimate.stages.chunk_by(same).enumerate() {
        let largest = |of: fn(&Stage) -> u64| stages.iter().map(of).max().unwrap_or(0) as f64;
        let gib = |of: fn(&Stage) -> u64| format!("{:.1} GiB", largest(of) / GIB);
        let (first, last) = (stages[0].layers.start, stages[stages.len() - 1].layers.end - 1);
        rows.push(vec![
            index.to_string(),
            format!("{first}-{last}"),
            (stages.len() as u64 * u64::from(estimate.layout.tensor)).to_string(),
            count(stages.iter().map(|stage| stage.parameters).sum()),
            gib(|stage| stage.weight_bytes),
            gib(|stage| stage.cache_bytes),
            gib(|stage| stage.activation_bytes),
            format!("{:.0} %", 100.0 * largest(Stage::bytes) / usable),
        ]);
    }
    table(&rows, &[2, 3, 4, 5, 6, 7])
}

fn links(plan: &Plan, speed: &Speed) -> String {
    let line = |network: bool, place: &str| {
        let hops: Vec<_> = speed.hops.iter().filter(|hop| hop.network == network).collect();
        hops.first().map(|hop| {
            format!(
                "  links: {} {place}, {} bytes a token: {:.2} GB/s each of {:.1} that one carries\n",
                several(hops.len() as u64, "hop"),
                count(plan.teacher.hop_bytes_per_token),
                hop.bytes_per_second / 1e9,
                hop.limit_bytes_per_second / 1e9,
            )
        })
    };
    [line(false, "inside nodes"), line(true, "between nodes")].into_iter().flatten().collect()
}

fn layouts(section: &Section) -> String {
    let decodes = section.layouts.iter().filter_map(|estimate| estimate.speed.as_ref());
    let decodes = decodes.clone().any(|speed| speed.decode_tokens_per_second.is_some());
    let mut heads = vec!["engine", "layout", "groups", "tokens/s"];
    heads.extend(decodes.then_some("prompts read"));
    heads.extend(["GPU-hours", "bound by"]);
    let mut rows = vec![heads.into_iter().map(str::to_owned).collect()];
    for estimate in &section.layouts {
        let layout = &estimate.layout;
        let mut row = vec![layout.engine.as_str().to_owned(), layout.describe(), layout.copies.to_string()];
        match &estimate.speed {
            Some(speed) => {
                row.push(rate(speed.tokens_per_second));
                row.extend(speed.decode_tokens_per_second.map(rate));
                row.extend([gpu_hours(speed.job), speed.bound.as_str().to_owned()]);
            }
            None => {
                row.extend(vec!["-".to_owned(); if decodes { 3 } else { 2 }]);
                row.push("does not fit: ".to_owned() + estimate.too_small.as_deref().unwrap_or_default());
            }
        }
        rows.push(row);
    }
    table(&rows, if decodes { &[2, 3, 4, 5] } else { &[2, 3, 4] })
}

fn gpu_hours(job: retort_plan::Job) -> String {
    if job.gpu_hours < 10.0 { format!("{:.2}", job.gpu_hours) } else { count(job.gpu_hours.round() as u64) }
}

fn price(job: retort_plan::Job) -> String {
    job.cost.map(|cost| format!("{cost:.2}")).unwrap_or_default()
}

/// In thousands of millions, with a decimal only where it says something.
fn giga(rate: f64) -> String {
    let rate = rate / 1e9;
    if rate < 10.0 { format!("{rate:.1}") } else { count(rate.round() as u64) }
}

fn several(n: u64, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{} {what}s", count(n)) }
}

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}
