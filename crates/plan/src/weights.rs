//! What the weights weigh, layer by layer, in each format that an engine can hold them in.

use std::ops::Range;

use retort_model::Config;
use serde::Serialize;

/// How matrices of layers are stored. Embedding, head, norms and biases are always bf16, and a
/// matrix of one-byte numbers has an fp32 scale for each of its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    Bf16,
    /// As in Meta's Llama-3.1-405B-FP8: the feed-forward matrices of all layers but the first and the
    /// last; attention stays bf16 ("The Llama 3 Herd of Models", 2024, section 6.2).
    Fp8Mlp,
    /// Every matrix of every layer.
    Fp8,
    Int8,
}

impl Format {
    pub const ALL: [Self; 4] = [Self::Bf16, Self::Fp8Mlp, Self::Fp8, Self::Int8];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::Fp8Mlp => "fp8 (feed-forward of the inner layers)",
            Self::Fp8 => "fp8 (every layer's matrices)",
            Self::Int8 => "int8 (every layer's matrices)",
        }
    }

    /// As the command line's flags say it.
    pub fn flags(self) -> &'static str {
        match self {
            Self::Bf16 => "--dtype bf16",
            Self::Fp8Mlp => "--dtype fp8",
            Self::Fp8 => "--dtype fp8 --fp8-layers all",
            Self::Int8 => "--dtype int8",
        }
    }

    fn is_narrow(self, feed_forward: bool, at_an_end: bool) -> bool {
        match self {
            Self::Bf16 => false,
            Self::Fp8Mlp => feed_forward && !at_an_end,
            Self::Fp8 | Self::Int8 => true,
        }
    }
}

/// A model's weights in one format.
#[derive(Clone, Debug)]
pub struct Weights {
    pub layers: Vec<Layer>,
    /// Numbers of the embedding; with a tied head the last stage of several has them once more.
    pub embedding: u64,
    /// Numbers of the head, whether it is its own or the embedding.
    pub head: u64,
    pub tied: bool,
    /// Numbers of the last norm.
    pub norm: u64,
}

/// One layer.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Layer {
    /// Numbers of its bf16 matrices.
    pub wide: u64,
    /// Numbers of its one-byte matrices.
    pub narrow: u64,
    /// Rows of its one-byte matrices: a scale each.
    pub scales: u64,
    /// Numbers of norms and biases.
    pub vectors: u64,
}

impl Layer {
    pub fn parameters(&self) -> u64 {
        self.wide + self.narrow + self.vectors
    }

    /// On each of `tensor` GPUs.
    pub fn bytes(&self, tensor: u64) -> u64 {
        self.matrix_bytes().div_ceil(tensor.max(1)) + 2 * self.vectors
    }

    fn matrix_bytes(&self) -> u64 {
        2 * self.wide + self.narrow + 4 * self.scales
    }
}

impl Weights {
    pub fn new(config: &Config, format: Format) -> Self {
        let last = config.num_hidden_layers - 1;
        let mut layers = vec![Layer::default(); usize::try_from(config.num_hidden_layers).unwrap_or(0)];
        let mut norm = 0;
        for (name, shape) in config.tensors() {
            let numbers = shape.iter().map(|&size| size.unsigned_abs()).product::<u64>();
            let Some((index, part)) = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) else {
                norm += if shape.len() == 1 { numbers } else { 0 };
                continue;
            };
            let Ok(index) = index.parse::<usize>() else { continue };
            let Some(layer) = layers.get_mut(index) else { continue };
            let at_an_end = index == 0 || index as i64 == last;
            if shape.len() == 1 {
                layer.vectors += numbers;
            } else if format.is_narrow(part.starts_with("mlp."), at_an_end) {
                layer.narrow += numbers;
                layer.scales += shape[0].unsigned_abs();
            } else {
                layer.wide += numbers;
            }
        }
        let embedding = config.vocab_size.unsigned_abs() * config.hidden_size.unsigned_abs();
        Self { layers, embedding, head: embedding, tied: config.tie_word_embeddings, norm }
    }

    /// The whole model in one place.
    pub fn bytes(&self) -> u64 {
        self.stage_bytes(&(0..self.layers.len()), 1)
    }

    /// Numbers that the stage with these layers holds.
    pub fn stage_parameters(&self, range: &Range<usize>) -> u64 {
        let layers = self.layers[range.clone()].iter().map(Layer::parameters).sum::<u64>();
        layers + self.ends(range) + if range.end == self.layers.len() { self.norm } else { 0 }
    }

    /// Bytes on each of the `tensor` GPUs that share the stage with these layers. Matrices are cut,
    /// vectors repeated.
    pub fn stage_bytes(&self, range: &Range<usize>, tensor: u64) -> u64 {
        let layers = &self.layers[range.clone()];
        let matrices = layers.iter().map(Layer::matrix_bytes).sum::<u64>() + 2 * self.ends(range);
        let norm = if range.end == self.layers.len() { self.norm } else { 0 };
        let vectors = layers.iter().map(|layer| layer.vectors).sum::<u64>() + norm;
        matrices.div_ceil(tensor.max(1)) + 2 * vectors
    }

    /// Numbers of embedding and head on this stage.
    fn ends(&self, range: &Range<usize>) -> u64 {
        let (first, last) = (range.start == 0, range.end == self.layers.len());
        match (first, last) {
            (true, true) if self.tied => self.embedding,
            _ => (if first { self.embedding } else { 0 }) + if last { self.head } else { 0 },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Model;

    fn weights(name: &str, format: Format) -> Weights {
        Weights::new(&Model::find(name).unwrap().config().unwrap(), format)
    }

    #[test]
    fn bf16_is_two_bytes_a_parameter() {
        for model in Model::ALL {
            let config = model.config().unwrap();
            assert_eq!(Weights::new(&config, Format::Bf16).bytes(), 2 * config.parameters(), "{}", model.name);
        }
    }

    /// 124 layers' feed-forward of 3 x 16,384 x 53,248 at a byte, the rest at two, and the scales.
    #[test]
    fn metas_fp8_is_487_gb_and_not_406() {
        let meta = weights("llama-3.1-405b", Format::Fp8Mlp);
        let narrow: u64 = 124 * 3 * 16_384 * 53_248;
        let scales = 124 * (2 * 53_248 + 16_384);
        assert_eq!(meta.bytes(), 2 * 405_853_388_800 - narrow + 4 * scales);
        assert_eq!(meta.bytes() / 1_000_000_000, 487);
        assert_eq!(weights("llama-3.1-405b", Format::Fp8).bytes() / 1_000_000_000, 410);
        assert_eq!(weights("llama-3.1-405b", Format::Int8).bytes(), weights("llama-3.1-405b", Format::Fp8).bytes());
    }

    #[test]
    fn stages_hold_the_whole_model_and_a_tied_head_twice() {
        let cut = |weights: &Weights| {
            let middle = weights.layers.len() / 3;
            let parts = [0..middle, middle..weights.layers.len()];
            parts.iter().map(|range| weights.stage_bytes(range, 1)).sum::<u64>()
        };
        let large = weights("llama-3.1-70b", Format::Bf16);
        assert_eq!(cut(&large), large.bytes());
        let tied = weights("llama-3.2-1b", Format::Bf16);
        assert_eq!(cut(&tied), tied.bytes() + 2 * tied.head);
    }
}
