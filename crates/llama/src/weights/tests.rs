use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::*;

fn tensor(dtype: &str, shape: &[u64], begin: u64, end: u64) -> Value {
    json!({ "dtype": dtype, "shape": shape, "data_offsets": [begin, end] })
}

#[test]
fn written_tensors_read_back_in_every_kind() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let values = Tensor::from_slice(&[1.5_f32, -2.25, 0.0, 1024.0, 0.5, 3.0]).view([2, 3]);
    // A transposed view, which is not contiguous.
    let tensors = [("x".to_owned(), values.transpose(0, 1)), ("a.b".to_owned(), values.get(1))];
    // More than is written at a time, and no multiple of it.
    let large = Tensor::arange(100_003, (Kind::Float, Device::Cpu));
    safetensors::write(&path, &[("large".to_owned(), large.shallow_clone())], Kind::Float).unwrap();
    let read = Folder::open(dir.path()).unwrap().tensor("large", &[100_003], Device::Cpu, Kind::Float).unwrap();
    assert!(read.equal(&large));
    for kind in [Kind::Float, Kind::Half, Kind::BFloat16, Kind::Double] {
        safetensors::write(&path, &tensors, kind).unwrap();
        let folder = Folder::open(dir.path()).unwrap();
        assert_eq!(folder.names().collect::<Vec<_>>(), ["a.b", "x"]);
        for (name, tensor) in &tensors {
            let (stored, bytes) = folder.get(name).unwrap();
            let read = Tensor::f_from_data_size(bytes, &stored.shape, kind_of(stored.dtype)).unwrap();
            assert_eq!(read.to_kind(Kind::Float), *tensor);
        }
    }
    let error = safetensors::write(&path, &tensors, Kind::Int8).unwrap_err().to_string();
    assert!(error.contains("say f32, f16 or bf16"), "{error}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside the file");
}

/// Bytes with scales, as checkpoints have them: `w` and `w_scale` of a matrix of two rows of three.
fn scaled(dir: &Path, dtype: &str, scale: &Value, scale_bytes: &[u8]) -> Folder {
    let mut data = vec![0x38, 0xb8, 0x40, 0x01, 0x02, 0x7e];
    let mut header = json!({ "w": tensor(dtype, &[2, 3], 0, 6) });
    if !scale.is_null() {
        header["w_scale"] = scale.clone();
        data.extend_from_slice(scale_bytes);
    }
    let header = header.to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(&data);
    std::fs::write(dir.join("model.safetensors"), file).unwrap();
    Folder::open(dir).unwrap()
}

#[test]
fn bytes_with_scales_are_the_same_numbers_to_both_arithmetics() {
    let two: Vec<u8> = [2.0f32, 0.5].iter().flat_map(|x| x.to_le_bytes()).collect();
    let a_row = json!({ "dtype": "F32", "shape": [2, 1], "data_offsets": [6, 14] });
    let for_all = json!({ "dtype": "BF16", "shape": [], "data_offsets": [6, 8] });
    let half = 0x3f00u16.to_le_bytes();
    let dir = tempfile::tempdir().unwrap();
    for (dtype, scale, bytes, expected) in [
        ("F8_E4M3", &a_row, &two[..], [2.0, -2.0, 4.0, 0.5 / 512.0, 1.0 / 512.0, 224.0]),
        ("I8", &a_row, &two[..], [112.0, -144.0, 128.0, 0.5, 1.0, 63.0]),
        ("I8", &for_all, &half[..], [28.0, -36.0, 32.0, 0.5, 1.0, 63.0]),
    ] {
        let folder = scaled(dir.path(), dtype, scale, bytes);
        let wide = folder.tensor("w", &[2, 3], Device::Cpu, Kind::Float).unwrap();
        assert_eq!(Vec::<f32>::try_from(wide.flatten(0, -1)).unwrap(), expected, "{dtype}");
        let matrix = folder.matrix("w").unwrap();
        let mut rows = [0.0; 6];
        rows.chunks_mut(3).enumerate().for_each(|(row, out)| matrix.read_row(row, out));
        assert_eq!(rows, expected, "{dtype}");
    }
}

#[test]
fn bytes_without_sound_scales_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let nan = f32::NAN.to_le_bytes();
    let three = [1.0f32; 3].map(f32::to_le_bytes).concat();
    for (scale, bytes, expect) in [
        (Value::Null, &[][..], "its scale \"w_scale\" is missing"),
        (tensor("F32", &[3], 6, 18), &three[..], "it must be one number, or 2, of F32, F16 or BF16"),
        (tensor("I8", &[2], 6, 8), &[1, 1][..], "it must be one number, or 2, of F32, F16 or BF16"),
        (tensor("F32", &[1], 6, 10), &nan[..], "holds NaN; a scale is a number"),
    ] {
        let folder = scaled(dir.path(), "F8_E4M3", &scale, bytes);
        for error in [folder.matrix("w").err(), folder.tensor("w", &[2, 3], Device::Cpu, Kind::Float).err()] {
            let error = error.unwrap().to_string();
            assert!(error.contains(expect), "{error}");
        }
    }
}
