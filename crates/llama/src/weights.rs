//! A folder's weights, mapped: what they are, says `retort_model::WeightFolder`.

use std::{path::Path, sync::Arc};

use memmap2::Mmap;
use retort_kernels::{Bytes, Matrix, Storage};
use retort_model::{Config, Dtype, StoredTensor, WeightFile, WeightFolder};
use tch::{Device, Kind, Tensor};

use crate::{Error, Result, model::block::Weight};

pub(crate) mod safetensors;
#[cfg(test)]
mod tests;

use safetensors::kind_of;
pub use safetensors::write as write_tensors;

/// The open weights of a folder, checked but not read.
pub(crate) struct Folder {
    headers: WeightFolder,
    /// Of its files.
    maps: Vec<Arc<Mmap>>,
}

/// One file's tensors.
pub(crate) struct MappedFile {
    header: WeightFile,
    map: Arc<Mmap>,
}

impl MappedFile {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let header = WeightFile::open(path)?;
        let map = map(&header)?;
        Ok(Self { header, map })
    }

    pub(crate) fn header(&self) -> &WeightFile {
        &self.header
    }

    pub(crate) fn get(&self, name: &str) -> Option<(&StoredTensor, &[u8])> {
        let stored = self.header.get(name)?;
        Some((stored, slice(&self.map, stored)?))
    }
}

fn map(file: &WeightFile) -> Result<Arc<Mmap>> {
    let failed = |error| Error::io(file.path(), error);
    let opened = std::fs::File::open(file.path()).map_err(failed)?;
    // SAFETY: the mapping is private and read only. Shrinking the file while a process reads it
    // is outside what can be defended here; weights are written under another name and renamed.
    Ok(Arc::new(unsafe { Mmap::map(&opened) }.map_err(failed)?))
}

fn slice<'a>(map: &'a Mmap, stored: &StoredTensor) -> Option<&'a [u8]> {
    let begin = usize::try_from(stored.offset).ok()?;
    map.get(begin..begin.checked_add(usize::try_from(stored.bytes).ok()?)?)
}

impl Folder {
    pub(crate) fn open(dir: &Path) -> Result<Self> {
        let headers = WeightFolder::open(dir)?;
        let maps = headers.files().iter().map(map).collect::<Result<_>>()?;
        Ok(Self { headers, maps })
    }

    /// Tensor names, sorted.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.headers.names()
    }

    /// What a tensor is, and its bytes.
    pub(crate) fn get(&self, name: &str) -> Option<(&StoredTensor, &[u8])> {
        let (stored, at) = self.headers.get(name)?;
        Some((stored, slice(&self.maps[at], stored)?))
    }

    /// Compares the folder with the tensors, by name and shape, that a part of a model reads from it.
    pub(crate) fn require(&self, table: &[(String, Vec<i64>)]) -> Result<()> {
        Ok(self.headers.require(table)?)
    }

    /// That the folder holds this model's weights and no others.
    pub(crate) fn require_model(&self, config: &Config) -> Result<()> {
        Ok(self.headers.require_model(config)?)
    }

    /// Where the weights lie, for errors.
    pub(crate) fn place(&self) -> &str {
        self.headers.place()
    }

    fn missing(&self, name: &str) -> Error {
        Error::malformed(self.place(), format!("lacks tensor {name:?}"))
    }

    /// A copy of a tensor, which has been checked, on a device.
    pub(crate) fn tensor(&self, name: &str, shape: &[i64], device: Device, kind: Kind) -> Result<Tensor> {
        let (stored, bytes) = self.get(name).ok_or_else(|| self.missing(name))?;
        if stored.dtype.is_scaled() {
            return self.weight(name, device, kind)?.widened(kind);
        }
        let stored = Tensor::f_from_data_size(bytes, shape, kind_of(stored.dtype))?;
        Ok(stored.f_to_device(device)?.f_to_kind(kind)?)
    }

    /// As [`Folder::tensor`], but what is stored in bytes with scales stays so.
    pub(crate) fn weight(&self, name: &str, device: Device, kind: Kind) -> Result<Weight> {
        let (entry, bytes) = self.get(name).ok_or_else(|| self.missing(name))?;
        let stored = Tensor::f_from_data_size(bytes, &entry.shape, kind_of(entry.dtype))?.f_to_device(device)?;
        if !entry.dtype.is_scaled() {
            return Ok(Weight::Plain(stored.f_to_kind(kind)?));
        }
        let scales = self.scales(name, entry.shape.first().copied().unwrap_or(0))?;
        let scale_o1 = Tensor::f_from_slice(&scales)?.f_unsqueeze(1)?.f_to_device(device)?;
        Ok(Weight::Scaled { bytes_oi: stored, scale_o1 })
    }

    /// The scales of a weight stored in bytes, one a row.
    fn scales(&self, name: &str, rows: i64) -> Result<Vec<f32>> {
        let (of, count) = self.headers.require_scale(name, rows)?;
        let mut scales = vec![0.0; count];
        self.numbers(&of, 1, count)?.read_row(0, &mut scales);
        if let Some(bad) = scales.iter().find(|scale| !scale.is_finite()) {
            let reason = format!("tensor {of:?} holds {bad}; a scale is a number");
            return Err(Error::malformed(self.headers.place_of(&of), reason));
        }
        scales.resize(rows as usize, scales.first().copied().unwrap_or(0.0));
        Ok(scales)
    }

    /// A tensor of one or two axes, which has been checked, where it is mapped.
    pub(crate) fn matrix(&self, name: &str) -> Result<Matrix> {
        let (stored, _) = self.get(name).ok_or_else(|| self.missing(name))?;
        match stored.shape[..] {
            [columns] => self.numbers(name, 1, columns as usize),
            [rows, columns] => self.numbers(name, rows as usize, columns as usize),
            _ => Err(Error::unsupported(
                self.headers.place_of(name),
                format!("tensor {name:?} of shape {:?}", stored.shape),
            )),
        }
    }

    fn numbers(&self, name: &str, rows: usize, columns: usize) -> Result<Matrix> {
        let missing = || self.missing(name);
        let (stored, at) = self.headers.get(name).ok_or_else(missing)?;
        let (begin, end) = (stored.offset as usize, (stored.offset + stored.bytes) as usize);
        let bytes = Bytes::new(self.maps[at].clone(), begin, end).ok_or_else(missing)?;
        let storage = match stored.dtype {
            Dtype::F32 => Storage::F32,
            Dtype::Bf16 => Storage::Bf16,
            Dtype::F16 => Storage::F16,
            Dtype::I8 => Storage::Int8 { scales: self.scales(name, rows as i64)? },
            Dtype::F8E4m3 => Storage::F8E4m3 { scales: self.scales(name, rows as i64)? },
            Dtype::F64 => {
                return Err(Error::unsupported(
                    self.headers.files()[at].place(),
                    format!("tensor {name:?} is F64; store it as F32 or BF16"),
                ));
            }
        };
        Matrix::new(bytes, storage, rows, columns).ok_or_else(missing)
    }
}
