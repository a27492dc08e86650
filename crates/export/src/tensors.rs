//! Tensors under their GGUF names, streamed from the folder in chunks of whole rows.

use retort_core::{Code, Error, Result, spec::GgufType};
use retort_import::{
    Dtype, FolderWeights, LocatedTensor,
    gguf::{Kind, ROPE_FREQS, interleave_halves, interleaves_rotary, tensor_name},
};
use retort_model::Config;

use crate::{
    encode::{BLOCK, encode},
    header::ALIGNMENT,
};

/// About how many values are in memory at a time.
const CHUNK_VALUES: u64 = 1 << 20;

/// One tensor of the file.
#[derive(Debug)]
pub(crate) struct Planned {
    pub(crate) name: String,
    /// Row-major.
    pub(crate) shape: Vec<u64>,
    pub(crate) kind: Kind,
    values: Values,
}

#[derive(Debug)]
enum Values {
    Stored {
        tensor: LocatedTensor,
        /// Rows a head, where its rotary halves are to be interleaved.
        interleaved: Option<u64>,
    },
    Computed(Vec<f32>),
}

impl Planned {
    /// Every tensor of the file, in the order of the layers.
    pub(crate) fn all(weights: FolderWeights, config: &Config, kind: GgufType) -> Result<Vec<Self>> {
        let mut all = Vec::with_capacity(weights.tensors.len() + 1);
        for tensor in weights.tensors {
            let theirs = &tensor.entry.name;
            let name =
                tensor_name(theirs).ok_or_else(|| Error::internal(format!("tensor \"{theirs}\" has no GGUF name")))?;
            let interleaved = interleaves_rotary(config.architecture, theirs).then_some(config.head_dim.unsigned_abs());
            let (shape, kind) = (tensor.entry.shape.clone(), kind_of(&tensor.entry.shape, kind));
            all.push(Self { name, shape, kind, values: Values::Stored { tensor, interleaved } });
        }
        if let Some(scaling) = &config.rope_scaling {
            let pairs = config.head_dim.unsigned_abs() / 2;
            let divisors = scaling.divisors(config.rope_theta, pairs as usize);
            let values = Values::Computed(divisors.into_iter().map(|divisor| divisor as f32).collect());
            all.push(Self { name: ROPE_FREQS.to_owned(), shape: vec![pairs], kind: Kind::F32, values });
        }
        Ok(all)
    }

    /// In the file, up to where the next tensor begins.
    pub(crate) fn padded_bytes(&self) -> u64 {
        self.bytes().next_multiple_of(ALIGNMENT)
    }

    fn bytes(&self) -> u64 {
        // Planned only for rows of whole blocks.
        self.shape.iter().product::<u64>() / self.kind.block_values() * self.kind.block_bytes()
    }

    /// Hands the tensor's bytes on, and zeros behind them up to the next tensor.
    ///
    /// # Errors
    /// `ModelMalformed` for a value that is not finite, `ModelUnsupported` for one that the kind cannot hold; both
    /// name the tensor.
    pub(crate) fn write(&self, put: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        match &self.values {
            Values::Computed(values) => put(&self.encoded(&self.name, values)?)?,
            Values::Stored { tensor, interleaved } => self.convert(tensor, *interleaved, put)?,
        }
        put(&[0; ALIGNMENT as usize][..(self.padded_bytes() - self.bytes()) as usize])
    }

    fn convert(
        &self,
        tensor: &LocatedTensor,
        interleaved: Option<u64>,
        put: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let entry = &tensor.entry;
        // A vector is one row, unless its values are to be reordered one by one.
        let row_values = match (self.shape.as_slice(), interleaved) {
            ([_], Some(_)) => 1,
            (shape, _) => shape.last().copied().unwrap_or(1),
        };
        let row_bytes = row_values * entry.dtype.bytes();
        let rows = entry.elements() / row_values;
        let unit = interleaved.unwrap_or(1);
        let step = (CHUNK_VALUES / row_values / unit).max(1) * unit;
        let stored = match entry.dtype {
            Dtype::F32 => Kind::F32,
            Dtype::F16 => Kind::F16,
            Dtype::BF16 => Kind::BF16,
        };

        let (mut chunk, mut values) = (Vec::new(), Vec::new());
        let mut row = 0;
        while row < rows {
            let count = step.min(rows - row);
            chunk.resize((count * row_bytes) as usize, 0);
            tensor.read_at(row * row_bytes, &mut chunk)?;
            if !entry.dtype.is_finite(&chunk) {
                return Err(Error::new(
                    Code::ModelMalformed,
                    format!(
                        "tensor \"{}\" holds a value that is not finite; the weights are damaged, or the training went astray",
                        entry.name
                    ),
                ));
            }
            values.clear();
            match interleaved {
                Some(head_rows) => {
                    stored.dequantise(&interleave_halves(&chunk, row_bytes as usize, head_rows as usize), &mut values)
                }
                None => stored.dequantise(&chunk, &mut values),
            }
            put(&self.encoded(&entry.name, &values)?)?;
            row += count;
        }
        Ok(())
    }

    fn encoded(&self, name: &str, values: &[f32]) -> Result<Vec<u8>> {
        let blocks = values.len() as u64 / self.kind.block_values();
        let mut bytes = Vec::with_capacity((blocks * self.kind.block_bytes()) as usize);
        match encode(self.kind, values, &mut bytes) {
            Ok(()) => Ok(bytes),
            Err(value) => Err(Error::new(
                Code::ModelUnsupported,
                format!(
                    "tensor \"{name}\" holds {value:e}, which {} cannot; export it as f32, or as bf16 if it was that",
                    self.kind.name()
                ),
            )),
        }
    }
}

/// Vectors stay f32, as llama.cpp needs them; rows that blocks do not fill are f16.
fn kind_of(shape: &[u64], wanted: GgufType) -> Kind {
    match (shape, wanted) {
        ([] | [_], _) | (_, GgufType::F32) => Kind::F32,
        (_, GgufType::F16) => Kind::F16,
        (_, GgufType::Bf16) => Kind::BF16,
        (shape, GgufType::Q8_0) => {
            let fills = shape.last().is_some_and(|columns| columns.is_multiple_of(BLOCK as u64));
            if fills { Kind::Q8_0 } else { Kind::F16 }
        }
    }
}
