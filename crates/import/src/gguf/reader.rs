//! The structure of a GGUF file (versions 2 and 3): metadata and where each tensor lies. Nothing is
//! believed: a count or a length is compared with the bytes that are left before memory is taken.
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

use std::collections::BTreeMap;
use std::io::Read;

use retort_core::{Code, Error, Result};

use super::metadata::{Array, Metadata, Value};
use super::quant::{self, Kind};

/// Metadata is mostly the vocabulary; 256,000 tokens take about 8 MB.
const MAX_METADATA: u64 = 128 << 20;
const MAX_KEYS: u64 = 1 << 16;
/// A dense 405B model has 1,138.
const MAX_TENSORS: u64 = 1 << 16;
const MAX_KEY: u64 = 1 << 16;
const MAX_TENSOR_NAME: u64 = 256;
const MAX_ARRAY: u64 = 1 << 24;
const MAX_ALIGNMENT: u64 = 1 << 20;

/// What a GGUF file says of itself.
#[derive(Debug)]
pub(crate) struct Gguf {
    pub(crate) version: u32,
    pub(crate) metadata: Metadata,
    pub(crate) tensors: BTreeMap<String, Tensor>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tensor {
    pub(crate) kind: Kind,
    /// Row-major: GGUF's dimensions reversed.
    pub(crate) shape: Vec<u64>,
    /// From the start of the file, in bytes.
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

impl Gguf {
    /// Reads the structure from the start of a file of `length` bytes; `place` names it in errors.
    pub(crate) fn read(file: impl Read, length: u64, place: &str) -> Result<Self> {
        let mut reader = Reader { file, at: 0, length, place };
        if length < 4 || reader.take::<4>("the magic number")? != *b"GGUF" {
            return Err(reader.malformed("it does not begin with \"GGUF\"; is it a GGUF file?".to_owned()));
        }
        let version = reader.u32("the version")?;
        match version {
            2 | 3 => {}
            1 => return Err(reader.unsupported("GGUF version 1; convert it again with a current llama.cpp".to_owned())),
            _ if version.swap_bytes() <= 3 => {
                return Err(reader.unsupported("the file is big-endian; convert it to little-endian".to_owned()));
            }
            _ => return Err(reader.unsupported(format!("GGUF version {version}; retort reads 2 and 3"))),
        }
        let tensors = reader.u64("the number of tensors")?;
        let keys = reader.u64("the number of metadata keys")?;
        // Name length, number of dimensions, type and offset; key length, type and value.
        reader.check_count("tensors", tensors, MAX_TENSORS, 24)?;
        reader.check_count("metadata keys", keys, MAX_KEYS, 13)?;

        let mut values = BTreeMap::new();
        for _ in 0..keys {
            let key = reader.string("a metadata key", MAX_KEY)?;
            let kind = reader.u32(&key)?;
            let value = reader.value(&key, kind)?;
            if values.insert(key.clone(), value).is_some() {
                return Err(reader.malformed(format!("metadata key \"{key}\" comes twice")));
            }
        }
        let metadata = Metadata::new(values, place);
        let raw = (0..tensors).map(|_| reader.tensor()).collect::<Result<Vec<_>>>()?;

        let alignment = metadata.unsigned("general.alignment")?.unwrap_or(32);
        if !alignment.is_power_of_two() || alignment > MAX_ALIGNMENT {
            return Err(reader.malformed(format!("general.alignment is {alignment}, not a power of two of sane size")));
        }
        let tensors = reader.place_tensors(raw, alignment)?;
        Ok(Self { version, metadata, tensors })
    }
}

struct Reader<'a, R: Read> {
    file: R,
    at: u64,
    length: u64,
    place: &'a str,
}

impl<R: Read> Reader<'_, R> {
    fn take<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.check_left(N as u64, what)?;
        self.file.read_exact(&mut bytes).map_err(|error| Error::io(self.place, error))?;
        self.at += N as u64;
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        self.take(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        self.take(what).map(u64::from_le_bytes)
    }

    fn bytes(&mut self, count: u64, what: &str) -> Result<Vec<u8>> {
        self.check_left(count, what)?;
        let mut bytes = vec![0; count as usize];
        self.file.read_exact(&mut bytes).map_err(|error| Error::io(self.place, error))?;
        self.at += count;
        Ok(bytes)
    }

    fn string(&mut self, what: &str, limit: u64) -> Result<String> {
        let count = self.u64(what)?;
        if count > limit {
            return Err(self.malformed(format!("{what} claims {count} bytes, more than the {limit} it may have")));
        }
        let bytes = self.bytes(count, what)?;
        String::from_utf8(bytes).map_err(|_| self.malformed(format!("{what} is not UTF-8")))
    }

    fn value(&mut self, key: &str, kind: u32) -> Result<Value> {
        Ok(match kind {
            0 => Value::Integer(i128::from(self.take::<1>(key)?[0])),
            1 => Value::Integer(i128::from(i8::from_le_bytes(self.take(key)?))),
            2 => Value::Integer(i128::from(u16::from_le_bytes(self.take(key)?))),
            3 => Value::Integer(i128::from(i16::from_le_bytes(self.take(key)?))),
            4 => Value::Integer(i128::from(self.u32(key)?)),
            5 => Value::Integer(i128::from(i32::from_le_bytes(self.take(key)?))),
            6 => Value::Float(shortest(f32::from_le_bytes(self.take(key)?))),
            7 => match self.take::<1>(key)? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => return Err(self.malformed(format!("metadata key \"{key}\" is the boolean {other}"))),
            },
            8 => Value::String(self.string(key, MAX_METADATA)?),
            9 => {
                let element = self.u32(key)?;
                let count = self.u64(key)?;
                Value::Array(self.array(key, element, count)?)
            }
            10 => Value::Integer(i128::from(self.u64(key)?)),
            11 => Value::Integer(i128::from(i64::from_le_bytes(self.take(key)?))),
            12 => Value::Float(f64::from_le_bytes(self.take(key)?)),
            _ => return Err(self.malformed(format!("metadata key \"{key}\" has the unknown type {kind}"))),
        })
    }

    fn array(&mut self, key: &str, element: u32, count: u64) -> Result<Array> {
        let width = match element {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => return Err(self.unsupported(format!("metadata key \"{key}\" is an array of arrays"))),
            _ => {
                return Err(self.malformed(format!("metadata key \"{key}\" is an array of the unknown type {element}")));
            }
        };
        self.check_count(&format!("elements of metadata key \"{key}\""), count, MAX_ARRAY, width)?;
        if element == 8 {
            let strings = (0..count).map(|_| self.string(key, MAX_METADATA)).collect::<Result<_>>()?;
            return Ok(Array::Strings(strings));
        }
        let bytes = self.bytes(count * width, key)?;
        let pairs = || bytes.as_chunks::<2>().0.iter().copied();
        let quads = || bytes.as_chunks::<4>().0.iter().copied();
        let octets = || bytes.as_chunks::<8>().0.iter().copied();
        Ok(match element {
            2 => Array::Integers(pairs().map(|b| i64::from(u16::from_le_bytes(b))).collect()),
            3 => Array::Integers(pairs().map(|b| i64::from(i16::from_le_bytes(b))).collect()),
            4 => Array::Integers(quads().map(|b| i64::from(u32::from_le_bytes(b))).collect()),
            5 => Array::Integers(quads().map(|b| i64::from(i32::from_le_bytes(b))).collect()),
            6 => Array::Floats(quads().map(|b| f64::from(f32::from_le_bytes(b))).collect()),
            11 => Array::Integers(octets().map(i64::from_le_bytes).collect()),
            12 => Array::Floats(octets().map(f64::from_le_bytes).collect()),
            // Bytes, booleans and 64-bit naturals: no key that is read has them.
            _ => Array::Opaque,
        })
    }

    fn tensor(&mut self) -> Result<RawTensor> {
        let name = self.string("a tensor's name", MAX_TENSOR_NAME)?;
        let dims = self.u32(&name)?;
        if dims == 0 || dims > 4 {
            return Err(self.malformed(format!("tensor \"{name}\" has {dims} dimensions, not 1 to 4")));
        }
        let mut shape = (0..dims).map(|_| self.u64(&name)).collect::<Result<Vec<u64>>>()?;
        let number = self.u32(&name)?;
        let offset = self.u64(&name)?;
        let Some(kind) = Kind::from_number(number) else {
            let read = Kind::ALL.map(Kind::name).join(", ");
            return Err(match quant::foreign_name(number) {
                Some(kind) => self.unsupported(format!("tensor \"{name}\" is {kind}; retort reads {read}")),
                None => self.malformed(format!("tensor \"{name}\" has the unknown type {number}; retort reads {read}")),
            });
        };
        if shape[0] % kind.block_values() != 0 {
            return Err(self.malformed(format!(
                "tensor \"{name}\" has rows of {} values, which blocks of {} do not fill ({})",
                shape[0],
                kind.block_values(),
                kind.name()
            )));
        }
        let values = shape.iter().try_fold(1u64, |values, dim| values.checked_mul(*dim));
        let bytes = values.and_then(|values| (values / kind.block_values()).checked_mul(kind.block_bytes()));
        let Some(bytes) = bytes.filter(|bytes| *bytes > 0) else {
            return Err(self.malformed(format!("tensor \"{name}\" of dimensions {shape:?} is empty or has no size")));
        };
        shape.reverse();
        Ok(RawTensor { name, tensor: Tensor { kind, shape, offset, bytes } })
    }

    /// Turns offsets into the data into offsets into the file, each checked.
    fn place_tensors(&self, raw: Vec<RawTensor>, alignment: u64) -> Result<BTreeMap<String, Tensor>> {
        let data = self.at.next_multiple_of(alignment);
        let mut spans = Vec::with_capacity(raw.len());
        let mut tensors = BTreeMap::new();
        let mut needed = 0u64;
        for RawTensor { name, mut tensor } in raw {
            if tensor.offset % alignment != 0 {
                return Err(self.malformed(format!(
                    "tensor \"{name}\" lies at offset {}, which is not a multiple of {alignment}",
                    tensor.offset
                )));
            }
            let end = data.checked_add(tensor.offset).and_then(|start| {
                tensor.offset = start;
                start.checked_add(tensor.bytes)
            });
            let Some(end) = end else {
                return Err(self.malformed(format!("tensor \"{name}\" lies beyond any file, at {}", tensor.offset)));
            };
            needed = needed.max(end);
            spans.push((tensor.offset, end, name.clone()));
            if tensors.insert(name.clone(), tensor).is_some() {
                return Err(self.malformed(format!("tensor \"{name}\" comes twice")));
            }
        }
        if needed > self.length {
            return Err(Error::new(
                Code::GgufTruncated,
                format!(
                    "{}: the file has {} bytes, but its tensors need {needed}; download it again",
                    self.place, self.length
                ),
            ));
        }
        spans.sort();
        if let Some([one, other]) = spans.array_windows().find(|[one, other]| one.1 > other.0) {
            return Err(self.malformed(format!("tensors \"{}\" and \"{}\" overlap", one.2, other.2)));
        }
        Ok(tensors)
    }

    fn check_left(&self, count: u64, what: &str) -> Result<()> {
        let end = self.at.checked_add(count);
        match end {
            Some(end) if end <= self.length && end <= MAX_METADATA => Ok(()),
            Some(end) if end <= self.length => {
                Err(self
                    .malformed(format!("{what} ends at byte {end}, beyond the {MAX_METADATA} that metadata may take")))
            }
            _ => Err(self.truncated(count, what)),
        }
    }

    /// That `count` things of at least `width` bytes can follow.
    fn check_count(&self, what: &str, count: u64, limit: u64, width: u64) -> Result<()> {
        if count > limit {
            return Err(self.malformed(format!("it claims {count} {what}, more than the {limit} it may have")));
        }
        if count * width > self.length - self.at {
            return Err(self.truncated(count * width, what));
        }
        Ok(())
    }

    fn truncated(&self, count: u64, what: &str) -> Error {
        Error::new(
            Code::GgufTruncated,
            format!(
                "{}: the file has {} bytes, but {what} at byte {} needs {count} more; download it again",
                self.place, self.length, self.at
            ),
        )
    }

    fn malformed(&self, what: String) -> Error {
        Error::new(Code::GgufMalformed, format!("{}: {what}", self.place))
    }

    fn unsupported(&self, what: String) -> Error {
        Error::new(Code::ModelUnsupported, format!("{}: {what}", self.place))
    }
}

struct RawTensor {
    name: String,
    tensor: Tensor,
}

/// The f64 of the shortest decimal that names this f32: 1e-5, not 9.999999747378752e-6.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or_else(|_| f64::from(value))
}
