//! The forms for other programs, against slow twins. The two golden exports are of the golden shard;
//! `python/tests/test_exports.py` reads them with numpy and pyarrow alone.

use std::{
    collections::BTreeMap,
    io::{Cursor, ErrorKind, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use arrow_array::{
    Array as _, RecordBatch,
    cast::AsArray,
    types::{Float32Type, Int32Type, UInt64Type},
};
use bytes::Bytes;
use half::f16;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use retort_artifact::soft_targets::{
    Header, Limits, Sequence, Shard, SparseTargets, decode, encode,
    export::{Dtype, NpzPlan, TopKWriter},
};
use retort_core::{
    Code,
    spec::{Codec, SoftTargets},
};

use crate::sample;

const PATH: &str = "an/export";

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn golden_shard() -> Shard {
    decode(std::fs::read(golden("soft-targets-v1.parquet")).unwrap(), Limits::default()).unwrap()
}

fn stored(header: &Header, sequences: &[Sequence]) -> Shard {
    decode(encode(header, sequences).unwrap().bytes, Limits::default()).unwrap()
}

fn npz(shards: &[Shard], dtype: Dtype) -> Vec<u8> {
    let mut plan = NpzPlan::new(dtype);
    shards.iter().for_each(|shard| plan.add(&shard.header, &shard.sequences).unwrap());
    let mut writer = plan.begin(Path::new(PATH), Cursor::new(Vec::new())).unwrap();
    for sequence in shards.iter().flat_map(|shard| &shard.sequences) {
        writer.push(&sequence.targets).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

fn top_k(shards: &[Shard], k: Option<usize>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = TopKWriter::new(Path::new(PATH), &mut bytes, k).unwrap();
    for shard in shards {
        shard.sequences.iter().for_each(|sequence| writer.push(&shard.header, sequence).unwrap());
    }
    writer.finish().unwrap();
    bytes
}

/// Each array's header, trimmed, and its bytes.
fn arrays(npz: &[u8]) -> BTreeMap<String, (String, Vec<u8>)> {
    let mut archive = zip::ZipArchive::new(Cursor::new(npz)).unwrap();
    (0..archive.len())
        .map(|at| {
            let mut entry = archive.by_index(at).unwrap();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            assert_eq!(&bytes[..8], b"\x93NUMPY\x01\x00");
            let start = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
            assert_eq!((start % 64, bytes[start - 1]), (0, b'\n'));
            let header = String::from_utf8(bytes[10..start].to_vec()).unwrap();
            (entry.name().to_owned(), (header.trim_end().to_owned(), bytes.split_off(start)))
        })
        .collect()
}

fn batches(parquet: Vec<u8>) -> Vec<RecordBatch> {
    let reader = ParquetRecordBatchReaderBuilder::try_new(Bytes::from(parquet)).unwrap().build().unwrap();
    reader.map(|batch| batch.unwrap()).collect()
}

#[test]
fn the_golden_exports_are_what_is_written() {
    let shard = [golden_shard()];
    let (dense, lists) = (npz(&shard, Dtype::F32), top_k(&shard, Some(3)));
    let (dense_path, lists_path) = (golden("export.npz"), golden("export-top-k.parquet"));
    if std::env::var_os("RETORT_WRITE_GOLDEN").is_some() {
        std::fs::write(&dense_path, &dense).unwrap();
        std::fs::write(&lists_path, &lists).unwrap();
    }
    assert_eq!(arrays(&dense), arrays(&std::fs::read(dense_path).unwrap()));
    assert_eq!(batches(lists), batches(std::fs::read(lists_path).unwrap()));
}

#[test]
fn the_dense_masses_are_the_sparse_ones_and_zero_elsewhere() {
    let header = sample::header(300, 8, 6);
    let other = Header {
        shard: 4,
        epoch: 1,
        soft_targets: SoftTargets::of(Codec::HeadDraws { head: 3, draws: 2 }),
        ..header.clone()
    };
    let shards = [stored(&header, &sample::sequences(&header, 3, 9)), stored(&other, &sample::sequences(&other, 2, 4))];
    for dtype in [Dtype::F32, Dtype::F16] {
        let found = arrays(&npz(&shards, dtype));
        let (text, bytes) = &found["masses.npy"];
        let descr = if dtype == Dtype::F32 { "<f4" } else { "<f2" };
        assert_eq!(text, &format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': (35, 300, ), }}"));
        let mut expected = Vec::new();
        for targets in shards.iter().flat_map(|shard| &shard.sequences).map(|sequence| &sequence.targets) {
            for p in 0..targets.len() {
                for id in 0..300 {
                    let at = targets.range(p).find(|&entry| targets.ids[entry] == id);
                    let mass = at.map_or(0.0, |entry| targets.masses[entry]);
                    match dtype {
                        Dtype::F32 => expected.extend(mass.to_le_bytes()),
                        Dtype::F16 => expected.extend(f16::from_f32(mass).to_le_bytes()),
                    }
                }
            }
        }
        assert!(bytes == &expected, "{dtype:?}");
        let mut plan = NpzPlan::new(dtype);
        shards.iter().for_each(|shard| plan.add(&shard.header, &shard.sequences).unwrap());
        assert_eq!((plan.sequences(), plan.positions(), plan.vocab_size()), (5, 35, 300));
        assert_eq!(plan.bytes(), found.values().map(|(_, bytes)| bytes.len() as u64).sum::<u64>());
    }
}

#[test]
fn the_bucket_and_the_log_sum_exps_are_arrays_of_their_own() {
    let mut header = sample::with_codec(300, Codec::TopKTail { head: 5 });
    header.soft_targets.temperatures = vec![0.5, 2.0, 4.0];
    let shard = [stored(&header, &sample::sequences(&header, 3, 9))];
    let found = arrays(&npz(&shard, Dtype::F32));
    let expected = |of: fn(&SparseTargets) -> &Vec<f32>| -> Vec<u8> {
        let values = shard[0].sequences.iter().flat_map(|sequence| of(&sequence.targets));
        values.flat_map(|value| value.to_le_bytes()).collect()
    };
    let array = |name: &str| (found[name].0.as_str(), found[name].1.clone());
    let text =
        |descr: &str, shape: &str| format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({shape}), }}");
    assert_eq!(array("residuals.npy"), (&*text("<f4", "27, "), expected(|targets| &targets.residuals)));
    assert!(shard[0].sequences.iter().all(|sequence| sequence.targets.residuals.iter().any(|&mass| mass > 0.0)));
    assert_eq!(array("log_sum_exps.npy"), (&*text("<f4", "27, 3, "), expected(|targets| &targets.log_sum_exps)));
    let temperatures = [0.5f64, 2.0, 4.0].iter().flat_map(|temperature| temperature.to_le_bytes()).collect();
    assert_eq!(array("temperatures.npy"), (&*text("<f8", "3, "), temperatures));
    let mut plan = NpzPlan::new(Dtype::F32);
    plan.add(&header, &shard[0].sequences).unwrap();
    assert_eq!(plan.bytes(), found.values().map(|(_, bytes)| bytes.len() as u64).sum::<u64>());

    let mut other = header.clone();
    other.soft_targets.temperatures.pop();
    let error = plan.add(&other, &[]).unwrap_err();
    assert_eq!(error.code, Code::RequestInvalid);
    assert!(error.message.contains("for the temperatures [0.5, 2.0], those before it for [0.5, 2.0, 4.0]"), "{error}");
}

#[test]
fn a_top_k_list_is_the_exact_head_at_the_token_before_its_target() {
    let header = sample::header(500, 12, 8);
    let raw = sample::sequences(&header, 5, 20);
    let shard = stored(&header, &raw);
    for k in [None, Some(1), Some(5), Some(99)] {
        let mut rows = 0;
        for batch in batches(top_k(std::slice::from_ref(&shard), k)) {
            for r in 0..batch.num_rows() {
                let sequence = &raw[rows];
                rows += 1;
                let list = |name: &str| batch.column_by_name(name).unwrap().as_list::<i32>().value(r);
                let ints = |name: &str| list(name).as_primitive::<Int32Type>().values().to_vec();
                assert_eq!(batch.column_by_name("row_id").unwrap().as_string::<i32>().value(r), sequence.row_id);
                assert_eq!(batch.column_by_name("row").unwrap().as_primitive::<UInt64Type>().value(r), sequence.row);
                assert_eq!(ints("input_ids"), sequence.token_ids.iter().map(|&id| id as i32).collect::<Vec<_>>());
                let labels = sequence.token_ids.iter().zip(&sequence.target_mask);
                let labels: Vec<i32> = labels.map(|(&id, &target)| if target { id as i32 } else { -100 }).collect();
                assert_eq!(ints("labels"), labels);
                let (indices, values) = (list("top_indices"), list("top_values"));
                let (indices, values) = (indices.as_list::<i32>(), values.as_list::<i32>());
                assert_eq!((indices.len(), values.len()), (labels.len(), labels.len()));
                let mut positions = sequence.positions.iter();
                for i in 0..labels.len() {
                    let (ids, logprobs) = (indices.value(i), values.value(i));
                    let ids = ids.as_primitive::<Int32Type>().values();
                    let logprobs = logprobs.as_primitive::<Float32Type>().values();
                    if labels.get(i + 1).is_none_or(|&label| label == -100) {
                        assert!(ids.is_empty() && logprobs.is_empty());
                        continue;
                    }
                    let mut head = positions.next().unwrap().head.clone();
                    head.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
                    assert_eq!(ids.len(), k.unwrap_or(12).min(12));
                    assert_eq!(ids[0], head[0].0 as i32);
                    assert!(logprobs[1..].is_sorted_by(|a, b| a >= b), "{logprobs:?}");
                    for (&id, &logprob) in ids.iter().zip(logprobs) {
                        let (_, truth) = head.iter().find(|entry| entry.0 as i32 == id).expect("a tail token");
                        // Rounding to a byte, and the factor that takes it back.
                        assert!((logprob - truth).abs() < 0.15, "{logprob} {truth}");
                    }
                }
                assert!(positions.next().is_none());
            }
        }
        assert_eq!(rows, 5);
    }
}

#[test]
fn a_sample_whose_mass_is_its_probability_is_no_head() {
    let header = sample::with_codec(200, Codec::Threshold { threshold: 0.1 });
    let raw = sample::sequences(&header, 2, 20);
    let mut shard = stored(&header, &raw);
    let mut samples = 0;
    for sequence in &mut shard.sequences {
        let targets = &mut sequence.targets;
        for e in (0..targets.ids.len()).filter(|&e| !targets.heads[e]) {
            targets.logprobs[e] = targets.masses[e].ln();
            samples += 1;
        }
    }
    assert!(samples > 0);
    let exported = batches(top_k(std::slice::from_ref(&shard), None));
    let lists = exported[0].column_by_name("top_indices").unwrap().as_list::<i32>();
    for (r, sequence) in raw.iter().enumerate() {
        let lists = lists.value(r);
        let mut lengths = lists.as_list::<i32>().iter().map(|list| list.unwrap().len()).filter(|&length| length > 0);
        assert!(sequence.positions.iter().all(|position| lengths.next() == Some(position.head.len())));
        assert_eq!(lengths.next(), None);
    }
}

#[test]
fn shards_of_two_teachers_do_not_share_an_export() {
    let header = sample::header(64, 4, 4);
    let stranger = Header { shard: 9, teacher_sha256: "f00d".repeat(16), ..header.clone() };
    let wider = Header { vocab_size: 65, ..header.clone() };
    let rows = sample::sequences(&header, 1, 2);
    let first = stored(&header, &rows);
    let forged = Header { tokenizer_sha256: "a\n  | error: b".to_owned(), ..header.clone() };
    for (other, what) in [
        (stranger, "shard 9 of job \""),
        (wider, "retort.vocab_size 65, those before it 64"),
        (forged, r#"retort.tokenizer_sha256 "a\n  | error: b", those before it"#),
    ] {
        let other = stored(&other, &rows);
        let mut plan = NpzPlan::new(Dtype::F32);
        plan.add(&first.header, &first.sequences).unwrap();
        let mut writer = TopKWriter::new(Path::new(PATH), Vec::new(), None).unwrap();
        writer.push(&first.header, &first.sequences[0]).unwrap();
        for error in [
            plan.add(&other.header, &other.sequences).unwrap_err(),
            writer.push(&other.header, &other.sequences[0]).unwrap_err(),
        ] {
            assert_eq!(error.code, Code::TokenizerMismatch);
            assert!(error.message.contains(what), "{error}");
        }
    }
}

#[test]
fn an_export_has_the_positions_it_was_planned_for() {
    let shard = golden_shard();
    let begin = || {
        let mut plan = NpzPlan::new(Dtype::F32);
        plan.add(&shard.header, &shard.sequences[..1]).unwrap();
        plan.begin(Path::new(PATH), Cursor::new(Vec::new())).unwrap()
    };
    assert_eq!(begin().finish().unwrap_err().code, Code::Internal);
    let mut writer = begin();
    writer.push(&shard.sequences[0].targets).unwrap();
    assert_eq!(writer.push(&shard.sequences[1].targets).unwrap_err().code, Code::Internal);
}

/// A disk with room for so many bytes.
struct Disk<'a> {
    room: u64,
    at: u64,
    end: u64,
    /// Attempts after it was full.
    pressed: &'a mut u64,
}

impl Write for Disk<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let at = self.at + bytes.len() as u64;
        if at > self.room {
            *self.pressed += 1;
            return Err(ErrorKind::StorageFull.into());
        }
        self.at = at;
        self.end = self.end.max(at);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Seek for Disk<'_> {
    fn seek(&mut self, place: SeekFrom) -> std::io::Result<u64> {
        self.at = match place {
            SeekFrom::Start(at) => at,
            SeekFrom::Current(by) => self.at.checked_add_signed(by).unwrap(),
            SeekFrom::End(by) => self.end.checked_add_signed(by).unwrap(),
        };
        Ok(self.at)
    }
}

impl<'a> Disk<'a> {
    fn of(room: usize, pressed: &'a mut u64) -> Self {
        Self { room: room as u64, at: 0, end: 0, pressed }
    }
}

#[test]
fn a_full_disk_is_told_once_and_as_one() {
    let header = sample::header(600, 32, 8);
    let shard = [stored(&header, &sample::sequences(&header, 3, 10))];
    let sequences = &shard[0].sequences;
    let whole = npz(&shard, Dtype::F32).len();
    for room in (0..whole).step_by(7).chain([whole - 1]) {
        let mut pressed = 0;
        let mut plan = NpzPlan::new(Dtype::F32);
        plan.add(&header, sequences).unwrap();
        let begun = plan.begin(Path::new(PATH), Disk::of(room, &mut pressed));
        let error = begun.and_then(|mut writer| {
            sequences.iter().try_for_each(|sequence| writer.push(&sequence.targets))?;
            writer.finish().map(drop)
        });
        let error = error.unwrap_err();
        assert_eq!((error.code, pressed), (Code::DiskFull, 1), "{room} of {whole}: {error}");
        assert!(error.message.starts_with(PATH), "{error}");
    }

    let whole = top_k(&shard, None).len();
    for room in (0..whole).step_by(7).chain([whole - 1]) {
        let written = TopKWriter::new(Path::new(PATH), Disk::of(room, &mut 0), None).and_then(|mut writer| {
            sequences.iter().try_for_each(|sequence| writer.push(&header, sequence))?;
            writer.finish()
        });
        let error = written.unwrap_err();
        assert_eq!(error.code, Code::DiskFull, "{room} of {whole}: {error}");
        assert!(error.message.starts_with(PATH), "{error}");
    }
}
