//! The safetensors container's header: eight bytes of its length, then JSON; the tensors' bytes follow.
//!
//! Everything a header claims is checked against the file's size: ranges lie inside, follow each other without gap or
//! overlap, and hold as many bytes as shape and dtype need. Format: <https://huggingface.co/docs/safetensors>.

use std::{
    collections::BTreeMap,
    io::Read as _,
    path::{Path, PathBuf},
};

use retort_core::{Code, Error, Result};
use serde_json::Value;

use super::{cut, shown};
use crate::file::{malformed, open_regular, unsupported};

/// The limit the format itself sets on a header.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Sizes of a shape. A model's weights have two.
const MAX_SIZES: usize = 8;

/// Number formats of stored tensors that retort reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    F64,
    F32,
    F16,
    Bf16,
    /// With a scale beside it.
    I8,
    /// With a scale beside it.
    F8E4m3,
}

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredTensor {
    pub dtype: Dtype,
    pub shape: Vec<i64>,
    /// From the start of the file, bytes.
    pub offset: u64,
    /// As many as shape and dtype need.
    pub bytes: u64,
}

/// A file whose header has been checked.
#[derive(Debug)]
pub struct WeightFile {
    path: PathBuf,
    place: String,
    tensors: BTreeMap<String, StoredTensor>,
}

impl Dtype {
    pub fn name(self) -> &'static str {
        match self {
            Self::F64 => "F64",
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::I8 => "I8",
            Self::F8E4m3 => "F8_E4M3",
        }
    }

    /// Of one number.
    pub fn bytes(self) -> u64 {
        match self {
            Self::F64 => 8,
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::I8 | Self::F8E4m3 => 1,
        }
    }

    /// Whether its numbers mean nothing without a scale.
    pub fn is_scaled(self) -> bool {
        matches!(self, Self::I8 | Self::F8E4m3)
    }

    fn parse(name: &str) -> Option<Self> {
        [Self::F64, Self::F32, Self::F16, Self::Bf16, Self::I8, Self::F8E4m3]
            .into_iter()
            .find(|dtype| dtype.name() == name)
    }
}

impl WeightFile {
    /// # Errors
    /// `file-not-found`, `file-unreadable`, `weights-truncated`, `model-malformed`, `model-unsupported`; each names the
    /// file.
    pub fn open(path: &Path) -> Result<Self> {
        let failed = |error| Error::io(path, error);
        let place = path.display().to_string();
        let mut file = open_regular(path)?;
        let size = file.metadata().map_err(failed)?.len();
        if size < 8 {
            return Err(truncated(&place, 8, size));
        }
        let mut prefix = [0; 8];
        file.read_exact(&mut prefix).map_err(failed)?;
        let header_bytes = u64::from_le_bytes(prefix);
        if header_bytes > MAX_HEADER_BYTES {
            return Err(malformed(
                place,
                format!(
                    "header of {header_bytes} bytes, over the format's limit of {MAX_HEADER_BYTES}; is this a safetensors file?"
                ),
            ));
        }
        let data_start = 8 + header_bytes;
        if data_start > size {
            return Err(truncated(&place, data_start, size));
        }
        let mut header = Vec::new();
        (&mut file).take(header_bytes).read_to_end(&mut header).map_err(failed)?;
        let tensors = tensors(&place, &header, data_start, size)?;
        Ok(Self { path: path.to_owned(), place, tensors })
    }

    /// Its path, for errors.
    pub fn place(&self) -> &str {
        &self.place
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// By name, sorted.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &StoredTensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    pub fn get(&self, name: &str) -> Option<&StoredTensor> {
        self.tensors.get(name)
    }
}

/// Reads the header; the data starts `data_start` bytes into a file of `size` bytes.
fn tensors(place: &str, header: &[u8], data_start: u64, size: u64) -> Result<BTreeMap<String, StoredTensor>> {
    let value: Value =
        serde_json::from_slice(header).map_err(|error| malformed(place, format!("the header is not JSON: {error}")))?;
    let Value::Object(map) = value else {
        return Err(malformed(place, "the header is not a JSON object"));
    };
    let mut tensors = BTreeMap::new();
    for (name, value) in map.into_iter().filter(|(name, _)| name != "__metadata__") {
        let tensor = tensor(place, &name, &value, data_start)?;
        tensors.insert(name, tensor);
    }

    let mut ranges: Vec<_> = tensors.iter().map(|(name, tensor)| (tensor.offset, tensor.bytes, name)).collect();
    ranges.sort_unstable();
    let mut end = data_start;
    for (offset, bytes, name) in ranges {
        if offset != end {
            let fault = if offset < end { "overlaps the tensor before it" } else { "leaves a gap before it" };
            let (begin, end) = (offset - data_start, end - data_start);
            let name = shown(name);
            return Err(malformed(place, format!("tensor {name} {fault}: starts at {begin}, not {end}")));
        }
        end = offset.saturating_add(bytes);
    }
    match end.cmp(&size) {
        std::cmp::Ordering::Greater => Err(truncated(place, end, size)),
        std::cmp::Ordering::Less => Err(malformed(place, format!("{} bytes follow the last tensor", size - end))),
        std::cmp::Ordering::Equal => Ok(tensors),
    }
}

fn tensor(place: &str, name: &str, value: &Value, data_start: u64) -> Result<StoredTensor> {
    let wrong = |reason: String| malformed(place, format!("tensor {}: {reason}", shown(name)));
    let dtype = value.get("dtype").and_then(Value::as_str).ok_or_else(|| wrong("lacks \"dtype\"".into()))?;
    let dtype = Dtype::parse(dtype).ok_or_else(|| {
        let dtype: String = dtype.chars().take(40).collect();
        unsupported(
            place,
            format!(
                "tensor {} is {dtype}; supported are F32, F16, BF16, F64, and F8_E4M3 and I8 with scales",
                shown(name)
            ),
        )
    })?;
    let list = |field: &str| -> Result<Vec<u64>> {
        let list = value.get(field).and_then(Value::as_array).ok_or_else(|| wrong(format!("lacks \"{field}\"")))?;
        if list.len() > MAX_SIZES {
            return Err(wrong(format!("\"{field}\" holds {} numbers, more than {MAX_SIZES}", list.len())));
        }
        list.iter()
            .map(|number| {
                number.as_u64().ok_or_else(|| wrong(format!("\"{field}\" holds {}, no size", cut(&number.to_string()))))
            })
            .collect()
    };
    let shape = list("shape")?;
    let &[begin, end] = list("data_offsets")?.as_slice() else {
        return Err(wrong("\"data_offsets\" must be two numbers".into()));
    };
    let held = end.checked_sub(begin).ok_or_else(|| wrong(format!("ends at {end}, before its start {begin}")))?;
    let needed = shape.iter().try_fold(dtype.bytes(), |bytes, &size| bytes.checked_mul(size));
    if needed != Some(held) {
        return Err(wrong(format!("holds {held} bytes, but {} of shape {shape:?} needs {}", dtype.name(), {
            needed.map_or("more than there are".to_owned(), |needed| needed.to_string())
        })));
    }
    let shape = shape.into_iter().map(|size| i64::try_from(size).unwrap_or(i64::MAX)).collect();
    Ok(StoredTensor { dtype, shape, offset: data_start.saturating_add(begin), bytes: held })
}

fn truncated(place: &str, expected: u64, actual: u64) -> Error {
    Error::new(
        Code::WeightsTruncated,
        format!("{place}: the file ends at byte {actual} of {expected}; copy or download it again"),
    )
}
