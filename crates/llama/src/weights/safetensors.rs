//! Writing the safetensors container: eight bytes of header length, a JSON header, then the tensors' bytes.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::Path,
};

use retort_model::Dtype;
use serde_json::{Map, Value, json};
use tch::{Kind, Tensor};

use crate::{Error, Result};

/// Of a tensor, written at a time: little enough to stay in a core's cache between the copy and the write.
const PIECE_BYTES: usize = 1 << 18;

/// As libtorch calls stored numbers.
pub(crate) fn kind_of(dtype: Dtype) -> Kind {
    match dtype {
        Dtype::F64 => Kind::Double,
        Dtype::F32 => Kind::Float,
        Dtype::F16 => Kind::Half,
        Dtype::Bf16 => Kind::BFloat16,
        Dtype::I8 => Kind::Int8,
        Dtype::F8E4m3 => Kind::Float8e4m3fn,
    }
}

fn dtype_of(kind: Kind) -> Result<Dtype> {
    match kind {
        Kind::Double => Ok(Dtype::F64),
        Kind::Float => Ok(Dtype::F32),
        Kind::Half => Ok(Dtype::F16),
        Kind::BFloat16 => Ok(Dtype::Bf16),
        other => Err(Error::Invalid(format!("weights cannot be stored as {other:?}; say f32, f16 or bf16"))),
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
    let dtype = dtype_of(kind)?;
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
