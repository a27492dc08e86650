//! The fuzzer's files without the fuzzer: each of them keeps what the decoder promises, and its way of
//! changing files reaches the decoder's own checks.
//!
//! `RETORT_WRITE_SEEDS=folder` writes what `make fuzz-corpus` starts from.

#[path = "../../fuzz/src/file.rs"]
mod file;
#[path = "../../fuzz/src/harness.rs"]
mod harness;
#[path = "../../fuzz/src/mutate.rs"]
mod mutate;
#[path = "../../fuzz/src/thrift.rs"]
mod thrift;

use std::{collections::BTreeSet, fs, path::PathBuf};

use bytes::Bytes;
use parquet::{
    arrow::{
        ArrowWriter,
        arrow_reader::{ArrowReaderOptions, ParquetRecordBatchReaderBuilder},
        arrow_writer::ArrowWriterOptions,
    },
    basic::{Encoding, Type},
    file::properties::{EnabledStatistics, WriterProperties},
};
use retort_artifact::soft_targets::{Header, TailLogprobs, decode, encode};
use retort_core::spec::Codec;

use self::file::File;
use crate::sample;

const MAX_FILES: usize = 40;
const MAX_BYTES: usize = 8 << 10;

#[test]
fn every_file_of_the_corpus_keeps_the_promises() {
    let (mut files, mut sound) = (0, 0);
    for entry in fs::read_dir(folder().join("fuzz/corpus/decode")).unwrap() {
        let path = entry.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        assert!(bytes.len() < MAX_BYTES, "{} has {} bytes", path.display(), bytes.len());
        println!("{}", path.display()); // shown if it fails
        files += 1;
        sound += usize::from(harness::check(&bytes));
    }
    assert!(files < MAX_FILES && sound >= 2 && sound < files, "{sound} of {files} are sound");
}

#[test]
fn the_harness_takes_every_seed() {
    for (name, bytes) in seeds() {
        assert!(bytes.len() < MAX_BYTES, "{name} has {} bytes", bytes.len());
        assert_eq!(harness::check(&bytes), name != "newer", "{name}");
    }
    if let Some(folder) = std::env::var_os("RETORT_WRITE_SEEDS").map(PathBuf::from) {
        for (name, bytes) in seeds() {
            fs::write(folder.join(name), bytes).unwrap();
        }
    }
}

#[test]
fn a_file_taken_apart_and_put_together_is_the_same() {
    for (name, bytes) in seeds() {
        let mut file = File::read(&bytes).unwrap();
        assert_eq!(file.write(), bytes, "{name}");
        file.fit();
        assert!(file.write() == bytes, "{name}: what fits is changed");
    }
    for length in 0..golden().len() {
        assert!(File::read(&golden()[..length]).is_none());
    }
}

/// Random bytes are refused at the footer. These changes must get to the values of a position.
#[test]
fn changed_files_reach_the_checks_of_values() {
    let seeds = seeds();
    let (mut sound, mut refusals) = (0, BTreeSet::new());
    for seed in 0..6000u64 {
        let (_, from) = &seeds[seed as usize % seeds.len()];
        let (_, other) = &seeds[seed as usize / 3 % seeds.len()];
        let flip = |bytes: &mut [u8], size: usize, _most: usize| {
            let at = seed as usize % size.max(1);
            bytes[at] ^= 1 << (seed % 7);
            size
        };
        let changed = match seed % 4 {
            0 => mutate::cross(from, other, MAX_BYTES, seed),
            _ => mutate::mutate(from, MAX_BYTES, seed, &flip),
        };
        let Some(changed) = changed else { continue };
        if harness::check(&changed) {
            sound += 1;
        } else if let Err(error) = decode(changed, harness::LIMITS) {
            // Numbers and names left out, so that a kind of refusal counts once.
            refusals.insert(error.message.split(|c: char| !c.is_ascii_lowercase()).collect::<Vec<_>>().join(" "));
        }
    }
    for part in [
        "are marked as its most likely",
        "its tail has",
        "its masses sum to",
        "its head s masses sum to",
        "id table",
        "outside the vocabulary",
    ] {
        assert!(refusals.iter().any(|refusal| refusal.contains(part)), "{part} is never reached: {refusals:#?}");
    }
    assert!(sound > 300 && refusals.len() > 60, "{sound} sound, {} refusals", refusals.len());
}

#[test]
fn a_schema_that_claims_too_many_children_is_refused_before_memory_is_taken() {
    const SCHEMA: i16 = 2;
    const CHILDREN: i16 = 5;
    for claim in [1 << 27, i64::from(i32::MAX), -1] {
        let mut file = File::read(&golden()).unwrap();
        file.footer.list_mut(SCHEMA).unwrap()[0].set_int(CHILDREN, claim);
        let error = decode(file.write(), harness::LIMITS).unwrap_err();
        assert!(error.message.contains(&format!("claims {claim} children")), "{error}");
    }
}

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// A golden file of the newest version.
fn golden() -> Vec<u8> {
    golden_of("v2-head-draws")
}

fn golden_of(name: &str) -> Vec<u8> {
    fs::read(folder().join(format!("tests/golden/soft-targets-{name}.parquet"))).unwrap()
}

/// Small files that differ in layout and content, each with a name. Only `newer` is refused.
fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let golden = golden();
    let small = Header { mode: "score".to_owned(), split: "held_out".to_owned(), ..sample::header(40, 4, 0) };
    let mut text_only = sample::sequences(&small, 3, 0);
    text_only[2].token_ids.clear();
    text_only[2].target_mask.clear();
    let whole = sample::header(5, 8, 4);
    let first = golden_of("v1");
    let of = |codec, rows| {
        let header = Header { tail_logprobs: TailLogprobs::Mean(0.0), ..sample::with_codec(60, codec) };
        rewritten(&encoded(&header, rows, 4), &Layout::default())
    };
    vec![
        ("first-version", rewritten(&first, &Layout::default())),
        // Where another program cuts row groups, an id table of today's stays behind in the first.
        ("groups", rewritten(&first, &Layout { rows_per_group: 1, ..Layout::default() })),
        ("threshold", of(Codec::Threshold { threshold: 0.03 }, 3)),
        ("random", of(Codec::Random { draws: 9 }, 3)),
        ("full", of(Codec::Full, 2)),
        ("bucket", rewritten(&golden_of("v2-top-k-tail"), &Layout::default())),
        ("plain", rewritten(&golden, &Layout::default())),
        ("pages", rewritten(&golden, &Layout { rows_per_page: 1, ..Layout::default() })),
        ("encodings", rewritten(&golden, &Layout { other_encodings: true, ..Layout::default() })),
        ("sampled", rewritten(&encoded(&sample::header(600, 8, 4), 3, 4), &Layout::default())),
        ("head-only", rewritten(&encoded(&small, 2, 3), &Layout::default())),
        ("whole-vocabulary", rewritten(&encoded(&whole, 2, 2), &Layout::default())),
        ("text-only", rewritten(&encode(&small, &text_only).unwrap().bytes, &Layout::default())),
        ("empty", rewritten(&encoded(&small, 0, 0), &Layout::default())),
        ("newer", newer(&golden)),
        ("golden", golden),
    ]
}

fn encoded(header: &Header, rows: u64, targets: usize) -> Vec<u8> {
    encode(header, &sample::sequences(header, rows, targets)).unwrap().bytes.into()
}

struct Layout {
    rows_per_group: usize,
    rows_per_page: usize,
    /// Plain values and deltas for integers, instead of the file's own encodings.
    other_encodings: bool,
}

impl Default for Layout {
    fn default() -> Self {
        Self { rows_per_group: usize::MAX, rows_per_page: usize::MAX, other_encodings: false }
    }
}

/// The same rows and header uncompressed and without the content's hash, so that a changed byte is a
/// changed value.
fn rewritten(bytes: &[u8], layout: &Layout) -> Vec<u8> {
    let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
    let reader = ParquetRecordBatchReaderBuilder::try_new_with_options(Bytes::copy_from_slice(bytes), options).unwrap();
    let metadata = reader.metadata().clone();
    let pairs = metadata.file_metadata().key_value_metadata().unwrap().iter();
    let pairs = pairs.filter(|pair| pair.key != "retort.content_sha256").cloned().collect();
    let mut properties = WriterProperties::builder()
        .set_dictionary_enabled(false)
        .set_statistics_enabled(EnabledStatistics::None)
        .set_offset_index_disabled(true)
        .set_max_row_group_row_count(Some(layout.rows_per_group))
        .set_data_page_row_count_limit(layout.rows_per_page)
        .set_write_batch_size(if layout.rows_per_page == 1 { 1 } else { 1024 })
        .set_key_value_metadata(Some(pairs));
    for column in metadata.row_groups().iter().take(1).flat_map(|group| group.columns()) {
        let encoding = match column.column_type() {
            Type::BOOLEAN if layout.other_encodings => Encoding::PLAIN,
            Type::BOOLEAN => Encoding::RLE,
            Type::INT32 | Type::INT64 if layout.other_encodings => Encoding::DELTA_BINARY_PACKED,
            _ if layout.other_encodings => Encoding::PLAIN,
            _ => column.encodings().find(|encoding| *encoding != Encoding::RLE).unwrap(),
        };
        properties = properties.set_column_encoding(column.column_path().clone(), encoding);
    }
    let options = ArrowWriterOptions::new().with_properties(properties.build()).with_skip_arrow_metadata(true);
    let mut writer = ArrowWriter::try_new_with_options(Vec::new(), reader.schema().clone(), options).unwrap();
    for batch in reader.build().unwrap() {
        writer.write(&batch.unwrap()).unwrap();
    }
    writer.into_inner().unwrap()
}

/// The same file of a version that is to come.
fn newer(bytes: &[u8]) -> Vec<u8> {
    let mut file = File::read(bytes).unwrap();
    for pair in file.footer.list_mut(file::id::FILE_PAIRS).unwrap() {
        if pair.field(file::id::PAIR_KEY) == Some(&thrift::Value::Binary(b"retort.schema_version".to_vec())) {
            *pair.field_mut(file::id::PAIR_VALUE).unwrap() = thrift::Value::Binary(b"99".to_vec());
        }
    }
    file.write()
}
