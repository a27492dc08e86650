//! A part on the CPU, in f32, on [`retort_kernels`]: weights are read where they are mapped, and a
//! position's numbers are the same bits in any company.
//!
//! A layer is two passes over the packed tokens: one row by row (output projection and feed-forward of
//! the layer before, then norm, projections and rotation of this one), over blocks of rows small enough
//! for the second-level cache; and attention, over blocks of queries. Threads share out the blocks; where
//! rows are few, and for the head, they share out the weights.
//!
//! Shapes: n packed tokens, and the letters of the crate.

use std::path::Path;

use rayon::prelude::*;
use retort_kernels::{Asked, Into, Kept, Matrix, POSITIONS, Panels, Scratch, Storage, rms_norm, rotate, swiglu};

use super::{Keep, Part, Piece, Room, Share, check, check_share};
use crate::{Config, Error, Result, rope::Frequencies, weights::Folder};

/// Rows of a block: their hidden states and what the feed-forward makes of them stay in the
/// second-level cache.
const ROWS: usize = 96;
/// Up to so many rows a thread are one block for all threads, which share out the weights instead: each reads
/// only its own.
const FEW_ROWS: usize = 8;
/// Rows whose logits are held together, a thread.
const HEAD_ROWS: usize = 48;

/// A part whose weights are mapped.
pub struct HostPart {
    config: Config,
    part: Part,
    embedding_vh: Option<Matrix>,
    layers: Vec<Layer>,
    norm_h: Vec<f32>,
    head_vh: Option<Matrix>,
    frequencies: Frequencies,
    threads: rayon::ThreadPool,
    room: Room,
    bytes_read: u64,
    between: Between,
}

/// What the two passes of a layer hand each other, for all tokens of a step: kept for the next step.
#[derive(Default)]
struct Between {
    query: Vec<f32>,
    key: Vec<f32>,
    value: Vec<f32>,
    mixed: Vec<f32>,
}

struct Layer {
    input_norm_h: Vec<f32>,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    post_norm_h: Vec<f32>,
    gate: Linear,
    up: Linear,
    down: Linear,
    /// Keys and values of each lane's slots, `[capacity, k * d]` each.
    lanes: Vec<Vec<Slot>>,
}

struct Linear {
    weight: Matrix,
    bias: Option<Vec<f32>>,
}

#[derive(Default)]
struct Slot {
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// Cosine and sine of the positions of a step, `[n, d / 2]` each.
struct Angles {
    cos: Vec<f32>,
    sin: Vec<f32>,
}

/// What one block of rows needs besides its own: used again for the next block.
struct Rows {
    /// The only block, for which all threads work.
    alone: bool,
    normed: Vec<f32>,
    panels: Panels,
    gate: Vec<f32>,
    up: Vec<f32>,
}

impl Rows {
    fn new(alone: bool) -> Self {
        Self { alone, normed: Vec::new(), panels: Panels::default(), gate: Vec::new(), up: Vec::new() }
    }
}

impl HostPart {
    /// Maps the part's tensors and touches no others. `threads` is how many cores it computes on; all of
    /// them when `None`.
    pub fn load(dir: &Path, part: Part, keep: Keep, threads: Option<usize>) -> Result<Self> {
        let config = Config::from_dir(dir)?;
        let folder = Folder::open(dir)?;
        let table = part.tensors(&config);
        folder.require(&table)?;
        let bytes_read =
            table.iter().filter_map(|(name, _)| folder.get(name)).map(|(_, bytes)| bytes.len() as u64).sum();
        let has = |name: &str| table.iter().any(|(of, _)| of == name);
        let vector = |name: String| -> Result<Option<Vec<f32>>> {
            if !has(&name) {
                return Ok(None);
            }
            let matrix = folder.matrix(&name)?;
            let mut numbers = vec![0.0; matrix.columns()];
            matrix.read_row(0, &mut numbers);
            Ok(Some(numbers))
        };
        let missing = |name: &str| Error::Invalid(format!("no tensor {name:?}"));
        let needed = |name: String| vector(name.clone())?.ok_or_else(|| missing(&name));
        let kept = |name: &str| {
            let stored = folder.matrix(name)?;
            let kept = match (keep, stored.storage()) {
                // Narrow already: what the checkpoint says is not rounded once more.
                (Keep::Stored, _) | (_, Storage::Int8 { .. } | Storage::F8E4m3 { .. }) => Ok(stored),
                (Keep::Bf16, Storage::Bf16 | Storage::F16) => Ok(stored),
                (Keep::Bf16, Storage::F32) => Ok(stored.to_bf16()),
                (Keep::Int8, _) => stored.to_int8(),
                (Keep::F8E4m3, _) => stored.to_f8_e4m3(),
            };
            kept.map_err(|row| {
                let reason = format!("row {row} of tensor {name:?} holds a number that is not finite");
                Error::malformed(folder.place(), reason)
            })
        };
        let layer = |layer: usize| {
            let linear = |name: &str| {
                let name = format!("model.layers.{layer}.{name}");
                Ok::<_, Error>(Linear {
                    weight: kept(&format!("{name}.weight"))?,
                    bias: vector(format!("{name}.bias"))?,
                })
            };
            Ok(Layer {
                input_norm_h: needed(format!("model.layers.{layer}.input_layernorm.weight"))?,
                query: linear("self_attn.q_proj")?,
                key: linear("self_attn.k_proj")?,
                value: linear("self_attn.v_proj")?,
                output: linear("self_attn.o_proj")?,
                post_norm_h: needed(format!("model.layers.{layer}.post_attention_layernorm.weight"))?,
                gate: linear("mlp.gate_proj")?,
                up: linear("mlp.up_proj")?,
                down: linear("mlp.down_proj")?,
                lanes: Vec::new(),
            })
        };
        let layers = part.layers.clone().map(layer).collect::<Result<_>>()?;
        // Embedding and head stay as they are stored: the head's rounding would be in every target.
        let embedding_vh = if part.embeds { Some(folder.matrix(EMBEDDING)?) } else { None };
        let head = if config.tie_word_embeddings { EMBEDDING } else { "lm_head.weight" };
        let head_vh = if part.heads { Some(folder.matrix(head)?) } else { None };
        let norm_h = if part.heads { needed("model.norm.weight".to_owned())? } else { Vec::new() };
        let frequencies = Frequencies::new(&config);
        let threads = rayon::ThreadPoolBuilder::new()
            .num_threads(threads.unwrap_or(0))
            .thread_name(|index| format!("arithmetic-{index}"))
            .build()
            .map_err(|error| Error::Device(format!("cannot start threads for arithmetic: {error}")))?;
        let room = Room { lanes: 0, slots: 0, capacity: 0 };
        Ok(Self {
            config,
            part,
            embedding_vh,
            layers,
            norm_h,
            head_vh,
            frequencies,
            threads,
            room,
            bytes_read,
            between: Between::default(),
        })
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    pub fn part(&self) -> &Part {
        &self.part
    }

    /// Bytes of the tensors that it maps.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read
    }

    /// Forgets all slots and makes room for others. Memory is taken as slots fill.
    pub fn reset(&mut self, room: Room) {
        for layer in &mut self.layers {
            let lane = |_| (0..room.slots).map(|_| Slot::default()).collect();
            layer.lanes = (0..room.lanes).map(lane).collect();
        }
        self.room = room;
    }

    pub fn share(&mut self, lane: u32, share: &Share) -> Result<()> {
        check_share(&self.room, lane, share)?;
        let numbers = share.positions as usize * self.width();
        for layer in &mut self.layers {
            let slots = &mut layer.lanes[lane as usize];
            let from = &slots[share.from as usize];
            let (Some(keys), Some(values)) = (from.keys.get(..numbers), from.values.get(..numbers)) else {
                return Err(Error::Invalid(format!("{share:?}: slot {} holds fewer positions", share.from)));
            };
            let copy = Slot { keys: keys.to_vec(), values: values.to_vec() };
            slots[share.to as usize] = copy;
        }
        Ok(())
    }

    /// Hidden states `[n, h]` of token ids.
    pub fn embed(&self, token_ids: &[u32]) -> Result<Vec<f32>> {
        let Some(embedding_vh) = &self.embedding_vh else {
            return Err(Error::Invalid("this part of the model has no embedding".into()));
        };
        let (vocabulary, width) = (embedding_vh.rows(), embedding_vh.columns());
        let mut hidden_nh = vec![0.0; token_ids.len() * width];
        for (&id, row) in token_ids.iter().zip(hidden_nh.chunks_exact_mut(width)) {
            if id as usize >= vocabulary {
                return Err(Error::Invalid(format!("token id {id} is outside the model's vocabulary of {vocabulary}")));
            }
            embedding_vh.read_row(id as usize, row);
        }
        Ok(hidden_nh)
    }

    /// `[n, h]` through the layers, the pieces' tokens one after another.
    pub fn forward(&mut self, lane: u32, hidden_nh: &mut [f32], pieces: &[Piece]) -> Result<()> {
        let tokens = check(&self.config, &self.room, lane, pieces)?;
        let config = &self.config;
        let (h, d) = (config.hidden_size as usize, config.head_dim as usize);
        if hidden_nh.len() != tokens * h {
            return Err(Error::Invalid(format!("{} hidden numbers for {tokens} tokens of {h}", hidden_nh.len())));
        }
        let widths = Widths { q: config.num_attention_heads as usize * d, k: self.width() };
        let slot_lengths_fit = |layer: &Layer| {
            pieces.iter().all(|piece| {
                let slots = piece.slot.and_then(|slot| layer.lanes.get(lane as usize)?.get(slot as usize));
                slots.is_none_or(|slot| slot.keys.len() >= piece.start as usize * widths.k)
            })
        };
        if !self.layers.first().is_none_or(slot_lengths_fit) {
            return Err(Error::Invalid("a piece goes on where its slot holds fewer positions".into()));
        }
        let epsilon = config.rms_norm_eps as f32;
        let angles = self.frequencies.angles(pieces);
        let window = config.sliding_window.map(|window| window as usize);
        let mut between = std::mem::take(&mut self.between);
        let Between { query, key, value, mixed } = &mut between;
        for (numbers, width) in [(&mut *query, widths.q), (key, widths.k), (value, widths.k), (mixed, widths.q)] {
            numbers.resize(tokens * width, 0.0);
        }
        let threads = self.threads.current_num_threads();
        let few = tokens <= (FEW_ROWS * threads).min(ROWS);
        let rows = if few { tokens } else { tokens.div_ceil(threads).min(ROWS) };
        self.threads.install(|| {
            for at in 0..self.layers.len() {
                let (before, rest) = self.layers.split_at_mut(at);
                let (before, layer) = (before.last(), &mut rest[0]);
                hidden_nh
                    .par_chunks_mut(rows * h)
                    .zip(query.par_chunks_mut(rows * widths.q))
                    .zip(key.par_chunks_mut(rows * widths.k))
                    .zip(value.par_chunks_mut(rows * widths.k))
                    .zip(mixed.par_chunks(rows * widths.q))
                    .enumerate()
                    .for_each_init(
                        || Rows::new(few),
                        |scratch, (block, ((((hidden, query), key), value), mixed))| {
                            if let Some(before) = before {
                                before.after_attention(scratch, hidden, mixed, epsilon);
                            }
                            layer.before_attention(scratch, hidden, (query, key, value), epsilon);
                            let angles = angles.rows(block * rows, hidden.len() / h, d / 2);
                            for ((query, key), (cos, sin)) in
                                query.chunks_exact_mut(widths.q).zip(key.chunks_exact_mut(widths.k)).zip(angles)
                            {
                                rotate(query, cos, sin);
                                rotate(key, cos, sin);
                            }
                        },
                    );
                layer.keep(lane, pieces, widths.k, key, value);
                layer.attend(lane, pieces, &widths, d, window, (query, key, value), mixed);
            }
            let Some(last) = self.layers.last() else { return };
            hidden_nh.par_chunks_mut(rows * h).zip(mixed.par_chunks(rows * widths.q)).for_each_init(
                || Rows::new(few),
                |scratch, (hidden, mixed)| {
                    last.after_attention(scratch, hidden, mixed, epsilon);
                },
            );
        });
        self.between = between;
        Ok(())
    }

    /// Logits of the rows `at` of `hidden_nh` after the last layer: each row's goes to `take`, with its
    /// index in `at`, and is gone afterwards. Answers in the order of `at`.
    pub fn head<T: Send>(
        &self,
        hidden_nh: &[f32],
        at: &[usize],
        take: impl Fn(usize, &[f32]) -> T + Sync,
    ) -> Result<Vec<T>> {
        let Some(head_vh) = &self.head_vh else {
            return Err(Error::Invalid("this part of the model has no head".into()));
        };
        let (h, v) = (head_vh.columns(), head_vh.rows());
        if let Some(&beyond) = at.iter().find(|&&at| (at + 1) * h > hidden_nh.len()) {
            return Err(Error::Invalid(format!("row {beyond} of {} hidden states", hidden_nh.len() / h)));
        }
        let epsilon = self.config.rms_norm_eps as f32;
        let rows = HEAD_ROWS * self.threads.current_num_threads();
        let (mut hidden, mut normed, mut logits) = (Vec::new(), Vec::new(), Vec::new());
        let mut panels = Panels::default();
        // A vocabulary is often a multiple of a large power of two: rows that far apart would all fall on the
        // same few lines of the cache.
        let stride = v + 16;
        let mut block = |(block, at): (usize, &[usize])| -> Vec<T> {
            hidden.clear();
            at.iter().for_each(|&at| hidden.extend_from_slice(&hidden_nh[at * h..(at + 1) * h]));
            normed.resize(hidden.len(), 0.0);
            rms_norm(&hidden, &self.norm_h, epsilon, &mut normed);
            logits.resize(at.len() * stride, 0.0);
            panels.pack(&normed, h, at.len(), h);
            panels.product_shared(head_vh, None, Into::Store, &mut logits, stride);
            let each = logits[..at.len() * stride].par_chunks_exact(stride).enumerate();
            each.map(|(row, logits)| take(block * rows + row, &logits[..v])).collect()
        };
        Ok(self.threads.install(|| at.chunks(rows).enumerate().flat_map(&mut block).collect()))
    }

    /// Numbers of one position's keys.
    fn width(&self) -> usize {
        self.config.num_key_value_heads as usize * self.config.head_dim as usize
    }
}

#[derive(Clone, Copy)]
struct Widths {
    q: usize,
    k: usize,
}

impl Layer {
    fn before_attention(
        &self,
        scratch: &mut Rows,
        hidden: &[f32],
        (query, key, value): (&mut [f32], &mut [f32], &mut [f32]),
        epsilon: f32,
    ) {
        scratch.normed.resize(hidden.len(), 0.0);
        rms_norm(hidden, &self.input_norm_h, epsilon, &mut scratch.normed);
        let (panels, alone) = (&mut scratch.panels, scratch.alone);
        self.query.pack(panels, &scratch.normed);
        self.query.forward(panels, alone, Into::Store, query);
        self.key.forward(panels, alone, Into::Store, key);
        self.value.forward(panels, alone, Into::Store, value);
    }

    fn after_attention(&self, scratch: &mut Rows, hidden: &mut [f32], mixed: &[f32], epsilon: f32) {
        let (panels, alone) = (&mut scratch.panels, scratch.alone);
        self.output.pack(panels, mixed);
        self.output.forward(panels, alone, Into::Add, hidden);
        scratch.normed.resize(hidden.len(), 0.0);
        rms_norm(hidden, &self.post_norm_h, epsilon, &mut scratch.normed);
        let inner = hidden.len() / self.post_norm_h.len() * self.gate.weight.rows();
        scratch.gate.resize(inner, 0.0);
        scratch.up.resize(inner, 0.0);
        self.gate.pack(panels, &scratch.normed);
        self.gate.forward(panels, alone, Into::Store, &mut scratch.gate);
        self.up.forward(panels, alone, Into::Store, &mut scratch.up);
        let share = if alone { inner.div_ceil(rayon::current_num_threads()).max(1) } else { inner.max(1) };
        let parts = scratch.gate.par_chunks_mut(share).zip(scratch.up.par_chunks(share));
        parts.for_each(|(gate, up)| swiglu(gate, up));
        self.down.pack(panels, &scratch.gate);
        self.down.forward(panels, alone, Into::Add, hidden);
    }

    /// New keys and values into their slots.
    fn keep(&mut self, lane: u32, pieces: &[Piece], width: usize, key: &[f32], value: &[f32]) {
        let mut at = 0;
        for piece in pieces {
            let new = at * width..(at + piece.tokens as usize) * width;
            at += piece.tokens as usize;
            let Some(slot) = piece.slot else { continue };
            let slot = &mut self.lanes[lane as usize][slot as usize];
            for (kept, new) in [(&mut slot.keys, &key[new.clone()]), (&mut slot.values, &value[new.clone()])] {
                kept.truncate(piece.start as usize * width);
                kept.extend_from_slice(new);
            }
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn attend(
        &self,
        lane: u32,
        pieces: &[Piece],
        widths: &Widths,
        d: usize,
        window: Option<usize>,
        (query, key, value): (&[f32], &[f32], &[f32]),
        mixed: &mut [f32],
    ) {
        let mut blocks = Vec::new();
        let mut at = 0;
        for piece in pieces {
            for first in (0..piece.tokens as usize).step_by(POSITIONS) {
                blocks.push((piece, at, first, POSITIONS.min(piece.tokens as usize - first)));
            }
            at += piece.tokens as usize;
        }
        // Each block of queries writes rows of its own.
        let mut rest = mixed;
        let mut work = Vec::with_capacity(blocks.len());
        for block in blocks {
            let (mine, others) = rest.split_at_mut(block.3 * widths.q);
            rest = others;
            work.push((block, mine));
        }
        let heads = widths.q / widths.k;
        work.into_par_iter().for_each_init(Scratch::default, |scratch, ((piece, at, first, positions), mixed)| {
            let (keys, values) = match piece.slot {
                Some(slot) => {
                    let slot = &self.lanes[lane as usize][slot as usize];
                    (slot.keys.as_slice(), slot.values.as_slice())
                }
                None => (&key[at * widths.k..], &value[at * widths.k..]),
            };
            for kept_head in 0..widths.k / d {
                let asked = Asked {
                    queries: &query[(at + first) * widths.q..],
                    stride: widths.q,
                    offset: kept_head * heads * d,
                    positions,
                    first: piece.start as usize + first,
                    heads,
                    head_dim: d,
                    window,
                };
                let kept = Kept { keys, values, stride: widths.k, offset: kept_head * d };
                scratch.attend(&asked, &kept, |position, head, row| {
                    let to = position * widths.q + (kept_head * heads + head) * d;
                    mixed[to..to + d].copy_from_slice(row);
                });
            }
        });
    }
}

impl Linear {
    /// Packs what the weights are to be multiplied with.
    fn pack(&self, panels: &mut Panels, x: &[f32]) {
        let k = self.weight.columns();
        panels.pack(x, k, x.len() / k, k);
    }

    /// On this thread, or on all of them.
    fn forward(&self, x: &Panels, all: bool, into: Into, out: &mut [f32]) {
        let product = if all { Panels::product_shared } else { Panels::product };
        product(x, &self.weight, self.bias.as_deref(), into, out, self.weight.rows());
    }
}

impl Frequencies {
    fn angles(&self, pieces: &[Piece]) -> Angles {
        let positions = pieces.iter().flat_map(|piece| piece.start..piece.start + piece.tokens);
        let angles: Vec<f32> =
            positions.flat_map(|at| self.0.iter().map(move |frequency| at as f32 * frequency)).collect();
        Angles { cos: angles.iter().map(|x| x.cos()).collect(), sin: angles.iter().map(|x| x.sin()).collect() }
    }
}

impl Angles {
    /// Of `count` positions from the `first` on.
    fn rows(&self, first: usize, count: usize, half: usize) -> impl Iterator<Item = (&[f32], &[f32])> {
        let range = first * half..(first + count) * half;
        self.cos[range.clone()].chunks_exact(half).zip(self.sin[range].chunks_exact(half))
    }
}

const EMBEDDING: &str = "model.embed_tokens.weight";
