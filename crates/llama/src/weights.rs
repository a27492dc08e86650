//! A folder's weights: one safetensors file, or several and their index.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::Read as _,
    path::{Component, Path},
};

use retort_kernels::{Matrix, Storage};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::{Error, Result, model::block::Weight};

pub(crate) mod safetensors;
#[cfg(test)]
mod tests;

pub use safetensors::write as write_tensors;
use safetensors::{Dtype, Entry, SafetensorsFile};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const MAX_INDEX_BYTES: u64 = 1 << 26;
const MAX_FILES: usize = 4096;

/// The open weights of a folder, checked but not read.
pub(crate) struct Folder {
    files: Vec<SafetensorsFile>,
    /// Tensor name to its file.
    places: BTreeMap<String, usize>,
}

impl Folder {
    /// Opens `model.safetensors`, or else the files that `model.safetensors.index.json` names.
    pub(crate) fn open(dir: &Path) -> Result<Self> {
        let single = dir.join(SINGLE);
        if single.exists() {
            let file = SafetensorsFile::open(&single)?;
            let places = file.names().map(|name| (name.to_owned(), 0)).collect();
            return Ok(Self { files: vec![file], places });
        }
        let index = dir.join(INDEX);
        if index.exists() {
            return Self::open_sharded(dir, &index);
        }
        if !dir.is_dir() {
            return Err(Error::NotFound { path: dir.display().to_string() });
        }
        Err(Error::NotFound { path: format!("{} (nor {INDEX})", single.display()) })
    }

    /// Tensor names, sorted.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// What a tensor is, its bytes, and the file's name for errors.
    pub(crate) fn get(&self, name: &str) -> Option<(&Entry, &[u8], &str)> {
        let file = &self.files[*self.places.get(name)?];
        let (entry, bytes) = file.get(name)?;
        Some((entry, bytes, file.place()))
    }

    /// Compares the folder with the tensors, by name and shape, that a model reads from it.
    pub(crate) fn check(&self, table: &[(String, Vec<i64>)]) -> Result<()> {
        for (name, shape) in table {
            let Some((entry, _, place)) = self.get(name) else {
                return Err(Error::malformed(self.place(), format!("lacks tensor {name:?} of shape {shape:?}")));
            };
            if entry.shape != *shape {
                return Err(Error::malformed(
                    place,
                    format!("tensor {name:?} has shape {:?}; config.json calls for {shape:?}", entry.shape),
                ));
            }
        }
        Ok(())
    }

    /// A copy of a tensor, which has been checked, on a device.
    pub(crate) fn tensor(&self, name: &str, shape: &[i64], device: Device, kind: Kind) -> Result<Tensor> {
        let missing = || Error::malformed(self.place(), format!("lacks tensor {name:?}"));
        let (entry, bytes, _) = self.get(name).ok_or_else(missing)?;
        if entry.dtype.is_scaled() {
            return self.weight(name, device, kind)?.widened(kind);
        }
        let stored = Tensor::f_from_data_size(bytes, shape, entry.dtype.kind())?;
        Ok(stored.f_to_device(device)?.f_to_kind(kind)?)
    }

    /// As [`Folder::tensor`], but what is stored in bytes with scales stays so.
    pub(crate) fn weight(&self, name: &str, device: Device, kind: Kind) -> Result<Weight> {
        let missing = || Error::malformed(self.place(), format!("lacks tensor {name:?}"));
        let (entry, bytes, _) = self.get(name).ok_or_else(missing)?;
        let stored = Tensor::f_from_data_size(bytes, &entry.shape, entry.dtype.kind())?.f_to_device(device)?;
        if !entry.dtype.is_scaled() {
            return Ok(Weight::Plain(stored.f_to_kind(kind)?));
        }
        let scales = self.scales(name, entry.shape.first().copied().unwrap_or(0))?;
        let scale_o1 = Tensor::f_from_slice(&scales)?.f_unsqueeze(1)?.f_to_device(device)?;
        Ok(Weight::Scaled { bytes_oi: stored, scale_o1 })
    }

    /// The scales of a weight stored in bytes, one a row: the tensor `..weight_scale` beside `..weight`, one
    /// number for each row or one for all, as in Meta's Llama-3.1-405B-FP8.
    fn scales(&self, name: &str, rows: i64) -> Result<Vec<f32>> {
        let of = format!("{name}_scale");
        let (entry, _, place) = self.get(&of).ok_or_else(|| {
            Error::malformed(
                self.place(),
                format!("tensor {name:?} is stored in bytes, and its scale {of:?} is missing"),
            )
        })?;
        let count: i64 = entry.shape.iter().product();
        if (count != rows && count != 1) || entry.dtype.is_scaled() {
            let (shape, dtype) = (&entry.shape, entry.dtype.name());
            return Err(Error::malformed(
                place,
                format!(
                    "tensor {of:?} is {dtype} of shape {shape:?}; it must be one number, or {rows}, of F32 or BF16"
                ),
            ));
        }
        let mut scales = vec![0.0; count as usize];
        self.numbers(&of, 1, count as usize)?.read_row(0, &mut scales);
        if let Some(bad) = scales.iter().find(|scale| !scale.is_finite()) {
            return Err(Error::malformed(place, format!("tensor {of:?} holds {bad}; a scale is a number")));
        }
        scales.resize(rows as usize, scales.first().copied().unwrap_or(0.0));
        Ok(scales)
    }

    /// A tensor of one or two axes, which has been checked, where it is mapped.
    pub(crate) fn matrix(&self, name: &str) -> Result<Matrix> {
        let missing = || Error::malformed(self.place(), format!("lacks tensor {name:?}"));
        let (entry, _, place) = self.get(name).ok_or_else(missing)?;
        match entry.shape[..] {
            [columns] => self.numbers(name, 1, columns as usize),
            [rows, columns] => self.numbers(name, rows as usize, columns as usize),
            _ => Err(Error::unsupported(place, format!("tensor {name:?} of shape {:?}", entry.shape))),
        }
    }

    fn numbers(&self, name: &str, rows: usize, columns: usize) -> Result<Matrix> {
        let missing = || Error::malformed(self.place(), format!("lacks tensor {name:?}"));
        let file = &self.files[*self.places.get(name).ok_or_else(missing)?];
        let (entry, _) = file.get(name).ok_or_else(missing)?;
        let bytes = file.mapped(name).ok_or_else(missing)?;
        let storage = match entry.dtype {
            Dtype::F32 => Storage::F32,
            Dtype::Bf16 => Storage::Bf16,
            Dtype::F16 => Storage::F16,
            Dtype::I8 => Storage::Int8 { scales: self.scales(name, rows as i64)? },
            Dtype::F8E4m3 => Storage::F8E4m3 { scales: self.scales(name, rows as i64)? },
            Dtype::F64 => {
                return Err(Error::unsupported(
                    file.place(),
                    format!("tensor {name:?} is F64; store it as F32 or BF16"),
                ));
            }
        };
        Matrix::new(bytes, storage, rows, columns).ok_or_else(missing)
    }

    /// Where the weights lie, for errors.
    pub(crate) fn place(&self) -> &str {
        self.files.first().map_or("", SafetensorsFile::place)
    }

    fn open_sharded(dir: &Path, index: &Path) -> Result<Self> {
        let wrong = |reason: String| Error::malformed(index.display(), reason);
        let file = File::open(index).map_err(|error| Error::io(index, error))?;
        let mut text = Vec::new();
        file.take(MAX_INDEX_BYTES + 1).read_to_end(&mut text).map_err(|error| Error::io(index, error))?;
        if text.len() as u64 > MAX_INDEX_BYTES {
            return Err(wrong(format!("is too large for an index; at most {MAX_INDEX_BYTES} bytes")));
        }
        let value: Value = serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
        let map = value
            .get("weight_map")
            .and_then(Value::as_object)
            .ok_or_else(|| wrong("lacks an object \"weight_map\"".into()))?;

        let mut names = BTreeSet::new();
        for (tensor, file) in map {
            let file = file.as_str().ok_or_else(|| wrong(format!("the file of tensor {tensor:?} is not a name")))?;
            let mut parts = Path::new(file).components();
            if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
                return Err(wrong(format!("tensor {tensor:?} lies in {file:?}, outside the folder")));
            }
            names.insert(file);
        }
        if names.is_empty() || names.len() > MAX_FILES {
            return Err(wrong(format!("names {} files; it must be 1 to {MAX_FILES}", names.len())));
        }
        let files: Vec<_> = names.iter().map(|name| SafetensorsFile::open(&dir.join(name))).collect::<Result<_>>()?;
        let order: BTreeMap<&str, usize> = names.iter().enumerate().map(|(at, name)| (*name, at)).collect();
        let mut places = BTreeMap::new();
        for (tensor, file) in map {
            let at = order[file.as_str().unwrap_or_default()];
            if files[at].get(tensor).is_none() {
                return Err(wrong(format!("tensor {tensor:?} is not in {}", files[at].place())));
            }
            places.insert(tensor.clone(), at);
        }
        Ok(Self { files, places })
    }
}
