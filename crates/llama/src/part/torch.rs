//! A part on libtorch: any device, f32 or bf16.
//!
//! Layers may lie on several devices, a contiguous run on each; hidden states cross from one to the
//! next. Shapes: n packed tokens, r rows of a step that each add one token, c capacity of a slot, and
//! the letters of the crate.

use std::path::Path;

use tch::{Device, Kind, Tensor};

use super::{Keep, Part, Piece, Room, Share, check, check_share};
use crate::{
    Config, Error, Result,
    attention::{self, Mask},
    model::block::{Block, Weight, norm},
    rope::Rope,
    weights::Folder,
};

/// A part whose tensors lie on libtorch devices in one kind.
#[derive(Debug)]
pub struct TorchPart {
    config: Config,
    part: Part,
    embedding_vh: Option<Tensor>,
    layers: Vec<Layer>,
    norm_h: Option<Tensor>,
    head_vh: Option<Tensor>,
    ropes: Vec<(Device, Rope)>,
    kind: Kind,
    room: Room,
    /// Bytes of weights that were read.
    bytes_read: u64,
}

#[derive(Debug)]
struct Layer {
    block: Block,
    device: Device,
    /// Keys and values of each lane, `[slots, k, c, d]`.
    lanes: Vec<(Tensor, Tensor)>,
}

impl TorchPart {
    /// Reads the part's tensors and no others. Layers are dealt over `devices` in runs of equal length;
    /// the weights of their projections are kept as `keep` says.
    pub fn load(dir: &Path, part: Part, devices: &[Device], kind: Kind, keep: Keep) -> Result<Self> {
        let config = Config::from_dir(dir)?;
        let folder = Folder::open(dir)?;
        let (Some(&first), Some(&last)) = (devices.first(), devices.last()) else {
            return Err(Error::Device("no device to load a model on".into()));
        };
        let count = part.layers.len();
        let device_of = |layer: usize| devices[(layer - part.layers.start) * devices.len() / count.max(1)];
        let table = part.tensors(&config);
        folder.require(&table)?;
        let bytes_read =
            table.iter().filter_map(|(name, _)| folder.get(name)).map(|(_, bytes)| bytes.len() as u64).sum();
        let has = |name: &str| table.iter().any(|(of, _)| of == name);
        let on =
            |device: Device, name: &str| if has(name) { folder.weight(name, device, kind).map(Some) } else { Ok(None) };
        let layers = part.layers.clone().map(|layer| {
            let device = device_of(layer);
            let narrow = |weight: Weight, name: &str| {
                if !name.ends_with("proj.weight") {
                    return Ok(weight);
                }
                weight.keep(keep).map_err(|error| Error::malformed(folder.place(), format!("tensor {name:?}: {error}")))
            };
            let find = |name: &str| on(device, name)?.map(|weight| narrow(weight, name)).transpose();
            Ok(Layer { block: Block::assemble(layer as i64, &find)?, device, lanes: Vec::new() })
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let mut ropes: Vec<(Device, Rope)> = Vec::new();
        for &device in devices {
            if ropes.iter().all(|(of, _)| *of != device) {
                ropes.push((device, Rope::new(&config, device)?));
            }
        }
        let head = if config.tie_word_embeddings { EMBEDDING } else { "lm_head.weight" };
        let plain = |device, name, held: bool| match held {
            true => on(device, name)?.map(Weight::plain).transpose(),
            false => Ok(None),
        };
        let embedding_vh = plain(first, EMBEDDING, part.embeds)?;
        let norm_h = plain(last, "model.norm.weight", part.heads)?;
        let head_vh = match &embedding_vh {
            Some(shared) if part.heads && config.tie_word_embeddings && first == last => Some(shared.shallow_clone()),
            _ => plain(last, head, part.heads)?,
        };
        let room = Room { lanes: 0, slots: 0, capacity: 0 };
        Ok(Self { config, part, embedding_vh, layers, norm_h, head_vh, ropes, kind, room, bytes_read })
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    pub fn part(&self) -> &Part {
        &self.part
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    pub fn bytes_read(&self) -> u64 {
        self.bytes_read
    }

    /// Forgets all slots and makes room for others.
    pub fn reset(&mut self, room: Room) -> Result<()> {
        self.room = Room { lanes: 0, slots: 0, capacity: 0 };
        self.layers.iter_mut().for_each(|layer| layer.lanes.clear());
        if room.slots == 0 || room.capacity == 0 {
            return Ok(());
        }
        let (slots, capacity) = (i64::from(room.slots), i64::from(room.capacity));
        let shape = [slots, self.config.num_key_value_heads, capacity, self.config.head_dim];
        for layer in &mut self.layers {
            let zeros = || Tensor::f_zeros(shape, (self.kind, layer.device));
            layer.lanes = (0..room.lanes).map(|_| Ok((zeros()?, zeros()?))).collect::<Result<_>>()?;
        }
        self.room = room;
        Ok(())
    }

    pub fn share(&mut self, lane: u32, share: &Share) -> Result<()> {
        check_share(&self.room, lane, share)?;
        for layer in &mut self.layers {
            let (key, value) = &layer.lanes[lane as usize];
            for kept in [key, value] {
                let part = |slot: u32| kept.f_select(0, i64::from(slot))?.f_narrow(1, 0, i64::from(share.positions));
                part(share.to)?.f_copy_(&part(share.from)?)?;
            }
        }
        Ok(())
    }

    /// Hidden states `[n, h]` of token ids.
    pub fn embed(&self, token_ids: &[u32]) -> Result<Tensor> {
        let Some(embedding_vh) = &self.embedding_vh else {
            return Err(Error::Invalid("this part of the model has no embedding".into()));
        };
        let vocabulary = self.config.vocab_size;
        if let Some(id) = token_ids.iter().find(|&&id| i64::from(id) >= vocabulary) {
            return Err(Error::Invalid(format!("token id {id} is outside the model's vocabulary of {vocabulary}")));
        }
        let ids: Vec<i64> = token_ids.iter().map(|&id| i64::from(id)).collect();
        let ids_n = Tensor::f_from_slice(&ids)?.f_to_device(embedding_vh.device())?;
        Ok(Tensor::f_embedding(embedding_vh, &ids_n, -1, false, false)?)
    }

    /// `[n, h]` through the layers, the pieces' tokens one after another.
    pub fn forward(&mut self, lane: u32, hidden_nh: Tensor, pieces: &[Piece]) -> Result<Tensor> {
        let tokens = check(&self.config, &self.room, lane, pieces)?;
        let shape = hidden_nh.size();
        if shape != [tokens as i64, self.config.hidden_size] || hidden_nh.kind() != self.kind {
            return Err(Error::Invalid(format!(
                "hidden states of shape {shape:?} in {:?}, for {tokens} tokens of {:?} in {:?}",
                hidden_nh.kind(),
                self.config.hidden_size,
                self.kind
            )));
        }
        let positions: Vec<i64> = pieces
            .iter()
            .flat_map(|piece| i64::from(piece.start)..i64::from(piece.start) + i64::from(piece.tokens))
            .collect();
        let plan = Plan::new(pieces, self.config.sliding_window);
        let positions_n = Tensor::f_from_slice(&positions)?;
        let mut hidden_1nh = hidden_nh.f_unsqueeze(0)?;
        let mut angles = None;
        let mut rows = None;
        for layer in &mut self.layers {
            if hidden_1nh.device() != layer.device || angles.is_none() {
                hidden_1nh = hidden_1nh.f_to_device(layer.device)?;
                let rope = self.ropes.iter().find(|(device, _)| *device == layer.device);
                let (_, rope) = rope.ok_or_else(|| Error::Device(format!("no angles on {:?}", layer.device)))?;
                angles = Some(rope.angles(&positions_n.f_to_device(layer.device)?, self.kind)?);
                rows = plan.rows(pieces, (self.kind, layer.device))?;
            }
            let Some(angles) = &angles else { continue };
            let kept = layer.lanes.get(lane as usize);
            hidden_1nh = layer.block.forward(&self.config, &hidden_1nh, angles, None, |query, key, value| {
                match (&rows, kept) {
                    (Some(rows), Some(kept)) => rows.attend(kept, query, key, value),
                    _ => plan.attend(pieces, kept, query, key, value),
                }
            })?;
        }
        Ok(hidden_1nh.f_squeeze_dim(0)?)
    }

    /// Logits `[m, v]` of hidden states `[m, h]` after the last layer.
    pub fn head(&self, hidden_mh: &Tensor) -> Result<Tensor> {
        let (Some(norm_h), Some(head_vh)) = (&self.norm_h, &self.head_vh) else {
            return Err(Error::Invalid("this part of the model has no head".into()));
        };
        let hidden_mh = hidden_mh.f_to_device(head_vh.device())?;
        Ok(norm(&hidden_mh, norm_h, self.config.rms_norm_eps)?.f_linear(head_vh, None::<&Tensor>)?)
    }
}

const EMBEDDING: &str = "model.embed_tokens.weight";

/// How a step's pieces attend.
struct Plan {
    window: Option<i64>,
    /// Each piece adds one token to a slot.
    decodes: bool,
}

/// A step of rows that each add one token: all at once, over slots padded to the longest.
struct Rows {
    slot_r: Tensor,
    position_r: Tensor,
    bias_r11s: Tensor,
    keys: i64,
}

impl Plan {
    fn new(pieces: &[Piece], window: Option<i64>) -> Self {
        Self { window, decodes: pieces.iter().all(|piece| piece.tokens == 1 && piece.slot.is_some()) }
    }

    fn rows(&self, pieces: &[Piece], (kind, device): (Kind, Device)) -> Result<Option<Rows>> {
        if !self.decodes {
            return Ok(None);
        }
        let slots: Vec<i64> = pieces.iter().map(|piece| i64::from(piece.slot.unwrap_or(0))).collect();
        let positions: Vec<i64> = pieces.iter().map(|piece| i64::from(piece.start)).collect();
        let keys = positions.iter().max().map_or(1, |longest| longest + 1);
        let position_r = Tensor::f_from_slice(&positions)?.f_to_device(device)?;
        let bias_r11s = attention::bias(&position_r.f_unsqueeze(1)?, keys, self.window, (kind, device))?;
        Ok(Some(Rows { slot_r: Tensor::f_from_slice(&slots)?.f_to_device(device)?, position_r, bias_r11s, keys }))
    }

    /// Piece by piece; runs of whole sequences of one length go together.
    fn attend(
        &self,
        pieces: &[Piece],
        kept: Option<&(Tensor, Tensor)>,
        query_1qnd: &Tensor,
        key_1knd: &Tensor,
        value_1knd: &Tensor,
    ) -> Result<Tensor> {
        let mut mixed = Vec::new();
        let mut at = 0;
        let alike = |a: &Piece, b: &Piece| a.slot.is_none() && b.slot.is_none() && a.tokens == b.tokens;
        for group in pieces.chunk_by(alike) {
            let (count, tokens) = (group.len() as i64, i64::from(group[0].tokens));
            let cut = |heads: &Tensor| -> Result<Tensor> {
                let (_, h, _, d) = heads.size4()?;
                let part = heads.f_narrow(2, at, count * tokens)?;
                Ok(part.f_view([h, count, tokens, d])?.f_transpose(0, 1)?)
            };
            let (query, key, value) = (cut(query_1qnd)?, cut(key_1knd)?, cut(value_1knd)?);
            let out_gqtd = match (group[0].slot, kept) {
                (Some(slot), Some(kept)) => self.extend(kept, slot, &group[0], &query, &key, &value)?,
                _ => attention::attend(
                    &query,
                    &key,
                    &value,
                    &self.mask(&query, 0, tokens)?.as_ref().map_or(Mask::Causal, Mask::Bias),
                )?,
            };
            let (_, heads, _, size) = out_gqtd.size4()?;
            mixed.push(out_gqtd.f_transpose(0, 1)?.f_reshape([1, heads, count * tokens, size])?);
            at += count * tokens;
        }
        if mixed.len() == 1 {
            return mixed.pop().ok_or_else(|| Error::Invalid("a step without pieces".into()));
        }
        Ok(Tensor::f_cat(&mixed, 2)?)
    }

    fn extend(
        &self,
        (key_skcd, value_skcd): &(Tensor, Tensor),
        slot: u32,
        piece: &Piece,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
    ) -> Result<Tensor> {
        let (start, tokens) = (i64::from(piece.start), i64::from(piece.tokens));
        let store = |kept: &Tensor, new: &Tensor| -> Result<Tensor> {
            let kept = kept.f_narrow(0, i64::from(slot), 1)?;
            kept.f_narrow(2, start, tokens)?.f_copy_(new)?;
            Ok(kept.f_narrow(2, 0, start + tokens)?)
        };
        let (keys, values) = (store(key_skcd, key)?, store(value_skcd, value)?);
        let bias = self.mask(query, start, tokens)?;
        attention::attend(query, &keys, &values, &bias.as_ref().map_or(Mask::Causal, Mask::Bias))
    }

    /// `None` where the causal mask says it all.
    fn mask(&self, query: &Tensor, start: i64, tokens: i64) -> Result<Option<Tensor>> {
        let all = start + tokens;
        if start == 0 && self.window.is_none_or(|window| all <= window) {
            return Ok(None);
        }
        let (kind, device) = (query.kind(), query.device());
        let position_1t = (Tensor::f_arange(tokens, (Kind::Int64, device))?.f_add_scalar(start)?).f_unsqueeze(0)?;
        Ok(Some(attention::bias(&position_1t, all, self.window, (kind, device))?))
    }
}

impl Rows {
    fn attend(
        &self,
        (key_skcd, value_skcd): &(Tensor, Tensor),
        query_1qrd: &Tensor,
        key_1krd: &Tensor,
        value_1krd: &Tensor,
    ) -> Result<Tensor> {
        let gather = |kept: &Tensor, new: &Tensor| -> Result<Tensor> {
            let new_rkd = new.f_squeeze_dim(0)?.f_transpose(0, 1)?;
            // Indices on both sides of the heads axis put it last but one.
            let mut kept_shared = kept.shallow_clone();
            let _ = kept_shared.f_index_put_(&[Some(&self.slot_r), None, Some(&self.position_r)], &new_rkd, false)?;
            Ok(kept.f_narrow(2, 0, self.keys)?.f_index_select(0, &self.slot_r)?)
        };
        let (keys, values) = (gather(key_skcd, key_1krd)?, gather(value_skcd, value_1krd)?);
        let query_rq1d = query_1qrd.f_permute([2, 1, 0, 3])?;
        let mixed_rq1d = attention::attend_one(&query_rq1d, &keys, &values, &Mask::Bias(&self.bias_r11s))?;
        Ok(mixed_rq1d.f_permute([2, 1, 0, 3])?)
    }
}
