use std::path::PathBuf;

use serde_json::json;
use tch::{Device, Kind, Tensor};

use super::*;

/// A file of this header and as many zero bytes after it.
fn write(dir: &Path, name: &str, header: &str, data: usize) -> PathBuf {
    let path = dir.join(name);
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    std::fs::write(&path, bytes).unwrap();
    path
}

fn tensor(dtype: &str, shape: &[u64], begin: u64, end: u64) -> Value {
    json!({ "dtype": dtype, "shape": shape, "data_offsets": [begin, end] })
}

fn error(dir: &Path, header: &Value, data: usize) -> String {
    let path = write(dir, "a.safetensors", &header.to_string(), data);
    SafetensorsFile::open(&path).map(|_| panic!("{header} was taken")).unwrap_err().to_string()
}

#[test]
fn a_header_that_lies_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let cases = [
        (
            json!({ "a": tensor("F32", &[2], 0, 8), "b": tensor("F32", &[2], 4, 12) }),
            12,
            "\"b\" overlaps the tensor before it",
        ),
        (
            json!({ "a": tensor("F32", &[2], 0, 8), "b": tensor("F32", &[1], 12, 16) }),
            16,
            "\"b\" leaves a gap before it",
        ),
        (json!({ "a": tensor("F32", &[2], 8, 0) }), 8, "ends at 0, before its start 8"),
        (json!({ "a": tensor("F32", &[3], 0, 8) }), 8, "holds 8 bytes, but F32 of shape [3] needs 12"),
        (json!({ "a": tensor("F32", &[u64::MAX, u64::MAX], 0, 8) }), 8, "needs more than there are"),
        (json!({ "a": tensor("F32", &[2], 0, 8) }), 9, "1 bytes follow the last tensor"),
        (json!({ "a": tensor("I16", &[4], 0, 8) }), 8, "\"a\" is I16; supported are F32, F16, BF16, F64"),
        (json!({ "a": { "dtype": "F32", "shape": [2] } }), 8, "lacks \"data_offsets\""),
        (json!({ "a": { "dtype": "F32", "shape": [-2], "data_offsets": [0, 8] } }), 8, "\"shape\" holds -2, no size"),
        (json!({ "a": { "dtype": "F32", "shape": [2], "data_offsets": [0, 8, 9] } }), 8, "must be two numbers"),
        (json!({ "a": 3 }), 0, "lacks \"dtype\""),
        (json!([1]), 0, "the header is not a JSON object"),
    ];
    for (header, data, expect) in cases {
        let error = error(dir.path(), &header, data);
        assert!(error.contains("a.safetensors: ") && error.contains(expect), "{error}");
    }
}

#[test]
fn a_short_file_says_what_was_expected() {
    let dir = tempfile::tempdir().unwrap();
    let header = json!({ "a": tensor("F32", &[4], 0, 16) }).to_string();
    let path = write(dir.path(), "a.safetensors", &header, 16);
    let whole = std::fs::metadata(&path).unwrap().len();
    for (length, expected) in [(whole - 1, whole), (whole - 16, whole), (20, 8 + header.len() as u64), (3, 8), (0, 8)] {
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(length).unwrap();
        match SafetensorsFile::open(&path).map(|_| panic!("{length} bytes were taken")).unwrap_err() {
            Error::Truncated { path, expected: said, actual } => {
                assert!(path.ends_with("a.safetensors"));
                assert_eq!((said, actual), (expected, length));
            }
            other => panic!("{other}"),
        }
    }
}

#[test]
fn a_header_longer_than_the_file_or_the_format_allows() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    std::fs::write(&path, [&1000_u64.to_le_bytes()[..], b"{}"].concat()).unwrap();
    let error = SafetensorsFile::open(&path).map(|_| ()).unwrap_err();
    assert!(matches!(error, Error::Truncated { expected: 1008, actual: 10, .. }), "{error}");
    for length in [u64::MAX, u64::MAX - 8, 1 << 60] {
        std::fs::write(&path, [&length.to_le_bytes()[..], b"{}"].concat()).unwrap();
        let error = SafetensorsFile::open(&path).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("is this a safetensors file?"), "{error}");
    }
}

#[test]
fn every_cut_and_every_flipped_header_byte_is_an_answer() {
    let dir = tempfile::tempdir().unwrap();
    let header = json!({ "a": tensor("F32", &[2, 1], 0, 8), "b": tensor("BF16", &[3], 8, 14) }).to_string();
    let path = write(dir.path(), "a.safetensors", &header, 14);
    let sound = std::fs::read(&path).unwrap();
    assert!(SafetensorsFile::open(&path).is_ok());
    for at in 0..8 + header.len() {
        for flip in [1, 0x20, 0x80] {
            let mut bytes = sound.clone();
            bytes[at] ^= flip;
            std::fs::write(&path, &bytes).unwrap();
            if let Ok(file) = SafetensorsFile::open(&path) {
                for name in file.names() {
                    assert!(file.get(name).is_some(), "byte {at}");
                }
            }
        }
    }
    for length in 0..sound.len() {
        std::fs::write(&path, &sound[..length]).unwrap();
        assert!(SafetensorsFile::open(&path).is_err(), "{length} bytes");
    }
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
            let (entry, bytes, _) = folder.get(name).unwrap();
            let read = Tensor::f_from_data_size(bytes, &entry.shape, entry.dtype.kind()).unwrap();
            assert_eq!(read.to_kind(Kind::Float), *tensor);
        }
    }
    let error = safetensors::write(&path, &tensors, Kind::Int8).unwrap_err().to_string();
    assert!(error.contains("say f32, f16 or bf16"), "{error}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside the file");
}

#[test]
fn an_index_that_lies_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "one.safetensors", &json!({ "a": tensor("F32", &[2], 0, 8) }).to_string(), 8);
    let cases = [
        (json!({ "weight_map": { "a": "../one.safetensors" } }), "outside the folder"),
        (json!({ "weight_map": { "a": "/one.safetensors" } }), "outside the folder"),
        (json!({ "weight_map": { "a": "x/one.safetensors" } }), "outside the folder"),
        (json!({ "weight_map": { "a": 3 } }), "is not a name"),
        (json!({ "weight_map": {} }), "names 0 files"),
        (json!({ "weight_map": [] }), "lacks an object \"weight_map\""),
        (json!({ "weight_map": { "b": "one.safetensors" } }), "tensor \"b\" is not in"),
        (json!({ "weight_map": { "a": "two.safetensors" } }), "two.safetensors: no such file"),
    ];
    for (index, expect) in cases {
        std::fs::write(dir.path().join(INDEX), index.to_string()).unwrap();
        let error = Folder::open(dir.path()).map(|_| panic!("{index} was taken")).unwrap_err().to_string();
        assert!(error.contains(expect), "{error}");
    }
    std::fs::write(dir.path().join(INDEX), json!({ "weight_map": { "a": "one.safetensors" } }).to_string()).unwrap();
    assert!(Folder::open(dir.path()).unwrap().get("a").is_some());
}

#[test]
fn a_folder_without_weights_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let error = Folder::open(dir.path()).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("model.safetensors") && error.contains(INDEX), "{error}");
    let absent = dir.path().join("absent");
    let error = Folder::open(&absent).map(|_| ()).unwrap_err().to_string();
    assert!(error.ends_with("absent: no such file or folder"), "{error}");
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
        (tensor("F32", &[3], 6, 18), &three[..], "it must be one number, or 2, of F32 or BF16"),
        (tensor("I8", &[2], 6, 8), &[1, 1][..], "it must be one number, or 2, of F32 or BF16"),
        (tensor("F32", &[1], 6, 10), &nan[..], "holds NaN; a scale is a number"),
    ] {
        let folder = scaled(dir.path(), "F8_E4M3", &scale, bytes);
        for error in [folder.matrix("w").err(), folder.tensor("w", &[2, 3], Device::Cpu, Kind::Float).err()] {
            let error = error.unwrap().to_string();
            assert!(error.contains(expect), "{error}");
        }
    }
}
