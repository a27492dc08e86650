//! Writing `model.safetensors` as a stream: the header first, from names and shapes alone, then
//! each tensor's bytes in order. Format: <https://huggingface.co/docs/safetensors>.

use std::io::Write;
use std::path::{Path, PathBuf};

use retort_core::{Code, Error, Result};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::digest::hex;
use crate::{Phase, Progress};

/// The largest single file that is written, and so the bound under which sizes are computed.
pub(crate) const MAX_BYTES: u64 = 1 << 44;

/// Of stored values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dtype {
    // In the order they are written: wider first, so that every tensor is aligned.
    F32,
    F16,
    BF16,
}

impl Dtype {
    /// Of one value.
    pub fn bytes(self) -> u64 {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
            Dtype::BF16 => "BF16",
        }
    }

    /// As `config.json` calls it.
    pub(crate) fn torch_name(self) -> &'static str {
        match self {
            Dtype::F32 => "float32",
            Dtype::F16 => "float16",
            Dtype::BF16 => "bfloat16",
        }
    }

    pub(crate) fn parse(name: &str) -> Option<Self> {
        [Dtype::F32, Dtype::F16, Dtype::BF16].into_iter().find(|dtype| dtype.name() == name)
    }

    /// Whether every value of these little-endian bytes is finite.
    pub fn is_finite(self, bytes: &[u8]) -> bool {
        match self {
            Dtype::F32 => bytes.as_chunks::<4>().0.iter().all(|b| u32::from_le_bytes(*b) & 0x7f80_0000 != 0x7f80_0000),
            Dtype::F16 => bytes.as_chunks::<2>().0.iter().all(|b| u16::from_le_bytes(*b) & 0x7c00 != 0x7c00),
            Dtype::BF16 => bytes.as_chunks::<2>().0.iter().all(|b| u16::from_le_bytes(*b) & 0x7f80 != 0x7f80),
        }
    }
}

/// A tensor of a safetensors file: row-major, little-endian.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<u64>,
    /// Bytes: the product of the shape times the width of the dtype.
    pub bytes: u64,
}

impl Entry {
    pub(crate) fn new(name: impl Into<String>, dtype: Dtype, shape: Vec<u64>) -> Result<Self> {
        let name = name.into();
        let bytes = shape.iter().try_fold(dtype.bytes(), |bytes, dim| bytes.checked_mul(*dim));
        match bytes.filter(|bytes| *bytes <= MAX_BYTES) {
            Some(bytes) => Ok(Self { name, dtype, shape, bytes }),
            None => Err(Error::new(
                Code::ModelUnsupported,
                format!("tensor \"{name}\" of shape {shape:?} is larger than the {MAX_BYTES} bytes retort writes"),
            )),
        }
    }

    pub fn elements(&self) -> u64 {
        self.bytes / self.dtype.bytes()
    }
}

/// Length prefix and JSON, padded to 8 bytes; tensors lie in the order of `entries`.
pub(crate) fn header(entries: &[Entry]) -> Vec<u8> {
    let mut object = Map::new();
    object.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut start = 0;
    for entry in entries {
        let end = start + entry.bytes;
        let described = json!({"dtype": entry.dtype.name(), "shape": entry.shape, "data_offsets": [start, end]});
        object.insert(entry.name.clone(), described);
        start = end;
    }
    let mut text = Value::Object(object).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.append(&mut text);
    header
}

/// Sorts so that wider types come first, else keeping the order.
pub(crate) fn order<T>(items: &mut [T], dtype: impl Fn(&T) -> Dtype) {
    items.sort_by_key(dtype);
}

/// Where weights are written: hashes, counts, reports progress and refuses non-finite values.
pub(crate) struct Sink<'a, W: Write> {
    file: W,
    path: PathBuf,
    hasher: Sha256,
    written: u64,
    total: u64,
    progress: &'a mut dyn FnMut(Progress),
}

impl<'a, W: Write> Sink<'a, W> {
    /// Writes the header of `entries` at once; the tensors follow in that order.
    pub(crate) fn start(
        file: W,
        path: &Path,
        entries: &[Entry],
        progress: &'a mut dyn FnMut(Progress),
    ) -> Result<Self> {
        let header = header(entries);
        let total = file_bytes(entries);
        let mut sink = Self { file, path: path.to_owned(), hasher: Sha256::new(), written: 0, total, progress };
        sink.put_raw(&header)?;
        Ok(sink)
    }

    /// A part of `entry`'s values.
    pub(crate) fn put(&mut self, entry: &Entry, bytes: &[u8]) -> Result<()> {
        if !entry.dtype.is_finite(bytes) {
            return Err(Error::new(
                Code::ModelMalformed,
                format!(
                    "tensor \"{}\" holds a value that is not finite; the source is damaged, download it again",
                    entry.name
                ),
            ));
        }
        self.put_raw(bytes)
    }

    /// The file, its SHA-256 and its length, once all tensors are written.
    pub(crate) fn finish(mut self) -> Result<(W, String, u64)> {
        if self.written != self.total {
            return Err(Error::internal(format!(
                "{}: wrote {} bytes of {}",
                self.path.display(),
                self.written,
                self.total
            )));
        }
        self.file.flush().map_err(|error| Error::io(&self.path, error))?;
        Ok((self.file, hex(&self.hasher.finalize()), self.written))
    }

    fn put_raw(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|error| Error::io(&self.path, error))?;
        self.hasher.update(bytes);
        self.written += bytes.len() as u64;
        (self.progress)(Progress { phase: Phase::Writing, done: self.written, total: self.total });
        Ok(())
    }
}

/// Bytes of the file that `entries` become.
pub(crate) fn file_bytes(entries: &[Entry]) -> u64 {
    entries.iter().map(|entry| entry.bytes).fold(header(entries).len() as u64, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Full;

    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::StorageFull.into())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_full_disk_has_its_own_code() {
        let entries = [Entry::new("a", Dtype::F32, vec![2]).unwrap()];
        let mut quiet = |_| {};
        let error = Sink::start(Full, Path::new("model.safetensors"), &entries, &mut quiet).err().unwrap();
        assert_eq!(error.code, Code::DiskFull);
    }

    #[test]
    fn the_official_reader_accepts_the_stream() {
        let mut entries =
            vec![Entry::new("b", Dtype::BF16, vec![3]).unwrap(), Entry::new("a", Dtype::F32, vec![2, 1]).unwrap()];
        order(&mut entries, |entry| entry.dtype);
        let mut quiet = |_| {};
        let mut sink = Sink::start(Vec::new(), Path::new("x"), &entries, &mut quiet).unwrap();
        sink.put(&entries[0], &[0, 0, 128, 63, 0, 0, 0, 64]).unwrap();
        sink.put(&entries[1], &[1, 0, 2, 0, 3, 0]).unwrap();
        let (bytes, sha256, length) = sink.finish().unwrap();
        assert_eq!((length, sha256.len()), (bytes.len() as u64, 64));
        let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(read.tensor("a").unwrap().data(), [0, 0, 128, 63, 0, 0, 0, 64]);
        assert_eq!(read.tensor("b").unwrap().shape(), [3]);
    }

    #[test]
    fn infinities_and_nans_are_refused() {
        assert!(!Dtype::F32.is_finite(&f32::NAN.to_le_bytes()));
        assert!(!Dtype::F32.is_finite(&f32::NEG_INFINITY.to_le_bytes()));
        assert!(!Dtype::F16.is_finite(&half::f16::INFINITY.to_le_bytes()));
        assert!(!Dtype::BF16.is_finite(&half::bf16::NAN.to_le_bytes()));
        assert!(Dtype::F32.is_finite(&f32::MAX.to_le_bytes()));
        assert!(Dtype::F16.is_finite(&half::f16::MIN.to_le_bytes()));
    }
}
