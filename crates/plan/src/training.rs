//! What a student's worker holds in memory while it trains: weights and what the optimiser keeps of them exactly,
//! what lives for a micro-batch from its shapes, the program itself as it was measured.
//!
//! The most is held when a micro-batch has gone forward and comes back: all that its backward pass needs, beside
//! what is always there. `docs/planning.md` has the equations, and how far they were off.

use retort_core::spec::{Lora, LoraBase, LoraTarget, Train};
use retort_model::Config;
use serde::{Deserialize, Serialize};

/// Bytes of either working array of the head's loss, and bounds of the positions in it: those of the student's loss.
const HEAD_BYTES: u64 = 128 << 20;
const HEAD_POSITIONS: (u64, u64) = (16, 2048);
/// libtorch's code and workspaces, rows read ahead, and the rest of the program: as measured on a CPU.
const PROGRAM_BYTES: u64 = 200_000_000;

/// Where a student trains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Device {
    Cpu,
    Gpu,
}

/// What its body and head compute in; moments and what is summed up are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    F32,
    Bf16,
}

/// Sizes of a job's training.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Training {
    /// Rows of an optimiser step.
    pub batch_rows: u32,
    /// As the spec says; none where it is chosen for the device.
    pub micro_batch_tokens: Option<u32>,
    /// Numbers that train: of a student with adapters, theirs alone.
    pub trained_parameters: u64,
    /// Blocks are computed twice and only their inputs kept.
    pub checkpoints_activations: bool,
    /// A CPU in f32 and a GPU in bf16, as workers choose where nobody says otherwise.
    pub places: Vec<Place>,
}

/// What is chosen on a device, and what that takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    pub device: Device,
    pub dtype: Dtype,
    /// Most tokens that go through the student at a time.
    pub micro_batch_tokens: u32,
    /// Target positions whose logits lie in memory at a time.
    pub head_positions: u32,
    pub memory: Memory,
}

/// Bytes of one worker. On a GPU these are the device's, but for `checkpoint_copy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    pub weights: u64,
    pub gradients: u64,
    /// Two moments; masters of weights that are not f32; the running average.
    pub optimizer: u64,
    /// What is kept for other workers.
    pub exchange: u64,
    /// The loss's working arrays.
    pub head: u64,
    /// Of a micro-batch, all that happens in the blocks kept.
    pub activations: u64,
    /// Of a micro-batch, only the blocks' inputs kept.
    pub activations_checkpointed: u64,
    pub program: u64,
    /// All of these, with the activations that the spec asks for.
    pub total: u64,
    /// Besides, in the machine's memory while a checkpoint is written.
    pub checkpoint_copy: u64,
}

impl Device {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Gpu => "gpu",
        }
    }
}

impl Dtype {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }

    fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// A student that is to train.
#[derive(Clone, Copy, Debug)]
pub struct Student<'a> {
    pub config: &'a Config,
    pub lora: Option<&'a Lora>,
    pub train: &'a Train,
    /// Tokens of its longest row, at most.
    pub longest_row: u64,
}

impl Student<'_> {
    pub fn training(&self) -> Training {
        Training {
            batch_rows: self.train.batch_rows,
            micro_batch_tokens: self.train.micro_batch_tokens,
            trained_parameters: Numbers::of(self).trained,
            checkpoints_activations: self.checkpoints_activations(),
            places: vec![self.on(Device::Cpu, Dtype::F32), self.on(Device::Gpu, Dtype::Bf16)],
        }
    }

    pub fn on(&self, device: Device, dtype: Dtype) -> Place {
        let micro_batch_tokens = self.train.micro_batch_tokens.unwrap_or(match device {
            Device::Cpu => Train::MICRO_BATCH_TOKENS_CPU,
            Device::Gpu => Train::MICRO_BATCH_TOKENS_GPU,
        });
        let numbers = Numbers::of(self);
        let head_positions = head_positions(numbers.vocab, device, dtype);
        let step_tokens = self.longest_row.saturating_mul(self.train.batch_rows.into());
        // A row longer than a micro-batch goes alone.
        let tokens = self.longest_row.max(step_tokens.min(micro_batch_tokens.into()));
        let memory = self.memory(&numbers, tokens, (device, dtype));
        Place { device, dtype, micro_batch_tokens, head_positions: head_positions as u32, memory }
    }

    /// With a base in bytes they always are: no two blocks are wide at a time.
    fn checkpoints_activations(&self) -> bool {
        self.train.activation_checkpointing || self.is_narrow()
    }

    fn is_narrow(&self) -> bool {
        self.lora.is_some_and(|lora| lora.base == LoraBase::Int8)
    }

    fn memory(&self, numbers: &Numbers, tokens: u64, (device, dtype): (Device, Dtype)) -> Memory {
        let wide = dtype.bytes();
        let is_f32 = dtype == Dtype::F32;
        let trained = numbers.trained;
        let adapted = if self.lora.is_some() { trained } else { 0 };
        // In bytes: one a number, and an f32 scale a row.
        let projections = if self.is_narrow() {
            numbers.projections + 4 * numbers.projection_rows
        } else {
            wide * numbers.projections
        };
        let weights = projections + wide * (numbers.all - numbers.projections + adapted);
        // Those of another kind than f32 that autograd computes are computed in it, and summed up in f32.
        let gradients = if is_f32 { 4 * trained } else { 4 * trained + wide * (trained - numbers.apart) };
        let masters = if is_f32 { 0 } else { 4 * trained };
        let average = if self.train.ema_decay > 0.0 { 4 * trained } else { 0 };
        let optimizer = 8 * trained + masters + average;
        let exchange = match (self.train.diloco(), self.train.workers()) {
            // The outer optimiser's velocity, and the weights that a round began with.
            (Some(_), _) => 8 * trained,
            (None, ..=1) => 0,
            // Weights on their way out, and a gradient from each of the others.
            (None, workers) => 4 * trained * u64::from(workers),
        };
        let head = numbers.vocab * head_bytes(numbers.vocab, device, dtype);
        let activations = Activations::of(self, numbers, wide, device);
        let kept = activations.kept(numbers, tokens);
        let checkpointed = activations.checkpointed(numbers, tokens);
        let of_spec = if self.checkpoints_activations() { checkpointed } else { kept };
        let moments = 8 * trained + average + if is_f32 && average == 0 { 0 } else { 4 * trained };
        let outer = if self.train.diloco().is_some() { 4 * trained } else { 0 };
        Memory {
            weights,
            gradients,
            optimizer,
            exchange,
            head,
            activations: kept,
            activations_checkpointed: checkpointed,
            program: PROGRAM_BYTES,
            total: weights + gradients + optimizer + exchange + head + of_spec + PROGRAM_BYTES,
            checkpoint_copy: wide * numbers.all + moments + outer,
        }
    }
}

/// Target positions whose logits over `vocab` tokens lie in memory at a time, in training. On a CPU they are turned into
/// their gradient where they lie; elsewhere f32 stands beside them, as it does in judging.
pub fn head_positions(vocab: u64, device: Device, dtype: Dtype) -> u64 {
    let bytes = if device == Device::Cpu { dtype.bytes() } else { 4 };
    (HEAD_BYTES / (bytes * vocab.max(1))).clamp(HEAD_POSITIONS.0, HEAD_POSITIONS.1)
}

/// What the head's loss holds for each token of the vocabulary: logits of the positions in training, log-probabilities in
/// f32 of those in judging. On a GPU logits and gradients of another kind are also there in f32, one after another.
fn head_bytes(vocab: u64, device: Device, dtype: Dtype) -> u64 {
    let judged = head_positions(vocab, device, Dtype::F32);
    match (device, dtype) {
        (Device::Gpu, Dtype::Bf16) => judged * (4 + 4 + 2 * dtype.bytes()),
        _ => judged * 4 + head_positions(vocab, device, dtype) * dtype.bytes(),
    }
}

/// How many numbers a student has of each kind.
#[derive(Clone, Copy, Debug)]
struct Numbers {
    layers: u64,
    hidden: u64,
    inner: u64,
    /// Of all query heads.
    queries: u64,
    /// Of all key heads.
    keys: u64,
    vocab: u64,
    all: u64,
    trained: u64,
    /// In matrices of blocks, and rows of these.
    projections: u64,
    projection_rows: u64,
    /// Of embedding and head where they train: their gradients are not autograd's.
    apart: u64,
}

impl Numbers {
    fn of(student: &Student) -> Self {
        let config = student.config;
        let [hidden, inner, queries, keys, vocab, layers] = [
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
            config.vocab_size,
            config.num_hidden_layers,
        ]
        .map(i64::unsigned_abs);
        let shapes = LoraTarget::ALL.map(|target| shape(config, target));
        let embeddings = vocab * hidden * if config.tie_word_embeddings { 1 } else { 2 };
        let all = config.parameters();
        let frozen = student.train.freeze_embeddings;
        let trained = match student.lora {
            Some(lora) => adapters(config, lora),
            None => all - if frozen { embeddings } else { 0 },
        };
        Self {
            layers,
            hidden,
            inner,
            queries,
            keys,
            vocab,
            all,
            trained,
            projections: layers * shapes.iter().map(|[outputs, inputs]| outputs * inputs).sum::<u64>(),
            projection_rows: layers * shapes.iter().map(|[outputs, _]| outputs).sum::<u64>(),
            apart: if student.lora.is_none() && !frozen { embeddings } else { 0 },
        }
    }
}

/// Outputs and inputs of a projection.
fn shape(config: &Config, target: LoraTarget) -> [u64; 2] {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let queries = config.num_attention_heads * config.head_dim;
    let keys = config.num_key_value_heads * config.head_dim;
    let shape = match target {
        LoraTarget::QProj => [queries, hidden],
        LoraTarget::KProj | LoraTarget::VProj => [keys, hidden],
        LoraTarget::OProj => [hidden, queries],
        LoraTarget::GateProj | LoraTarget::UpProj => [inner, hidden],
        LoraTarget::DownProj => [hidden, inner],
    };
    shape.map(i64::unsigned_abs)
}

/// Numbers of `A` and `B` over all layers.
fn adapters(config: &Config, lora: &Lora) -> u64 {
    let of_layer = lora.targets.iter().map(|&target| shape(config, target).iter().sum::<u64>()).sum::<u64>();
    config.num_hidden_layers.unsigned_abs() * of_layer * u64::from(lora.rank)
}

/// Bytes a token of a micro-batch.
struct Activations {
    /// What the backward pass of one block needs.
    block: u64,
    /// What comes and goes while a block is computed back.
    passing: u64,
    /// The last norm, the targets' hidden states and their gradient.
    end: u64,
    /// A block's input.
    input: u64,
    /// Not a token's: a block's widened matrices.
    widened: u64,
}

impl Activations {
    fn of(student: &Student, numbers: &Numbers, wide: u64, device: Device) -> Self {
        let &Numbers { hidden, inner, queries, keys, .. } = numbers;
        let trained = u64::from(student.lora.is_none());
        let plain = match device {
            // The block's input, its middle, and what either half begins with; queries, keys and values, and what comes
            // of them; of the feed-forward block gate, its activation, up, and their product.
            Device::Cpu => wide * (4 * hidden + 2 * (queries + keys) + 4 * inner),
            // All is autograd's. A norm keeps its input in f32, what goes into the products after it, and what it is
            // scaled to where its weight trains; attention keys and values of each query head.
            Device::Gpu => 2 * hidden * (4 + (1 + trained) * wide) + wide * 4 * (queries + inner),
        };
        let block = plain
            + match student.lora {
                None => 0,
                // Of an adapter its inner numbers, and its masked input.
                Some(lora) => {
                    let masked = if lora.dropout > 0.0 { 1 + wide } else { 0 };
                    let of_target = |target: &LoraTarget| {
                        let inputs = match target {
                            LoraTarget::OProj => queries,
                            LoraTarget::DownProj => inner,
                            _ => hidden,
                        };
                        wide * u64::from(lora.rank) + masked * inputs
                    };
                    lora.targets.iter().map(of_target).sum::<u64>()
                }
            };
        Self {
            block,
            passing: wide * (3 * inner + 2 * hidden),
            end: hidden * (4 + 2 * wide) + 4 * wide * hidden,
            input: wide * hidden,
            widened: if student.is_narrow() { wide * numbers.projections / numbers.layers.max(1) } else { 0 },
        }
    }

    fn kept(&self, numbers: &Numbers, tokens: u64) -> u64 {
        let a_token = numbers.layers * self.block + self.passing + self.end;
        tokens * a_token + numbers.layers * self.widened
    }

    fn checkpointed(&self, numbers: &Numbers, tokens: u64) -> u64 {
        let a_token = (numbers.layers + 1) * self.input + self.block + self.passing + self.end;
        tokens * a_token + self.widened
    }
}

#[cfg(test)]
mod tests;
