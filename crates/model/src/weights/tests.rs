use std::path::PathBuf;

use serde_json::json;

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
    WeightFile::open(&path).map(|_| panic!("{header} was taken")).unwrap_err().message
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
        let error = WeightFile::open(&path).map(|_| panic!("{length} bytes were taken")).unwrap_err();
        assert_eq!(error.code, Code::WeightsTruncated);
        let said = format!("a.safetensors: the file ends at byte {length} of {expected}; ");
        assert!(error.message.contains(&said), "{error}");
    }
}

#[test]
fn a_header_longer_than_the_file_or_the_format_allows() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    std::fs::write(&path, [&1000_u64.to_le_bytes()[..], b"{}"].concat()).unwrap();
    let error = WeightFile::open(&path).unwrap_err();
    assert!(error.message.contains("ends at byte 10 of 1008"), "{error}");
    for length in [u64::MAX, u64::MAX - 8, 1 << 60] {
        std::fs::write(&path, [&length.to_le_bytes()[..], b"{}"].concat()).unwrap();
        let error = WeightFile::open(&path).unwrap_err();
        assert_eq!(error.code, Code::ModelMalformed);
        assert!(error.message.contains("is this a safetensors file?"), "{error}");
    }
}

#[test]
fn every_cut_and_every_flipped_header_byte_is_an_answer() {
    let dir = tempfile::tempdir().unwrap();
    let header = json!({ "a": tensor("F32", &[2, 1], 0, 8), "b": tensor("BF16", &[3], 8, 14) }).to_string();
    let path = write(dir.path(), "a.safetensors", &header, 14);
    let sound = std::fs::read(&path).unwrap();
    assert!(WeightFile::open(&path).is_ok());
    for at in 0..8 + header.len() {
        for flip in [1, 0x20, 0x80] {
            let mut bytes = sound.clone();
            bytes[at] ^= flip;
            std::fs::write(&path, &bytes).unwrap();
            if let Ok(file) = WeightFile::open(&path) {
                let length = bytes.len() as u64;
                for (_, tensor) in file.tensors() {
                    assert!(tensor.offset.checked_add(tensor.bytes).is_some_and(|end| end <= length), "byte {at}");
                }
            }
        }
    }
    for length in 0..sound.len() {
        std::fs::write(&path, &sound[..length]).unwrap();
        assert!(WeightFile::open(&path).is_err(), "{length} bytes");
    }
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
        (json!({ "weight_map": { "a": "./one.safetensors" } }), "outside the folder"),
        (json!({ "weight_map": { "a": "two.safetensors" } }), "two.safetensors: no such file"),
    ];
    for (index, expect) in cases {
        std::fs::write(dir.path().join(INDEX), index.to_string()).unwrap();
        let error = WeightFolder::open(dir.path()).map(|_| panic!("{index} was taken")).unwrap_err();
        assert!(error.message.contains(expect), "{error}");
    }
    std::fs::write(dir.path().join(INDEX), json!({ "weight_map": { "a": "one.safetensors" } }).to_string()).unwrap();
    assert!(WeightFolder::open(dir.path()).unwrap().get("a").is_some());
}

#[test]
fn a_tensor_that_the_index_leaves_out_is_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let header = json!({ "a": tensor("F32", &[2], 0, 8), "b": tensor("F32", &[2], 8, 16) }).to_string();
    write(dir.path(), "one.safetensors", &header, 16);
    let index = json!({ "weight_map": { "a": "one.safetensors" } });
    std::fs::write(dir.path().join(INDEX), index.to_string()).unwrap();
    let folder = WeightFolder::open(dir.path()).unwrap();
    assert_eq!(folder.names().collect::<Vec<_>>(), ["a"]);
    let error = folder.require(&[("b".to_owned(), vec![2])]).unwrap_err();
    assert!(error.message.contains("lacks tensor \"b\""), "{error}");
}

#[test]
fn the_file_that_is_wrong_is_named() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "one.safetensors", &json!({ "a": tensor("F32", &[2], 0, 8) }).to_string(), 8);
    write(dir.path(), "two.safetensors", &json!({ "b": tensor("F32", &[2], 0, 8) }).to_string(), 8);
    let index = json!({ "weight_map": { "a": "one.safetensors", "b": "two.safetensors" } });
    std::fs::write(dir.path().join(INDEX), index.to_string()).unwrap();
    let error = WeightFolder::open(dir.path()).unwrap().require(&[("b".to_owned(), vec![3])]).unwrap_err();
    assert!(error.message.contains("two.safetensors: tensor \"b\" has shape [2]"), "{error}");
}

#[test]
fn names_and_shapes_out_of_a_file_are_cut_in_messages() {
    let dir = tempfile::tempdir().unwrap();
    let long = "x".repeat(100_000);
    let said =
        error(dir.path(), &json!({ long: { "dtype": "F32", "shape": vec![0; 100_000], "data_offsets": [0, 0] } }), 0);
    assert!(said.len() < 1000 && said.contains("\"shape\" holds 100000 numbers, more than 8"), "{said}");
}

#[test]
fn a_folder_without_weights_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let said = |dir: &Path| {
        let error = WeightFolder::open(dir).unwrap_err();
        assert_eq!(error.code, Code::FileNotFound);
        error.message
    };
    assert!(said(dir.path()).ends_with("neither model.safetensors nor model.safetensors.index.json is there"));
    assert!(said(&dir.path().join("absent")).ends_with("absent: no such folder"));
    std::fs::write(dir.path().join("pytorch_model.bin"), "").unwrap();
    assert!(said(dir.path()).ends_with("are pickled, save them with safe_serialization first"));
}

/// A tiny model's config, and its weights as `change` leaves them.
fn model(change: impl FnOnce(&mut BTreeMap<String, (String, Vec<i64>)>)) -> Result<()> {
    let config = Config::from_json(
        &"config.json",
        &json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4, "intermediate_size": 8,
            "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 6, "max_position_embeddings": 8,
            "tie_word_embeddings": true,
        }),
    )
    .unwrap();
    let mut held: BTreeMap<_, _> =
        config.tensors().into_iter().map(|(name, shape)| (name, ("F32".to_owned(), shape))).collect();
    change(&mut held);
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, (dtype, shape)) in &held {
        let width = match dtype.as_str() {
            "F32" => 4u64,
            "F64" => 8,
            _ => 1,
        };
        let bytes = shape.iter().fold(width, |bytes, size| bytes.wrapping_mul(size.unsigned_abs()));
        let shape: Vec<u64> = shape.iter().map(|size| size.unsigned_abs()).collect();
        header.insert(name.clone(), tensor(dtype, &shape, end, end + bytes));
        end += bytes;
    }
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), SINGLE, &Value::Object(header).to_string(), end as usize);
    WeightFolder::open(dir.path())?.require_model(&config)
}

#[test]
fn weights_are_those_that_the_config_asks_for() {
    model(|_| {}).unwrap();
    // What follows from the rest.
    model(|held| {
        held.insert("lm_head.weight".into(), ("F32".into(), vec![6, 4]));
        for name in ["self_attn.rotary_emb.inv_freq", "mlp.up_proj.input_scale_ub", "self_attn.k_scale"] {
            held.insert(format!("model.layers.0.{name}"), ("F32".into(), vec![1]));
        }
        held.insert("v_head.summary.weight".into(), ("F32".into(), vec![1, 4]));
    })
    .unwrap();
    let down = "model.layers.1.mlp.down_proj.weight";
    let scale = format!("{down}_scale");
    let in_bytes = |rows: i64| {
        let scale = scale.clone();
        move |held: &mut BTreeMap<String, (String, Vec<i64>)>| {
            held.insert(down.into(), ("F8_E4M3".into(), vec![4, 8]));
            held.insert(scale, ("F32".into(), vec![rows]));
        }
    };
    model(in_bytes(4)).unwrap();
    model(in_bytes(1)).unwrap();

    let refused = |code, said: &str, change: &dyn Fn(&mut BTreeMap<String, (String, Vec<i64>)>)| {
        let error = model(change).unwrap_err();
        assert_eq!(error.code, code, "{error}");
        assert!(error.message.contains("model.safetensors: ") && error.message.contains(said), "{error}");
    };
    refused(Code::ModelMalformed, "lacks tensor \"model.layers.1.mlp.down_proj.weight\" of shape [4, 8]", &|held| {
        held.remove(down);
    });
    refused(Code::ModelMalformed, "has shape [8, 4]; config.json asks for [4, 8]", &|held| {
        held.insert(down.into(), ("F32".into(), vec![8, 4]));
    });
    refused(Code::ModelMalformed, "its scale \"model.layers.1.mlp.down_proj.weight_scale\" is missing", &|held| {
        held.insert(down.into(), ("I8".into(), vec![4, 8]));
    });
    refused(Code::ModelMalformed, "must be one number, or 4, of F32, F16 or BF16", &|held| in_bytes(3)(held));
    refused(Code::ModelMalformed, "is F64 of shape [4]; it must be one number", &|held| {
        in_bytes(4)(held);
        held.insert(scale.clone(), ("F64".into(), vec![4]));
    });
    // As numbers there are none, and as a product of i64 it is too large.
    refused(Code::ModelMalformed, "is F8_E4M3 of shape [4294967296, 2147483648, 0]; it must be one number", &|held| {
        in_bytes(4)(held);
        held.insert(scale.clone(), ("F8_E4M3".into(), vec![1 << 32, 1 << 31, 0]));
    });
    refused(Code::ModelUnsupported, "is F64; store it as F32 or BF16", &|held| {
        held.insert(down.into(), ("F64".into(), vec![4, 8]));
    });
    let of_no_bytes = scale.as_str();
    for extra in [
        "model.layers.2.mlp.down_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.mlp.down_proj.pre_quant_scale",
        "model.layers.0.self_attn.q_proj.lora_A",
        of_no_bytes,
    ] {
        let said = format!("of 2 layers of a LlamaForCausalLM, has no place for tensor \"{extra}\"; leaving it out");
        refused(Code::ModelUnsupported, &said, &|held| {
            held.insert(extra.into(), ("F32".into(), vec![4]));
        });
    }
}
