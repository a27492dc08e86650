//! GGUF tensors under their Hugging Face names, streamed out row by row.
//!
//! llama.cpp stores the query and key rows of `llama` models with each head's two rotary halves
//! interleaved; writing undoes that, so that rotation by halves gives the same products.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;

use retort_core::{Error, Result};

use super::names::{ROPE_FREQS, interleaves_rotary, tensor_name};
use super::quant::Kind;
use super::reader::{Gguf, Tensor};
use super::rotary::separate_halves;
use crate::layout::{Expected, Layout};
use crate::weights::{self, Dtype, Entry, Sink};

/// About how many values are in memory at a time.
const CHUNK_VALUES: u64 = 1 << 20;

/// One tensor to be written, and where its values come from.
pub(crate) struct Planned {
    pub(crate) entry: Entry,
    tensor: Tensor,
    /// Rows a head when its rotary halves are interleaved.
    interleaved: Option<u64>,
}

/// Every tensor of the model in the order it is written; refuses what is missing, too much or of
/// another shape.
pub(crate) fn plan(gguf: &Gguf, layout: &Layout) -> Result<Vec<Planned>> {
    let metadata = &gguf.metadata;
    let mut left = gguf.tensors.clone();
    left.remove(ROPE_FREQS);
    let mut plan = Vec::new();
    for Expected { name, shape } in layout.tensors() {
        let Some(theirs) = tensor_name(&name) else {
            return Err(Error::internal(format!("tensor \"{name}\" has no GGUF name")));
        };
        let Some(tensor) = left.remove(&theirs) else {
            return Err(metadata.malformed(format!("tensor \"{theirs}\" is missing")));
        };
        if tensor.shape != shape {
            return Err(metadata.malformed(format!(
                "tensor \"{theirs}\" has shape {:?}, but the metadata asks for {shape:?}",
                tensor.shape
            )));
        }
        let interleaved = interleaves_rotary(layout.architecture, &name).then_some(layout.head_dim);
        if interleaved.is_some() && shape.len() == 1 && tensor.kind.block_values() > 1 {
            return Err(
                metadata.unsupported(format!("tensor \"{theirs}\" is a quantised bias, {}", tensor.kind.name()))
            );
        }
        plan.push(Planned { entry: Entry::new(name, dtype(tensor.kind), shape)?, tensor, interleaved });
    }
    if let Some(name) = left.keys().next() {
        return Err(metadata.unsupported(format!(
            "tensor \"{name}\" is none of a {}'s; importing without it would change the model",
            layout.architecture.class_name()
        )));
    }
    weights::order(&mut plan, |planned: &Planned| planned.entry.dtype);
    Ok(plan)
}

/// The type of most values, as `config.json` states it.
pub(crate) fn main_dtype(plan: &[Planned]) -> Dtype {
    let values = |dtype: Dtype| -> u64 {
        plan.iter().filter(|planned| planned.entry.dtype == dtype).map(|planned| planned.entry.elements()).sum()
    };
    let mut main = Dtype::F32;
    for dtype in [Dtype::F16, Dtype::BF16] {
        if values(dtype) > values(main) {
            main = dtype;
        }
    }
    main
}

impl Planned {
    pub(crate) fn copy<W: Write>(&self, file: &File, path: &Path, sink: &mut Sink<'_, W>) -> Result<()> {
        // A vector is one row, unless its values are to be reordered one by one.
        let row_values = match (self.entry.shape.as_slice(), self.interleaved) {
            ([_], Some(_)) => 1,
            (shape, _) => shape.last().copied().unwrap_or(1),
        };
        let row_bytes = row_values / self.tensor.kind.block_values() * self.tensor.kind.block_bytes();
        let rows = self.entry.elements() / row_values;
        let unit = self.interleaved.unwrap_or(1);
        let step = (CHUNK_VALUES / row_values / unit).max(1) * unit;

        let (mut blocks, mut values, mut bytes) = (Vec::new(), Vec::new(), Vec::new());
        let mut row = 0;
        while row < rows {
            let count = step.min(rows - row);
            blocks.resize((count * row_bytes) as usize, 0);
            file.read_exact_at(&mut blocks, self.tensor.offset + row * row_bytes)
                .map_err(|error| Error::io(path, error))?;
            if self.entry.dtype == Dtype::F32 {
                values.clear();
                self.tensor.kind.dequantise(&blocks, &mut values);
                bytes.clear();
                bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            } else {
                bytes.clone_from(&blocks);
            }
            let width = (row_values * self.entry.dtype.bytes()) as usize;
            if let Some(head_rows) = self.interleaved {
                bytes = separate_halves(&bytes, width, head_rows as usize);
            }
            sink.put(&self.entry, &bytes)?;
            row += count;
        }
        Ok(())
    }
}

fn dtype(kind: Kind) -> Dtype {
    match kind {
        Kind::F16 => Dtype::F16,
        Kind::BF16 => Dtype::BF16,
        _ => Dtype::F32,
    }
}
