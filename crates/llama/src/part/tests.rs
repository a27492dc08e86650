use std::path::Path;

use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use super::{host::HostPart, torch::TorchPart, *};
use crate::{Architecture, Llama3Scaling, Model, weights::Folder};

fn config() -> Config {
    Config {
        architecture: Architecture::Llama,
        hidden_size: 48,
        intermediate_size: 100,
        num_hidden_layers: 5,
        num_attention_heads: 6,
        num_key_value_heads: 2,
        head_dim: 12,
        vocab_size: 90,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: Some(Llama3Scaling {
            factor: 4.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 16,
        }),
        max_position_embeddings: 300,
        tie_word_embeddings: false,
        qkv_bias: true,
        output_bias: true,
        mlp_bias: true,
        sliding_window: None,
        initializer_range: 0.2,
        bos_token_id: Some(1),
        eos_token_ids: vec![2],
        pad_token_id: None,
    }
}

fn folder(config: Config) -> (TempDir, Model) {
    let dir = tempfile::tempdir().unwrap();
    let model = Model::init(config, Device::Cpu, Kind::Float, 5).unwrap();
    model.save(dir.path(), Kind::Float).unwrap();
    (dir, model)
}

/// A tensor as a file has it: dtype, bytes, and a scale a row where it is stored in bytes.
type Stored = (&'static str, Vec<u8>, Vec<f32>);

/// A folder of what `change` makes of each tensor of another one, from its name, shape and bytes.
fn rewritten(from: &Path, change: impl Fn(&str, &[i64], &[u8]) -> Stored) -> TempDir {
    let source = Folder::open(from).unwrap();
    let mut header = Map::new();
    let mut data: Vec<u8> = Vec::new();
    let mut put = |name: &str, dtype: &str, shape: &[i64], bytes: &[u8]| {
        let begin = data.len();
        data.extend_from_slice(bytes);
        let about = json!({ "dtype": dtype, "shape": shape, "data_offsets": [begin, data.len()] });
        header.insert(name.to_owned(), about);
    };
    for name in source.names() {
        let (entry, bytes) = source.get(name).unwrap();
        let (dtype, bytes, scales) = change(name, &entry.shape, bytes);
        put(name, dtype, &entry.shape, &bytes);
        if !scales.is_empty() {
            let bytes: Vec<u8> = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
            put(&format!("{name}_scale"), "F32", &[scales.len() as i64, 1], &bytes);
        }
    }
    let header = Value::Object(header).to_string();
    let length = (header.len() as u64).to_le_bytes();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("model.safetensors"), [&length[..], header.as_bytes(), &data[..]].concat()).unwrap();
    std::fs::copy(from.join("config.json"), dir.path().join("config.json")).unwrap();
    dir
}

/// A projection's weight in bytes. No row has the largest byte there is, so rounding them again to a row's
/// own largest would change them.
fn in_bytes(dtype: &'static str, shape: &[i64]) -> Stored {
    let (rows, columns) = (shape[0] as usize, shape[1] as usize);
    let byte = |at: usize| match dtype {
        "I8" => ((at * 37 % 201) as i32 - 100) as i8 as u8,
        // An eighth to 15, of either sign.
        _ => (0x20 + at * 37 % 56) as u8 | if at.is_multiple_of(3) { 0x80 } else { 0 },
    };
    let unit = if dtype == "I8" { 0.003 } else { 0.03 };
    let scales = (0..rows).map(|row| unit * (1.0 + 0.37 * (row % 3) as f32)).collect();
    (dtype, (0..rows * columns).map(byte).collect(), scales)
}

fn ids(sequence: u32, tokens: u32) -> Vec<u32> {
    (0..tokens).map(|at| (at * 7 + sequence * 31 + 3) % 90).collect()
}

fn whole(tokens: u32) -> Piece {
    Piece { slot: None, start: 0, tokens }
}

/// Logits of every position of every sequence, the model run on each alone.
fn expected(model: &Model, sequences: &[Vec<u32>]) -> Vec<f32> {
    let one = |ids: &Vec<u32>| {
        let ids: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
        let logits =
            tch::no_grad(|| model.head(&model.hidden(&Tensor::from_slice(&ids).unsqueeze(0)).unwrap()).unwrap());
        Vec::<f32>::try_from(logits.flatten(0, -1)).unwrap()
    };
    sequences.iter().flat_map(one).collect()
}

fn torch_logits(part: &mut TorchPart, lane: u32, ids: &[u32], pieces: &[Piece]) -> Vec<f32> {
    tch::no_grad(|| {
        let hidden = part.embed(ids).unwrap();
        let hidden = part.forward(lane, hidden, pieces).unwrap();
        Vec::<f32>::try_from(part.head(&hidden).unwrap().flatten(0, -1)).unwrap()
    })
}

fn host_logits(part: &mut HostPart, lane: u32, ids: &[u32], pieces: &[Piece]) -> Vec<f32> {
    let mut hidden = part.embed(ids).unwrap();
    part.forward(lane, &mut hidden, pieces).unwrap();
    let all: Vec<usize> = (0..ids.len()).collect();
    part.head(&hidden, &all, |_, row| row.to_vec()).unwrap().concat()
}

fn assert_close(a: &[f32], b: &[f32], tolerance: f32) {
    assert_eq!(a.len(), b.len());
    for (at, (a, b)) in a.iter().zip(b).enumerate() {
        assert!((a - b).abs() <= tolerance, "number {at}: {a} {b}");
    }
}

/// Few rows share out the weights over threads, many the rows: the bits are the same, and those of one thread.
#[test]
fn how_work_is_shared_out_changes_no_bit() {
    let (dir, _) = folder(config());
    let ids = ids(1, 40);
    let run = |threads: usize, cuts: &[u32]| {
        let part = Part::whole(&config());
        let mut part = HostPart::load(dir.path(), part, Keep::Stored, Some(threads)).unwrap();
        part.reset(ROOM);
        let mut logits = Vec::new();
        let mut start = 0;
        for &tokens in cuts {
            let piece = Piece { slot: Some(0), start, tokens };
            logits.extend(host_logits(&mut part, 0, &ids[start as usize..(start + tokens) as usize], &[piece]));
            start += tokens;
        }
        assert_eq!(start, 40);
        logits
    };
    let whole = run(1, &[40]);
    for threads in [1, 2, 3] {
        for cuts in [&[40][..], &[1, 8, 9, 16, 6], &[17, 7, 16], &[24, 15, 1]] {
            assert!(run(threads, cuts) == whole, "{threads} threads, {cuts:?}");
        }
    }
}

const ROOM: Room = Room { lanes: 2, slots: 4, capacity: 200 };

#[test]
fn packed_sequences_are_each_computed_as_if_alone() {
    for window in [None, Some(20)] {
        for tied in [false, true] {
            let config = Config { sliding_window: window, tie_word_embeddings: tied, ..config() };
            // Only some of the family look back no further than a window; those have no biases.
            let (dir, model) = folder(match window {
                None => config,
                Some(_) => {
                    let (qkv_bias, output_bias, mlp_bias) = (false, false, false);
                    Config { architecture: Architecture::Mistral, qkv_bias, output_bias, mlp_bias, ..config }
                }
            });
            let sequences = [ids(0, 170), ids(1, 33), ids(2, 33), ids(3, 1)];
            let pieces: Vec<Piece> = sequences.iter().map(|ids| whole(ids.len() as u32)).collect();
            let expected = expected(&model, &sequences);
            let part = Part::whole(model.config());
            let mut torch =
                TorchPart::load(dir.path(), part.clone(), &[Device::Cpu], Kind::Float, Keep::Stored).unwrap();
            assert_close(&torch_logits(&mut torch, 0, &sequences.concat(), &pieces), &expected, 3e-4);
            let mut host = HostPart::load(dir.path(), part, Keep::Stored, Some(2)).unwrap();
            assert_close(&host_logits(&mut host, 0, &sequences.concat(), &pieces), &expected, 3e-4);
        }
    }
}

#[test]
fn slots_continue_where_they_were() {
    let (dir, model) = folder(config());
    let (long, short) = (ids(4, 150), ids(5, 40));
    let expected = expected(&model, &[long.clone(), short.clone()]);
    let part = Part::whole(model.config());
    let piece = |slot, start, tokens| Piece { slot: Some(slot), start, tokens };
    // The first goes in pieces; the second begins with what slot 3 holds, and both end token by token.
    let steps = [
        (vec![piece(3, 0, 25)], short[..25].to_vec()),
        (vec![piece(0, 0, 100), piece(1, 25, 5)], [&long[..100], &short[25..30]].concat()),
        (vec![piece(0, 100, 40)], long[100..140].to_vec()),
    ];
    let singles = (0..10).map(|at| {
        (vec![piece(1, 30 + at, 1), piece(0, 140 + at, 1)], vec![short[30 + at as usize], long[140 + at as usize]])
    });
    let mut torch = TorchPart::load(dir.path(), part.clone(), &[Device::Cpu], Kind::Float, Keep::Stored).unwrap();
    tch::no_grad(|| torch.reset(ROOM)).unwrap();
    let mut host = HostPart::load(dir.path(), part, Keep::Stored, Some(2)).unwrap();
    host.reset(ROOM);
    let v = 90;
    for (index, (pieces, ids)) in steps.into_iter().chain(singles).enumerate() {
        if index == 1 {
            let share = Share { from: 3, to: 1, positions: 25 };
            tch::no_grad(|| torch.share(1, &share)).unwrap();
            host.share(1, &share).unwrap();
        }
        let torch = torch_logits(&mut torch, 1, &ids, &pieces);
        let host = host_logits(&mut host, 1, &ids, &pieces);
        let mut at = 0;
        for piece in &pieces {
            let offset = if piece.slot == Some(0) { 0 } else { long.len() };
            let from = (offset + piece.start as usize) * v;
            let expected = &expected[from..from + piece.tokens as usize * v];
            let here = at..at + expected.len();
            at += expected.len();
            assert_close(&torch[here.clone()], expected, 3e-4);
            assert_close(&host[here], expected, 3e-4);
        }
    }
}

#[test]
fn parts_in_a_row_are_the_whole_bit_for_bit() {
    let (dir, model) = folder(Config { tie_word_embeddings: true, ..config() });
    let sequences = [ids(6, 70), ids(7, 20)];
    let pieces: Vec<Piece> = sequences.iter().map(|ids| whole(ids.len() as u32)).collect();
    let load = |layers, threads| {
        let part = Part::of_layers(model.config(), layers).unwrap();
        HostPart::load(dir.path(), part, Keep::Stored, Some(threads)).unwrap()
    };
    let mut all = load(0..5, 2);
    let together = host_logits(&mut all, 0, &sequences.concat(), &pieces);
    let mut parts = [load(0..2, 1), load(2..3, 2), load(3..5, 1)];
    let mut hidden = parts[0].embed(&sequences.concat()).unwrap();
    for part in &mut parts {
        part.forward(0, &mut hidden, &pieces).unwrap();
    }
    let rows: Vec<usize> = (0..90).collect();
    assert_eq!(parts[2].head(&hidden, &rows, |_, row| row.to_vec()).unwrap().concat(), together);
    let read: u64 = parts.iter().map(HostPart::bytes_read).sum();
    let embedding = 90 * 48 * 4;
    assert_eq!(read, all.bytes_read() + embedding, "each reads its own tensors; the tied embedding is both ends'");

    // And each sequence alone is the same bits as beside the other.
    let alone = host_logits(&mut all, 0, &sequences[1], &pieces[1..]);
    assert_eq!(alone, together[70 * 90..]);
}

#[test]
fn narrow_weights_stay_close() {
    let (dir, model) = folder(config());
    let sequence = [ids(8, 60)];
    let part = Part::whole(model.config());
    let load = |keep| {
        let mut host = HostPart::load(dir.path(), part.clone(), keep, Some(1)).unwrap();
        host_logits(&mut host, 0, &sequence[0], &[whole(60)])
    };
    let on_torch = |keep| {
        let mut torch = TorchPart::load(dir.path(), part.clone(), &[Device::Cpu], Kind::Float, keep).unwrap();
        torch_logits(&mut torch, 0, &sequence[0], &[whole(60)])
    };
    for keep in [Keep::Int8, Keep::F8E4m3] {
        // The same bytes and scales, whoever widens them.
        assert_close(&on_torch(keep), &load(keep), 3e-3);
    }
    let stored = load(Keep::Stored);
    let error = |narrow: Vec<f32>| {
        let squares = |numbers: &mut dyn Iterator<Item = f32>| numbers.map(|x| f64::from(x).powi(2)).sum::<f64>();
        squares(&mut narrow.iter().zip(&stored).map(|(a, b)| a - b)).sqrt()
            / squares(&mut stored.iter().copied()).sqrt()
    };
    let errors = [Keep::Bf16, Keep::Int8, Keep::F8E4m3].map(|keep| error(load(keep)));
    for (error, most) in errors.iter().zip([0.03, 0.08, 0.3]) {
        assert!(*error > 0.0 && *error < most, "{errors:?}");
    }
}

#[test]
fn weights_stored_in_bytes_are_not_rounded_again() {
    let (dir, model) = folder(config());
    let part = Part::whole(model.config());
    let sequence = ids(9, 40);
    let host = |dir: &Path, keep| {
        let mut host = HostPart::load(dir, part.clone(), keep, Some(1)).unwrap();
        host_logits(&mut host, 0, &sequence, &[whole(40)])
    };
    let torch = |dir: &Path, keep| {
        let mut torch = TorchPart::load(dir, part.clone(), &[Device::Cpu], Kind::Float, keep).unwrap();
        torch_logits(&mut torch, 0, &sequence, &[whole(40)])
    };
    let projection = |name: &str| name.ends_with("proj.weight");
    for dtype in ["I8", "F8_E4M3"] {
        let narrow = rewritten(dir.path(), |name, shape, bytes| match projection(name) {
            true => in_bytes(dtype, shape),
            false => ("F32", bytes.to_vec(), Vec::new()),
        });
        let numbers = Folder::open(narrow.path()).unwrap();
        let wide = rewritten(narrow.path(), |name, shape, bytes| {
            if !projection(name) {
                return ("F32", bytes.to_vec(), Vec::new());
            }
            let matrix = numbers.matrix(name).unwrap();
            let mut row = vec![0.0f32; shape[1] as usize];
            let mut bytes = Vec::new();
            for at in 0..shape[0] as usize {
                matrix.read_row(at, &mut row);
                bytes.extend(row.iter().flat_map(|x| x.to_le_bytes()));
            }
            ("F32", bytes, Vec::new())
        });
        let stored = host(narrow.path(), Keep::Stored);
        let stored_on_torch = torch(narrow.path(), Keep::Stored);
        let stored_wide = host(wide.path(), Keep::Stored);
        assert!(stored.iter().all(|x| x.is_finite()), "{dtype}");
        for keep in [Keep::Bf16, Keep::Int8, Keep::F8E4m3] {
            assert!(host(narrow.path(), keep) == stored, "{dtype} kept as {keep:?}");
            assert_close(&torch(narrow.path(), keep), &stored_on_torch, 1e-4);
            assert!(host(wide.path(), keep) != stored_wide, "rounding {dtype} to {keep:?} would show");
        }
    }
}

#[test]
fn weights_that_are_not_finite_are_not_kept_in_bytes() {
    let (dir, model) = folder(config());
    let part = Part::whole(model.config());
    let name = "model.layers.2.mlp.down_proj.weight";
    for bad in [f32::NAN, f32::INFINITY] {
        let damaged = rewritten(dir.path(), |of, shape, bytes| {
            let mut bytes = bytes.to_vec();
            if of == name {
                let at = 4 * (3 * shape[1] as usize + 5);
                bytes[at..at + 4].copy_from_slice(&bad.to_le_bytes());
            }
            ("F32", bytes, Vec::new())
        });
        let host = |keep| HostPart::load(damaged.path(), part.clone(), keep, Some(1)).err();
        let torch = |keep| TorchPart::load(damaged.path(), part.clone(), &[Device::Cpu], Kind::Float, keep).err();
        for keep in [Keep::Int8, Keep::F8E4m3] {
            let error = host(keep).unwrap().to_string();
            let expect = format!("row 3 of tensor {name:?} holds a number that is not finite");
            assert!(error.contains(&expect), "{keep:?}: {error}");
            let error = torch(keep).unwrap().to_string();
            let expect = format!("tensor {name:?}: a weight that is not finite cannot be kept in bytes");
            assert!(error.contains(&expect), "{keep:?}: {error}");
        }
        assert!(host(Keep::Stored).is_none() && torch(Keep::Stored).is_none(), "{bad} is loaded as it is stored");
    }
}

#[test]
fn what_does_not_fit_is_refused_before_it_is_computed() {
    let (dir, model) = folder(config());
    let part = Part::whole(model.config());
    let mut host = HostPart::load(dir.path(), part.clone(), Keep::Stored, Some(1)).unwrap();
    host.reset(ROOM);
    let mut torch = TorchPart::load(dir.path(), part, &[Device::Cpu], Kind::Float, Keep::Stored).unwrap();
    tch::no_grad(|| torch.reset(ROOM)).unwrap();
    let piece = |slot, start, tokens| Piece { slot, start, tokens };
    let cases = [
        (0, vec![]),
        (0, vec![piece(None, 0, 0)]),
        (0, vec![piece(None, 3, 1)]),
        (0, vec![piece(None, 0, 301)]),
        (0, vec![piece(Some(4), 0, 1)]),
        (2, vec![piece(Some(0), 0, 1)]),
        (0, vec![piece(Some(0), 199, 2)]),
        (0, vec![piece(Some(0), u32::MAX, u32::MAX)]),
        (0, vec![piece(Some(1), 0, 1), piece(Some(1), 1, 1)]),
    ];
    for (lane, pieces) in cases {
        let tokens: usize = pieces.iter().map(|piece| piece.tokens.min(400) as usize).sum();
        let refused = host.forward(lane, &mut vec![0.0; tokens * 48], &pieces);
        assert!(refused.is_err(), "{pieces:?}");
        let hidden = Tensor::zeros([tokens as i64, 48], (Kind::Float, Device::Cpu));
        assert!(torch.forward(lane, hidden, &pieces).is_err(), "{pieces:?}");
    }
    assert!(host.forward(0, &mut [0.0; 48], &[piece(Some(0), 5, 1)]).is_err(), "the slot holds nothing yet");
    assert!(host.embed(&[90]).is_err() && torch.embed(&[90]).is_err());
    assert!(host.share(0, &Share { from: 0, to: 1, positions: 5 }).is_err());
    assert!(Part::of_layers(model.config(), 4..6).is_err() && Part::of_layers(model.config(), 3..3).is_err());
}
