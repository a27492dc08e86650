//! How long a micro-batch takes in a layer, in the head, and on a link.
//!
//! A product takes as long as the slower of its arithmetic and the reading of its weights;
//! attention, of its arithmetic and the reading of keys and values; then come the all-reduces of a
//! tensor-parallel layer. Nothing of these overlaps, so the sum is from above.

use retort_model::{Config, TokenFlops, token_flops};

use crate::{Assumptions, Cluster, Engine, Layout, Weights, memory::cache_bytes, outcome::Bound, weights::Layer};

/// Times that the logits of a position are gone over after the head, 4 bytes each: maximum, sum, choice.
const LOGIT_PASSES: f64 = 4.0;

/// One micro-batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pass {
    pub tokens: f64,
    /// Of these, positions whose logits are wanted.
    pub targets: f64,
    /// Positions that a token attends to, on average.
    pub context: f64,
    /// Whether each token reads its own keys and values from the cache, as in generating.
    pub reads_cache: bool,
}

/// Seconds, by what they are spent on.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cost {
    pub products: f64,
    pub weights: f64,
    pub cache: f64,
    pub reduce: f64,
}

impl Cost {
    pub fn seconds(&self) -> f64 {
        self.products + self.weights + self.cache + self.reduce
    }

    pub fn bound(&self) -> Bound {
        let parts = [
            (self.products, Bound::Products),
            (self.weights, Bound::ReadingWeights),
            (self.cache, Bound::ReadingCache),
            (self.reduce, Bound::AllReduce),
        ];
        parts.into_iter().max_by(|a, b| a.0.total_cmp(&b.0)).map_or(Bound::Products, |(_, bound)| bound)
    }

    pub fn add(&mut self, other: &Self) {
        self.products += other.products;
        self.weights += other.weights;
        self.cache += other.cache;
        self.reduce += other.reduce;
    }

    /// The slower of arithmetic and reading, booked on that one.
    fn slower(products: f64, weights: f64) -> Self {
        if products >= weights { Self { products, ..Self::default() } } else { Self { weights, ..Self::default() } }
    }
}

/// The rates at which one layout works.
pub(crate) struct Machine<'a> {
    config: &'a Config,
    layout: &'a Layout,
    assumptions: &'a Assumptions,
    cluster: &'a Cluster,
    tensor: f64,
    wide_flops: f64,
    narrow_flops: f64,
    bandwidth: f64,
}

impl<'a> Machine<'a> {
    /// `fp8` says whether one-byte weights are of a kind that the GPU multiplies by itself.
    pub fn new(
        config: &'a Config,
        cluster: &'a Cluster,
        assumptions: &'a Assumptions,
        layout: &'a Layout,
        fp8: bool,
    ) -> Self {
        let gpu = &cluster.gpu;
        let wide_flops = assumptions.measured_flops.unwrap_or(gpu.bf16_flops * assumptions.compute_efficiency);
        let faster = match (layout.engine, fp8, gpu.fp8_flops) {
            (Engine::Remote, true, Some(flops)) => flops / gpu.bf16_flops,
            _ => 1.0,
        };
        Self {
            config,
            layout,
            assumptions,
            cluster,
            tensor: f64::from(layout.tensor),
            wide_flops,
            narrow_flops: wide_flops * faster,
            bandwidth: gpu.memory_bandwidth * assumptions.bandwidth_efficiency,
        }
    }

    pub fn layer(&self, layer: &Layer, pass: &Pass) -> Cost {
        let [wide, narrow] = [layer.wide, layer.narrow].map(|numbers| numbers as f64 / self.tensor);
        let mut cost = Cost::slower(2.0 * wide * pass.tokens / self.wide_flops, 2.0 * wide / self.bandwidth);
        let products = 2.0 * narrow * pass.tokens / self.narrow_flops;
        match self.layout.engine {
            // Widened first: a byte is read and two are written, and then two are read.
            Engine::Native => {
                cost.add(&Cost::slower(products, 2.0 * narrow / self.bandwidth));
                cost.weights += 3.0 * narrow / self.bandwidth;
            }
            Engine::Remote => cost.add(&Cost::slower(products, narrow / self.bandwidth)),
        }
        let flops = self.flops(pass).layer_attention * pass.tokens / self.tensor / self.wide_flops;
        let positions = if pass.reads_cache { pass.tokens * pass.context } else { 0.0 };
        let read = positions * cache_bytes(self.config, self.layout.tensor) as f64 / self.bandwidth;
        if flops >= read {
            cost.products += flops;
        } else {
            cost.cache += read;
        }
        cost.reduce = 2.0 * self.all_reduce(pass.tokens * self.hop_bytes());
        cost
    }

    /// Head, and what is done with its logits.
    pub fn head(&self, weights: &Weights, pass: &Pass) -> Cost {
        if pass.targets == 0.0 {
            return Cost::default();
        }
        let arithmetic = self.flops(pass).head * pass.targets / self.tensor / self.wide_flops;
        let mut cost = Cost::slower(arithmetic, 2.0 * weights.head as f64 / self.tensor / self.bandwidth);
        let logits = pass.targets * self.config.vocab_size as f64 / self.tensor;
        cost.products += LOGIT_PASSES * 4.0 * logits / self.bandwidth;
        cost
    }

    /// What the hop after this stage takes for one micro-batch; after the last one, for the tokens
    /// that go back to the first.
    pub fn hop(&self, stage: u32, pass: &Pass) -> f64 {
        if self.layout.stages == 1 {
            return 0.0;
        }
        if stage + 1 == self.layout.stages {
            return self.latency(self.layout.nodes > 1);
        }
        self.latency(self.layout.leaves_node(stage)) + pass.tokens * self.hop_bytes() / self.hop_rate(stage)
    }

    /// Bytes a second that the hop after this stage carries in practice.
    pub fn hop_rate(&self, stage: u32) -> f64 {
        let link = self.link(self.layout.leaves_node(stage));
        match self.layout.engine {
            Engine::Native if self.leaves_process(stage) => link.min(self.assumptions.hop_bandwidth),
            _ => link,
        }
    }

    /// Whether what this stage sends goes to another process, or to another stage's GPUs.
    pub fn leaves_process(&self, stage: u32) -> bool {
        (stage + 1).is_multiple_of(self.layout.in_turn)
    }

    /// Bytes a second that a link carries in practice.
    fn link(&self, network: bool) -> f64 {
        let rate = if network { self.cluster.gpu.network } else { self.cluster.gpu.node_link };
        rate * self.assumptions.link_efficiency
    }

    /// A hidden state, bf16.
    pub fn hop_bytes(&self) -> f64 {
        2.0 * self.config.hidden_size as f64
    }

    /// Rings: inside each node first, then over the network, where every GPU carries its share.
    fn all_reduce(&self, bytes: f64) -> f64 {
        if self.layout.tensor == 1 {
            return 0.0;
        }
        let nodes = f64::from(self.layout.stage_nodes());
        let inside = self.tensor / nodes;
        let mut seconds = 0.0;
        if inside > 1.0 {
            seconds += 2.0 * (inside - 1.0) / inside * bytes / self.link(false) + self.latency(false);
        }
        if nodes > 1.0 {
            seconds += 2.0 * (nodes - 1.0) / nodes * (bytes / inside) / self.link(true) + self.latency(true);
        }
        seconds
    }

    fn latency(&self, network: bool) -> f64 {
        if network { self.assumptions.network_latency } else { self.assumptions.node_latency }
    }

    fn flops(&self, pass: &Pass) -> TokenFlops {
        token_flops(self.config, pass.context)
    }
}
