//! Reading a safetensors file's header: what lies where, checked against the file's length.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use retort_core::{Code, Error, Result};
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

/// As the format's own limit.
const MAX_HEADER: u64 = 100_000_000;

/// One tensor of a safetensors file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stored {
    pub(crate) name: String,
    /// As written in the header, e.g. `BF16`.
    pub(crate) dtype: String,
    pub(crate) shape: Vec<u64>,
    /// From the start of the file, in bytes.
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

/// The tensors of `path` in the order they lie.
pub(crate) fn read(path: &Path) -> Result<Vec<Stored>> {
    let mut file = File::open(path).map_err(|error| Error::io(path, error))?;
    let length = file.metadata().map_err(|error| Error::io(path, error))?.len();
    let shown = path.display();
    let truncated = |needed: u64| {
        Error::new(
            Code::WeightsTruncated,
            format!("{shown}: the file has {length} bytes, but needs {needed}; download it again"),
        )
    };
    if length < 8 {
        return Err(truncated(8));
    }
    let mut prefix = [0; 8];
    file.read_exact(&mut prefix).map_err(|error| Error::io(path, error))?;
    let header_bytes = u64::from_le_bytes(prefix);
    if header_bytes > MAX_HEADER {
        return Err(malformed(
            path,
            format!("its header claims {header_bytes} bytes, more than the format's {MAX_HEADER}; is it safetensors?"),
        ));
    }
    let data = 8 + header_bytes;
    if data > length {
        return Err(truncated(data));
    }
    let mut text = vec![0; header_bytes as usize];
    file.read_exact(&mut text).map_err(|error| Error::io(path, error))?;
    let Header(mut tensors) =
        serde_json::from_slice(&text).map_err(|error| malformed(path, format!("its header is not valid: {error}")))?;
    tensors.sort_by_key(|(_, raw)| raw.data_offsets);

    let mut end = 0;
    let mut stored = Vec::with_capacity(tensors.len());
    for (name, raw) in tensors {
        let [from, to] = raw.data_offsets;
        if from != end || to < from {
            return Err(malformed(
                path,
                format!("tensor \"{name}\" lies at bytes {from} to {to} of the data, but {end} is where it must start"),
            ));
        }
        let offset =
            data.checked_add(from).ok_or_else(|| malformed(path, format!("tensor \"{name}\" lies at {from}")))?;
        stored.push(Stored { name, dtype: raw.dtype, shape: raw.shape, offset, bytes: to - from });
        end = to;
    }
    match data.checked_add(end) {
        Some(needed) if needed == length => Ok(stored),
        Some(needed) if needed < length => {
            Err(malformed(path, format!("its tensors end at byte {needed}, but the file has {length}")))
        }
        needed => Err(truncated(needed.unwrap_or(u64::MAX))),
    }
}

fn malformed(path: &Path, what: String) -> Error {
    Error::new(Code::ModelMalformed, format!("{}: {what}", path.display()))
}

#[derive(Deserialize)]
struct Raw {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

struct Header(Vec<(String, Raw)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut tensors = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        tensors.push((name, map.next_value()?));
                    }
                }
                Ok(Header(tensors))
            }
        }

        deserializer.deserialize_map(Entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_bytes(bytes: &[u8]) -> Result<Vec<Stored>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        std::fs::write(&path, bytes).unwrap();
        read(&path)
    }

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes
    }

    #[test]
    fn reads_what_lies_where() {
        let header = r#"{"b":{"dtype":"F16","shape":[2],"data_offsets":[4,8]},"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
        let tensors = read_bytes(&file(header, &[0; 8])).unwrap();
        let names: Vec<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
        assert_eq!(tensors[1].offset, 8 + header.len() as u64 + 4);
    }

    #[test]
    fn refuses_bad_headers_with_a_code() {
        let one = |offsets: &str| format!(r#"{{"a":{{"dtype":"F32","shape":[1],"data_offsets":{offsets}}}}}"#);
        let cases: &[(Vec<u8>, Code)] = &[
            (vec![], Code::WeightsTruncated),
            (u64::MAX.to_le_bytes().to_vec(), Code::ModelMalformed),
            (1000u64.to_le_bytes().to_vec(), Code::WeightsTruncated),
            (file("{", &[]), Code::ModelMalformed),
            (file("[]", &[]), Code::ModelMalformed),
            (file(&one("[0,4]"), &[0; 3]), Code::WeightsTruncated),
            (file(&one("[0,4]"), &[0; 5]), Code::ModelMalformed),
            (file(&one("[4,0]"), &[0; 4]), Code::ModelMalformed),
            (file(&one("[0,18446744073709551615]"), &[0; 4]), Code::WeightsTruncated),
            (file(&one("[-1,3]"), &[0; 4]), Code::ModelMalformed),
            (file(r#"{"a":{"dtype":"F32","shape":[1]}}"#, &[0; 4]), Code::ModelMalformed),
        ];
        for (bytes, code) in cases {
            assert_eq!(read_bytes(bytes).unwrap_err().code, *code, "{:?}", String::from_utf8_lossy(bytes));
        }
    }
}
