use std::{fs::File, sync::Arc};

use super::*;

/// A file that opens and gives nothing.
fn broken() -> Source {
    Source::File(Arc::new(File::open(env!("CARGO_MANIFEST_DIR")).unwrap()), 4096)
}

#[test]
fn a_disk_that_fails_leaves_the_shard_sound() {
    let opened = Reader::open(broken(), Limits::default()).map(drop);
    assert_eq!(opened.unwrap_err().code, Code::FileUnreadable);

    let golden = include_bytes!("../../../tests/golden/soft-targets-v1.parquet");
    let mut reader = Reader::open(golden.to_vec(), Limits::default()).unwrap();
    reader.source = broken();
    assert_eq!(reader.next().unwrap().unwrap_err().code, Code::FileUnreadable);
    assert!(reader.next().is_none());
}

#[test]
fn a_file_that_was_cut_is_corrupt() {
    let golden = include_bytes!("../../../tests/golden/soft-targets-v1.parquet");
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &golden[..golden.len() / 2]).unwrap();
    let cut = Source::File(Arc::new(file.reopen().unwrap()), golden.len() as u64);
    assert_eq!(Reader::open(cut, Limits::default()).map(drop).unwrap_err().code, Code::ShardCorrupt);
}

#[test]
fn whole_numbers_are_digits_only() {
    let mut golden = include_bytes!("../../../tests/golden/soft-targets-v1.parquet").to_vec();
    let key = b"retort.vocab_size\x18\x02";
    let at = golden.windows(key.len()).position(|window| window == key).unwrap() + key.len();
    golden[at..at + 2].copy_from_slice(b"+6");
    let error = Reader::open(golden, Limits::default()).map(drop).unwrap_err();
    assert_eq!(error.message, "the shard is corrupt: retort.vocab_size is \"+6\": it must be digits only");
}
