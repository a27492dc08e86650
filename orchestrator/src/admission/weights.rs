//! Whether a folder's safetensors files are whole, told from their headers and sizes.

use std::{
    collections::BTreeSet,
    io::Read as _,
    path::{Component, Path},
};

use retort_core::{Code, Error, Result};
use retort_model::open_regular;
use serde_json::Value;

/// Largest header and index read, bytes.
const MAX_HEADER_BYTES: u64 = 100_000_000;
const MAX_INDEX_BYTES: u64 = 64 << 20;

/// `weights-truncated` when a file ends before its tensors do, `model-malformed` when it is no
/// safetensors file, `file-not-found` when there are no weights.
pub fn check(folder: &Path) -> Result<()> {
    let single = folder.join("model.safetensors");
    let index = folder.join("model.safetensors.index.json");
    if single.exists() || !index.exists() {
        return check_file(&single);
    }
    for file in indexed_files(&index)? {
        check_file(&folder.join(file))?;
    }
    Ok(())
}

fn check_file(path: &Path) -> Result<()> {
    let failed = |error| Error::io(path, error);
    let mut file = open_regular(path)?;
    let size = file.metadata().map_err(failed)?.len();
    if size < 8 {
        return Err(truncated(path, size, 8));
    }
    let mut prefix = [0u8; 8];
    file.read_exact(&mut prefix).map_err(failed)?;
    let header_bytes = u64::from_le_bytes(prefix);
    if header_bytes > MAX_HEADER_BYTES {
        return Err(malformed(
            path,
            &format!("it says its header has {header_bytes} bytes, so it is no safetensors file"),
        ));
    }
    if size < 8 + header_bytes {
        return Err(truncated(path, size, 8 + header_bytes));
    }
    let mut header = Vec::new();
    file.take(header_bytes).read_to_end(&mut header).map_err(failed)?;
    let header: Value =
        serde_json::from_slice(&header).map_err(|error| malformed(path, &format!("its header is no JSON: {error}")))?;
    let tensors = header.as_object().ok_or_else(|| malformed(path, "its header is no JSON object"))?;
    let mut end = 0;
    for (name, tensor) in tensors.iter().filter(|(name, _)| *name != "__metadata__") {
        let last = tensor.get("data_offsets").and_then(|offsets| offsets.get(1)).and_then(Value::as_u64);
        end = end.max(last.ok_or_else(|| malformed(path, &format!("the tensor {name:?} has no data_offsets")))?);
    }
    let expected = (8 + header_bytes).saturating_add(end);
    if size < expected {
        return Err(truncated(path, size, expected));
    }
    Ok(())
}

/// The files that hold a model's tensors, each inside the folder.
fn indexed_files(index: &Path) -> Result<BTreeSet<String>> {
    let failed = |error| Error::io(index, error);
    let mut text = Vec::new();
    let file = open_regular(index)?;
    file.take(MAX_INDEX_BYTES + 1).read_to_end(&mut text).map_err(failed)?;
    if text.len() as u64 > MAX_INDEX_BYTES {
        return Err(malformed(index, &format!("it takes more than {MAX_INDEX_BYTES} bytes")));
    }
    let value: Value = serde_json::from_slice(&text).map_err(|error| malformed(index, &error.to_string()))?;
    let map = value
        .get("weight_map")
        .and_then(Value::as_object)
        .filter(|map| !map.is_empty())
        .ok_or_else(|| malformed(index, "it has no weight_map"))?;
    map.values()
        .map(|file| {
            let file = file.as_str().unwrap_or_default();
            let mut parts = Path::new(file).components();
            match (parts.next(), parts.next()) {
                (Some(Component::Normal(_)), None) => Ok(file.to_owned()),
                _ => Err(malformed(index, &format!("{file:?} is no file of this folder"))),
            }
        })
        .collect()
}

fn truncated(path: &Path, size: u64, expected: u64) -> Error {
    Error::new(
        Code::WeightsTruncated,
        format!("{}: the file ends at byte {size} of {expected}; copy or download it again", path.display()),
    )
}

fn malformed(path: &Path, what: &str) -> Error {
    Error::new(Code::ModelMalformed, format!("{}: {what}", path.display()))
}
