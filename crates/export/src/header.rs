//! What stands before the weights: counts, metadata and where each tensor lies, little-endian, padded so that the
//! first tensor is aligned. Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

use crate::tensors::Planned;

/// GGUF's default, which a file need not state.
pub(crate) const ALIGNMENT: u64 = 32;
const VERSION: u32 = 3;

/// A value of the metadata, of the kinds that are written.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    String(String),
    Strings(Vec<String>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
}

impl Value {
    /// GGUF's number of the kind; of an array, of its elements.
    fn number(&self) -> u32 {
        match self {
            Self::U32(_) => 4,
            Self::I32s(_) => 5,
            Self::F32(_) | Self::F32s(_) => 6,
            Self::Bool(_) => 7,
            Self::String(_) | Self::Strings(_) => 8,
        }
    }

    /// Of an array.
    fn count(&self) -> Option<usize> {
        match self {
            Self::U32(_) | Self::F32(_) | Self::Bool(_) | Self::String(_) => None,
            Self::Strings(values) => Some(values.len()),
            Self::I32s(values) => Some(values.len()),
            Self::F32s(values) => Some(values.len()),
        }
    }

    fn put(&self, out: &mut Vec<u8>) {
        if let Some(count) = self.count() {
            out.extend(9u32.to_le_bytes());
            out.extend(self.number().to_le_bytes());
            out.extend((count as u64).to_le_bytes());
        } else {
            out.extend(self.number().to_le_bytes());
        }
        match self {
            Self::U32(value) => out.extend(value.to_le_bytes()),
            Self::F32(value) => out.extend(value.to_le_bytes()),
            Self::Bool(value) => out.push(u8::from(*value)),
            Self::String(value) => put_text(out, value),
            Self::Strings(values) => values.iter().for_each(|value| put_text(out, value)),
            Self::I32s(values) => values.iter().for_each(|value| out.extend(value.to_le_bytes())),
            Self::F32s(values) => values.iter().for_each(|value| out.extend(value.to_le_bytes())),
        }
    }
}

/// Everything up to the first tensor; tensors lie in the order given.
pub(crate) fn encode(keys: &[(String, Value)], tensors: &[Planned]) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(VERSION.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((keys.len() as u64).to_le_bytes());
    for (key, value) in keys {
        put_text(&mut out, key);
        value.put(&mut out);
    }
    let mut offset = 0u64;
    for tensor in tensors {
        put_text(&mut out, &tensor.name);
        out.extend((tensor.shape.len() as u32).to_le_bytes());
        // GGUF counts dimensions from the innermost one.
        tensor.shape.iter().rev().for_each(|size| out.extend(size.to_le_bytes()));
        out.extend(tensor.kind.number().to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset += tensor.padded_bytes();
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT as usize), 0);
    out
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}
