//! One layout, one kind of work: what each stage holds, and how fast it goes.

use std::ops::Range;

use retort_core::Result;
use retort_model::{Config, balance_layers};

use crate::{
    Assumptions, Cluster, Engine, Format, Layout, Weights, Work,
    memory::{self, Load},
    outcome::{Bound, Estimate, Hop, Job, Speed, Stage},
    speed::{Cost, Machine, Pass},
};

/// Sequences at once when nobody says how many: what vLLM takes by default on large GPUs.
const MOST_SEQUENCES: u64 = 1024;

/// All that an estimate rests on, but the layout.
#[derive(Clone, Copy)]
pub(crate) struct Subject<'a> {
    pub config: &'a Config,
    pub weights: &'a Weights,
    pub format: Format,
    pub cluster: &'a Cluster,
    pub work: &'a Work,
    pub assumptions: &'a Assumptions,
}

/// A split, and what of each stage is held and spent.
struct Split {
    stages: Vec<Stage>,
    costs: Vec<Cost>,
}

impl Subject<'_> {
    pub fn score(&self, layout: Layout) -> Result<Estimate> {
        let machine = self.machine(&layout);
        let work = self.work;
        let row = work.row_tokens();
        let rows = (work.micro_batch / row).max(1);
        let tokens = rows * row;
        let pass = Pass {
            tokens: tokens as f64,
            targets: (rows * work.new_tokens) as f64,
            context: row as f64 / 2.0,
            reads_cache: false,
        };
        // A remote engine has a cache for all that is in flight; a group's stages for the texts that a step cuts, one
        // at either end; a single process for nothing.
        let cached = match layout.engine {
            Engine::Remote => tokens.saturating_mul(u64::from(layout.stages)),
            Engine::Native if layout.stages > 1 => row.saturating_mul(2),
            Engine::Native => 0,
        };
        let load = Load { tokens, targets: rows * work.new_tokens, cached };
        let split = self.split(&machine, &layout, &pass, load)?;
        if let Some(reason) = self.too_small(&split) {
            return Ok(Estimate { layout, too_small: Some(reason), stages: split.stages, speed: None });
        }
        let depth = f64::from(layout.depth());
        let (stage_seconds, mut bound) = slowest(&split.costs, &layout);
        let hop_seconds = (0..layout.stages).map(|stage| machine.hop(stage, &pass)).fold(0.0, f64::max);
        if hop_seconds > stage_seconds {
            bound = Bound::Hops;
        }
        let period = stage_seconds.max(hop_seconds);
        let shard_rows = work.shard_rows.min(work.rows);
        let batches = shard_rows.div_ceil(rows) as f64;
        let busy = batches / (batches + depth - 1.0);
        let slower = if layout.engine == Engine::Remote { self.assumptions.remote_scoring_cost } else { 1.0 };
        let shard_seconds = (batches + depth - 1.0) * period * slower;
        let group = (shard_rows * row) as f64 / shard_seconds;
        let speed = Speed {
            tokens_per_second: group * f64::from(layout.copies),
            decode_tokens_per_second: None,
            bound,
            micro_batch: tokens,
            sequences: None,
            busy,
            hops: hops(&machine, &layout, group),
            job: self.job(&layout, shard_seconds),
        };
        Ok(Estimate { layout, too_small: None, stages: split.stages, speed: Some(speed) })
    }

    pub fn generate(&self, layout: Layout) -> Result<Estimate> {
        let machine = self.machine(&layout);
        let work = self.work;
        let depth = u64::from(layout.depth());
        let shard_rows = work.shard_rows.min(work.rows);
        let wanted = work.sequences.unwrap_or(MOST_SEQUENCES).min(shard_rows);
        // Weights are read once a micro-batch: as many of these as can be at work, and no more.
        let mut split = self.split_for(&machine, &layout, wanted, wanted.div_ceil(depth))?;
        let mut sequences = wanted;
        if self.too_small(&split).is_some() && work.sequences.is_none() {
            let fits = self.most_sequences(&machine, &layout, &split, wanted)?;
            // Even waves: the last one is not to be a few sequences.
            sequences = if fits == 0 { 1 } else { shard_rows.div_ceil(shard_rows.div_ceil(fits)) };
            split = self.split_for(&machine, &layout, sequences, sequences.div_ceil(depth))?;
        }
        if let Some(reason) = self.too_small(&split) {
            return Ok(Estimate { layout, too_small: Some(reason), stages: split.stages, speed: None });
        }
        let micro_batch = sequences.div_ceil(depth);
        let (period, bound) = slowest(&split.costs, &layout);
        let decode = self.decode_pass(micro_batch);
        let travel: f64 = (0..layout.stages).map(|stage| machine.hop(stage, &decode)).sum();
        let cycle = depth as f64 * period + travel;
        let waves = shard_rows.div_ceil(sequences) as f64;
        let decode_seconds = waves * work.new_tokens as f64 * cycle;
        let prompts = self.prompt_seconds(&machine, &layout, &split, shard_rows);
        let shard_seconds = prompts + decode_seconds;
        let per_shard = (shard_rows * work.new_tokens) as f64;
        let through = (shard_rows * work.row_tokens()) as f64 / shard_seconds;
        let copies = f64::from(layout.copies);
        let speed = Speed {
            tokens_per_second: per_shard / shard_seconds * copies,
            decode_tokens_per_second: Some(per_shard / decode_seconds * copies),
            bound: if travel > depth as f64 * period { Bound::Hops } else { bound },
            micro_batch,
            sequences: Some(sequences),
            busy: depth as f64 * period / cycle,
            hops: hops(&machine, &layout, through),
            job: self.job(&layout, shard_seconds),
        };
        Ok(Estimate { layout, too_small: None, stages: split.stages, speed: Some(speed) })
    }

    /// As many as fit of what `split` was for; 0 where none does.
    fn most_sequences(&self, machine: &Machine, layout: &Layout, split: &Split, wanted: u64) -> Result<u64> {
        // From what the stages of too many leave free; their split is not quite that of fewer.
        let usable = memory::usable(self.cluster, self.assumptions);
        let room = |stage: &Stage| {
            let free = usable.saturating_sub(stage.weight_bytes + stage.activation_bytes);
            free / (stage.cache_bytes / wanted).max(1)
        };
        let guess = split.stages.iter().map(room).min().unwrap_or(0).clamp(1, wanted);
        let does = |sequences: u64| -> Result<bool> {
            let trial = self.split_for(machine, layout, sequences, sequences.div_ceil(u64::from(layout.depth())))?;
            Ok(self.too_small(&trial).is_none())
        };
        let (mut fits, mut fails) = if does(guess)? { (guess, guess + guess / 8 + 1) } else { (0, guess) };
        fails = fails.min(wanted);
        while fails > fits + 1 {
            let middle = fits + (fails - fits) / 2;
            if does(middle)? {
                fits = middle;
            } else {
                fails = middle;
            }
        }
        Ok(fits)
    }

    fn machine<'b>(&'b self, layout: &'b Layout) -> Machine<'b> {
        let fp8 = matches!(self.format, Format::Fp8 | Format::Fp8Mlp);
        Machine::new(self.config, self.cluster, self.assumptions, layout, fp8)
    }

    fn decode_pass(&self, sequences: u64) -> Pass {
        Pass {
            tokens: sequences as f64,
            targets: sequences as f64,
            context: self.work.prompt_tokens as f64 + self.work.new_tokens as f64 / 2.0,
            reads_cache: true,
        }
    }

    /// The split for this many sequences of a group, and for prompts in micro-batches beside them.
    fn split_for(&self, machine: &Machine, layout: &Layout, sequences: u64, micro_batch: u64) -> Result<Split> {
        let work = self.work;
        let prompts = work.micro_batch.min(sequences.saturating_mul(work.prompt_tokens));
        let load = Load {
            tokens: prompts.max(micro_batch),
            targets: micro_batch,
            cached: sequences.saturating_mul(work.row_tokens()),
        };
        self.split(machine, layout, &self.decode_pass(micro_batch), load)
    }

    /// By time; where that does not fit, by bytes.
    fn split(&self, machine: &Machine, layout: &Layout, pass: &Pass, load: Load) -> Result<Split> {
        let layers: Vec<_> = self.weights.layers.iter().map(|layer| machine.layer(layer, pass)).collect();
        let head = machine.head(self.weights, pass);
        let times: Vec<_> = layers.iter().map(Cost::seconds).collect();
        let finish = |ranges: Vec<Range<usize>>| {
            let mut split = Split { stages: Vec::with_capacity(ranges.len()), costs: Vec::with_capacity(ranges.len()) };
            for (index, range) in (0..).zip(ranges) {
                let mut cost = Cost::default();
                layers[range.clone()].iter().for_each(|layer| cost.add(layer));
                if range.end == layers.len() {
                    cost.add(&head);
                }
                let node = layout.node_of(index);
                let mut stage = memory::stage(self.config, self.weights, layout, range, load, node);
                stage.seconds = cost.seconds();
                split.stages.push(stage);
                split.costs.push(cost);
            }
            split
        };
        let stages = layout.stages as usize;
        let by_time = finish(balance_layers(&times, 0.0, head.seconds(), stages)?);
        if stages == 1 || self.too_small(&by_time).is_none() {
            return Ok(by_time);
        }
        let tensor = u64::from(layout.tensor);
        let cache = load.cached.saturating_mul(memory::cache_bytes(self.config, layout.tensor)) as f64;
        let sizes = self.weights.layers.iter().map(|layer| layer.bytes(tensor) as f64 + cache).collect::<Vec<_>>();
        let ends = 2.0 / tensor as f64;
        let last = ends * self.weights.head as f64 + memory::head_bytes(self.config, layout, load) as f64;
        Ok(finish(balance_layers(&sizes, ends * self.weights.embedding as f64, last, stages)?))
    }

    fn too_small(&self, split: &Split) -> Option<String> {
        memory::too_small(&split.stages, self.cluster, self.assumptions)
    }

    /// Reading the prompts of a shard, in micro-batches that fill the pipeline.
    fn prompt_seconds(&self, machine: &Machine, layout: &Layout, split: &Split, rows: u64) -> f64 {
        let all = rows.saturating_mul(self.work.prompt_tokens);
        let tokens = self.work.micro_batch.min(all);
        let context = self.work.prompt_tokens as f64 / 2.0;
        let pass = Pass { tokens: tokens as f64, targets: 0.0, context, reads_cache: false };
        let cost = |stage: &Stage| {
            let mut cost = Cost::default();
            self.weights.layers[stage.layers.clone()].iter().for_each(|layer| cost.add(&machine.layer(layer, &pass)));
            cost
        };
        let (slowest, _) = slowest(&split.stages.iter().map(cost).collect::<Vec<_>>(), layout);
        let hop = (0..layout.stages).map(|stage| machine.hop(stage, &pass)).fold(0.0, f64::max);
        (all.div_ceil(tokens) as f64 + f64::from(layout.depth()) - 1.0) * slowest.max(hop)
    }

    /// Copies take whole shards; the cluster is paid until the last one is done.
    fn job(&self, layout: &Layout, shard_seconds: f64) -> Job {
        let shards = self.work.rows.div_ceil(self.work.shard_rows.min(self.work.rows));
        let seconds = shards.div_ceil(u64::from(layout.copies)) as f64 * shard_seconds;
        let gpu_hours = seconds / 3600.0 * self.cluster.total_gpus() as f64;
        Job { seconds, gpu_hours, cost: self.work.price_per_gpu_hour.map(|price| price * gpu_hours) }
    }
}

/// Of what can be at work at once, the one that takes longest, and what it spends that on.
fn slowest(costs: &[Cost], layout: &Layout) -> (f64, Bound) {
    let together = |costs: &[Cost]| {
        let mut sum = Cost::default();
        costs.iter().for_each(|cost| sum.add(cost));
        sum
    };
    let processes = costs.chunks(layout.in_turn.max(1) as usize).map(together);
    let slowest = processes.max_by(|a, b| a.seconds().total_cmp(&b.seconds()));
    slowest.map_or((0.0, Bound::Products), |cost| (cost.seconds(), cost.bound()))
}

/// What each hop carries while a group works at `tokens_per_second`, prompts included.
fn hops(machine: &Machine, layout: &Layout, tokens_per_second: f64) -> Vec<Hop> {
    let hop = |stage: u32| Hop {
        after_stage: stage,
        network: layout.leaves_node(stage),
        bytes_per_second: machine.hop_bytes() * tokens_per_second,
        limit_bytes_per_second: machine.hop_rate(stage),
    };
    (0..layout.stages.saturating_sub(1)).filter(|&stage| machine.leaves_process(stage)).map(hop).collect()
}
