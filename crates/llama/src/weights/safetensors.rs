//! The safetensors container: eight bytes of header length, a JSON header, then the tensors' bytes.
//!
//! A file is mapped, and everything its header claims is checked against the file's size before a
//! byte of a tensor is touched: ranges lie inside, follow each other without gap or overlap, and
//! hold as many bytes as shape and dtype need.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufWriter, Write},
    path::Path,
    sync::Arc,
};

use memmap2::Mmap;
use retort_kernels::Bytes;
use serde_json::{Map, Value, json};
use tch::{Kind, Tensor};

use crate::{Error, Result};

/// The limit the format itself sets on a header.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Of a tensor, written at a time: little enough to stay in a core's cache between the copy and the write.
const PIECE_BYTES: usize = 1 << 18;

/// Number formats of stored tensors that this crate reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dtype {
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
pub(crate) struct Entry {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<i64>,
    /// Offsets in the data, which starts after the header.
    begin: u64,
    end: u64,
}

/// A mapped file whose header has been checked.
pub(crate) struct SafetensorsFile {
    place: String,
    map: Arc<Mmap>,
    data_start: usize,
    entries: BTreeMap<String, Entry>,
}

impl Dtype {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::F64 => "F64",
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::I8 => "I8",
            Self::F8E4m3 => "F8_E4M3",
        }
    }

    pub(crate) fn kind(self) -> Kind {
        match self {
            Self::F64 => Kind::Double,
            Self::F32 => Kind::Float,
            Self::F16 => Kind::Half,
            Self::Bf16 => Kind::BFloat16,
            Self::I8 => Kind::Int8,
            Self::F8E4m3 => Kind::Float8e4m3fn,
        }
    }

    fn from_kind(kind: Kind) -> Result<Self> {
        match kind {
            Kind::Double => Ok(Self::F64),
            Kind::Float => Ok(Self::F32),
            Kind::Half => Ok(Self::F16),
            Kind::BFloat16 => Ok(Self::Bf16),
            other => Err(Error::Invalid(format!("weights cannot be stored as {other:?}; say f32, f16 or bf16"))),
        }
    }

    fn parse(name: &str) -> Option<Self> {
        [Self::F64, Self::F32, Self::F16, Self::Bf16, Self::I8, Self::F8E4m3]
            .into_iter()
            .find(|dtype| dtype.name() == name)
    }

    fn bytes(self) -> u64 {
        match self {
            Self::F64 => 8,
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::I8 | Self::F8E4m3 => 1,
        }
    }

    /// Whether its numbers mean nothing without a scale.
    pub(crate) fn is_scaled(self) -> bool {
        matches!(self, Self::I8 | Self::F8E4m3)
    }
}

impl SafetensorsFile {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let place = path.display().to_string();
        let file = File::open(path).map_err(|error| Error::io(path, error))?;
        let size = file.metadata().map_err(|error| Error::io(path, error))?.len();
        if size < 8 {
            return Err(Error::Truncated { path: place, expected: 8, actual: size });
        }
        // SAFETY: the mapping is private and read only. Shrinking the file while a process reads it
        // is outside what can be defended here; weights are written under another name and renamed.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| Error::io(path, error))?;
        let header_bytes = u64::from_le_bytes(map[..8].try_into().unwrap_or_default());
        if header_bytes > MAX_HEADER_BYTES {
            return Err(Error::malformed(
                place,
                format!(
                    "header of {header_bytes} bytes, over the format's limit of {MAX_HEADER_BYTES}; is this a safetensors file?"
                ),
            ));
        }
        let data_start = 8 + header_bytes;
        if data_start > size {
            return Err(Error::Truncated { path: place, expected: data_start, actual: size });
        }
        let entries = entries(&place, &map[8..data_start as usize], size - data_start, size)?;
        Ok(Self { place, map: Arc::new(map), data_start: data_start as usize, entries })
    }

    pub(crate) fn place(&self) -> &str {
        &self.place
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    pub(crate) fn get(&self, name: &str) -> Option<(&Entry, &[u8])> {
        let entry = self.entries.get(name)?;
        let range = self.data_start + entry.begin as usize..self.data_start + entry.end as usize;
        Some((entry, self.map.get(range)?))
    }
}

impl SafetensorsFile {
    /// A tensor's bytes, where they are mapped.
    pub(crate) fn mapped(&self, name: &str) -> Option<Bytes> {
        let entry = self.entries.get(name)?;
        let at = |offset: u64| self.data_start + offset as usize;
        Bytes::new(self.map.clone(), at(entry.begin), at(entry.end))
    }
}

/// Writes tensors as numbers of one `kind`, in the order given; the file appears under its name complete or not at
/// all.
pub fn write(path: &Path, tensors: &[(String, Tensor)], kind: Kind) -> Result<()> {
    let table: Vec<_> = tensors.iter().map(|(name, tensor)| (name.clone(), tensor.size())).collect();
    let mut each = tensors.iter();
    write_each(path, &table, kind, |name| {
        let next = each.next().ok_or_else(|| Error::Invalid(format!("no tensor {name:?}")))?;
        Ok(next.1.shallow_clone())
    })
}

/// As [`write`], each tensor of the table made when its turn comes and dropped after it.
pub(crate) fn write_each(
    path: &Path,
    table: &[(String, Vec<i64>)],
    kind: Kind,
    mut make: impl FnMut(&str) -> Result<Tensor>,
) -> Result<()> {
    let dtype = Dtype::from_kind(kind)?;
    let mut header = Map::new();
    // transformers refuses a file that does not say which framework wrote it.
    header.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut end = 0;
    for (name, shape) in table {
        let begin = end;
        end += shape.iter().product::<i64>().unsigned_abs() * dtype.bytes();
        header.insert(name.clone(), json!({ "dtype": dtype.name(), "shape": shape, "data_offsets": [begin, end] }));
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');

    let partial = path.with_extension("safetensors.partial");
    let written = write_to(&partial, &header, table, kind, &mut make)
        .and_then(|()| std::fs::rename(&partial, path).map_err(|error| Error::io(path, error)));
    if written.is_err() {
        let _ = std::fs::remove_file(&partial);
    }
    written
}

fn write_to(
    path: &Path,
    header: &[u8],
    table: &[(String, Vec<i64>)],
    kind: Kind,
    make: &mut impl FnMut(&str) -> Result<Tensor>,
) -> Result<()> {
    let io = |error| Error::io(path, error);
    let mut file = BufWriter::new(File::create(path).map_err(io)?);
    file.write_all(&(header.len() as u64).to_le_bytes()).map_err(io)?;
    file.write_all(header).map_err(io)?;
    let number = kind.elt_size_in_bytes();
    let mut piece = vec![0; PIECE_BYTES];
    for (name, shape) in table {
        let tensor = make(name)?;
        if tensor.size() != *shape {
            return Err(Error::Invalid(format!("tensor {name:?} has shape {:?}, not {shape:?}", tensor.size())));
        }
        let tensor = tensor.f_detach()?.f_to_device(tch::Device::Cpu)?.f_to_kind(kind)?.f_contiguous()?;
        let (flat, count) = (tensor.f_view([-1])?, tensor.numel());
        for start in (0..count).step_by(PIECE_BYTES / number) {
            let length = (count - start).min(PIECE_BYTES / number);
            let bytes = &mut piece[..length * number];
            flat.f_narrow(0, start as i64, length as i64)?.f_copy_data_u8(bytes, length)?;
            file.write_all(bytes).map_err(io)?;
        }
    }
    let file = file.into_inner().map_err(|error| Error::io(path, error.into_error()))?;
    file.sync_all().map_err(io)
}

/// Reads the header; `data` bytes follow it in a file of `size` bytes.
fn entries(place: &str, header: &[u8], data: u64, size: u64) -> Result<BTreeMap<String, Entry>> {
    let value: Value = serde_json::from_slice(header)
        .map_err(|error| Error::malformed(place, format!("the header is not JSON: {error}")))?;
    let Value::Object(map) = value else {
        return Err(Error::malformed(place, "the header is not a JSON object"));
    };
    let mut entries = BTreeMap::new();
    for (name, value) in map.into_iter().filter(|(name, _)| name != "__metadata__") {
        let entry = entry(place, &name, &value)?;
        entries.insert(name, entry);
    }

    let mut ranges: Vec<_> = entries.iter().map(|(name, entry)| (entry.begin, entry.end, name)).collect();
    ranges.sort_unstable();
    let mut end = 0;
    for (begin, next, name) in ranges {
        if begin != end {
            let fault = if begin < end { "overlaps the tensor before it" } else { "leaves a gap before it" };
            return Err(Error::malformed(place, format!("tensor {name:?} {fault}: starts at {begin}, not {end}")));
        }
        end = next;
    }
    match end.cmp(&data) {
        std::cmp::Ordering::Greater => {
            Err(Error::Truncated { path: place.to_owned(), expected: (size - data).saturating_add(end), actual: size })
        }
        std::cmp::Ordering::Less => {
            Err(Error::malformed(place, format!("{} bytes follow the last tensor", data - end)))
        }
        std::cmp::Ordering::Equal => Ok(entries),
    }
}

fn entry(place: &str, name: &str, value: &Value) -> Result<Entry> {
    let wrong = |reason: String| Error::malformed(place, format!("tensor {name:?}: {reason}"));
    let dtype = value.get("dtype").and_then(Value::as_str).ok_or_else(|| wrong("lacks \"dtype\"".into()))?;
    let dtype = Dtype::parse(dtype).ok_or_else(|| {
        let shown: String = dtype.chars().take(40).collect();
        Error::unsupported(
            place,
            format!("tensor {name:?} is {shown}; supported are F32, F16, BF16, F64, and F8_E4M3 and I8 with scales"),
        )
    })?;
    let list = |field: &str| -> Result<Vec<u64>> {
        let list = value.get(field).and_then(Value::as_array).ok_or_else(|| wrong(format!("lacks \"{field}\"")))?;
        list.iter()
            .map(|number| number.as_u64().ok_or_else(|| wrong(format!("\"{field}\" holds {number}, no size"))))
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
    Ok(Entry { dtype, shape, begin, end })
}
