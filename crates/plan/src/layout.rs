//! How a model may lie on the GPUs of a cluster.

use retort_model::Config;
use serde::Serialize;

use crate::Cluster;

/// Groups of other numbers of nodes are not looked at: no model that this crate knows needs them.
const GROUP_NODES: [u32; 16] = [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 48, 64];

/// Groups that leave GPUs of a node to others are looked at up to this many GPUs a node.
const MOST_PARTIAL_GPUS: u32 = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// retort's own: a pipeline whose processes hold contiguous layers, and spread them over their
    /// GPUs. A process has one micro-batch at work, so its GPUs take turns; one-byte weights are
    /// widened to bf16 before every product.
    Native,
    /// vLLM or SGLang behind its HTTP API: tensor parallel, pipelined, or both.
    Remote,
}

impl Engine {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Remote => "vLLM/SGLang",
        }
    }
}

/// `copies` groups, each with its layers in `stages` runs, each of these on `tensor` GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Layout {
    pub engine: Engine,
    pub stages: u32,
    pub tensor: u32,
    pub copies: u32,
    /// Runs of layers that one process holds, and works through in turn; 1 for a remote engine.
    pub in_turn: u32,
    /// Nodes that one group spans.
    pub nodes: u32,
    /// GPUs that one group has on each of its nodes.
    pub node_gpus: u32,
}

impl Layout {
    /// Every layout of this engine on part or all of the cluster, with as many copies as there is
    /// room for: those that leave no GPU idle first, and of these small groups first.
    pub fn all(engine: Engine, config: &Config, cluster: &Cluster) -> Vec<Self> {
        let sizes = (1..=cluster.gpus).filter(|&gpus| gpus <= MOST_PARTIAL_GPUS || gpus == cluster.gpus);
        let nodes = GROUP_NODES.into_iter().filter(|&nodes| nodes <= cluster.nodes);
        let mut groups: Vec<_> = nodes.flat_map(|nodes| sizes.clone().map(move |gpus| (nodes, gpus))).collect();
        let copies = |(nodes, gpus): (u32, u32)| (cluster.nodes / nodes) * (cluster.gpus / gpus);
        let idle = |(nodes, gpus): (u32, u32)| cluster.total_gpus() - u64::from(nodes * gpus * copies((nodes, gpus)));
        groups.sort_by_key(|&(nodes, gpus)| (idle((nodes, gpus)), nodes * gpus, nodes));
        let layouts = |group: (u32, u32)| Self::of_group(engine, config, group.0, group.1, copies(group));
        groups.into_iter().flat_map(layouts).collect()
    }

    /// The layouts of a group on `node_gpus` GPUs of each of `nodes` nodes.
    pub fn of_group(engine: Engine, config: &Config, nodes: u32, node_gpus: u32, copies: u32) -> Vec<Self> {
        let group = nodes * node_gpus;
        // Inside a node, or over whole nodes: a tensor-parallel set that straddles is never taken.
        let whole = |tensor: u32| node_gpus.is_multiple_of(tensor) || tensor.is_multiple_of(node_gpus);
        let cut = |tensor: u32| {
            let [heads, keys, inner] =
                [config.num_attention_heads, config.num_key_value_heads, config.intermediate_size]
                    .map(i64::unsigned_abs);
            let tensor = u64::from(tensor);
            heads.is_multiple_of(tensor)
                && inner.is_multiple_of(tensor)
                && (keys.is_multiple_of(tensor) || tensor.is_multiple_of(keys))
        };
        let layout =
            |tensor, in_turn| Self { engine, stages: group / tensor, tensor, copies, in_turn, nodes, node_gpus };
        let layouts: Vec<_> = match engine {
            Engine::Native if node_gpus == 1 => vec![layout(1, 1)],
            Engine::Native => vec![layout(1, 1), layout(1, node_gpus)],
            Engine::Remote => {
                let tensors =
                    (1..=group).filter(|&tensor| group.is_multiple_of(tensor) && whole(tensor) && cut(tensor));
                tensors.map(|tensor| layout(tensor, 1)).collect()
            }
        };
        layouts.into_iter().filter(|layout| i64::from(layout.stages) <= config.num_hidden_layers).collect()
    }

    pub fn group_gpus(&self) -> u32 {
        self.stages * self.tensor
    }

    /// Micro-batches that can be at work at once: natively, processes.
    pub fn depth(&self) -> u32 {
        self.stages / self.in_turn
    }

    /// The node, counted inside the group, on which this stage starts.
    pub fn node_of(&self, stage: u32) -> u32 {
        stage * self.tensor / self.node_gpus
    }

    /// Whether what this stage sends crosses the network.
    pub fn leaves_node(&self, stage: u32) -> bool {
        self.nodes > 1 && ((stage + 1) * self.tensor).is_multiple_of(self.node_gpus)
    }

    /// Nodes over which one stage is spread.
    pub fn stage_nodes(&self) -> u32 {
        (self.tensor / self.node_gpus).max(1)
    }

    /// Whether both are of one kind, so that only the faster one is of interest.
    pub fn is_like(&self, other: &Self) -> bool {
        (self.engine, self.tensor, self.in_turn > 1) == (other.engine, other.tensor, other.in_turn > 1)
    }

    /// `16 processes x 1 GPU`, `TP 8 x PP 2`.
    pub fn describe(&self) -> String {
        match (self.engine, self.stages, self.tensor) {
            (Engine::Native, 1, _) => "1 process x 1 GPU".to_owned(),
            (Engine::Native, stages, _) if self.in_turn == 1 => format!("{stages} processes x 1 GPU"),
            (Engine::Native, ..) if self.depth() == 1 => format!("1 process x {} GPUs in turn", self.in_turn),
            (Engine::Native, ..) => format!("{} processes x {} GPUs in turn", self.depth(), self.in_turn),
            (Engine::Remote, 1, tensor) => format!("TP {tensor}"),
            (Engine::Remote, stages, 1) => format!("PP {stages}"),
            (Engine::Remote, stages, tensor) => format!("TP {tensor} x PP {stages}"),
        }
    }
}
