//! Broken and malicious files: refused with a code, in bounded memory, without a panic.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering},
};

use bytes::Bytes;
use retort_artifact::soft_targets::{Limits, Shard, decode, encode};
use retort_core::{
    Code,
    random::{Counter, Purpose},
};

use crate::sample;

/// Most memory that decoding a broken file of a few KiB may ask for at once. A sound one asks for
/// less than 1 MiB.
const MOST_AT_ONCE: usize = 32 << 20;

static LARGEST: AtomicUsize = AtomicUsize::new(0);

struct Watched;

// SAFETY: hands everything on to the system's allocator and only notes the size.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise, handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise, handed on.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LARGEST.fetch_max(size, Ordering::Relaxed);
        // SAFETY: the caller's promise, handed on.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Watched = Watched;

#[test]
fn every_truncation_is_corrupt() {
    let (bytes, _) = valid();
    for length in 0..bytes.len() {
        let error = decode(bytes.slice(..length), Limits::default()).unwrap_err();
        assert_eq!(error.code, Code::ShardCorrupt, "cut at {length}: {error}");
    }
    // The footer is whole and the pages are not.
    for cut in (4..bytes.len() / 2).step_by(7) {
        let spliced = [&bytes[..cut], &bytes[cut + 1..]].concat();
        assert_eq!(decode(spliced, Limits::default()).unwrap_err().code, Code::ShardCorrupt);
    }
}

#[test]
fn a_changed_bit_of_the_content_is_found() {
    let (bytes, shard) = valid();
    let mut rng = Counter::new(1, Purpose::Sample, 0, 0);
    let (mut refused, runs) = (0, 4000);
    for run in 0..runs {
        let mut broken = bytes.to_vec();
        let at = rng.below(broken.len() as u64) as usize;
        broken[at] ^= 1 << rng.below(8);
        match decode(broken, Limits::default()) {
            Err(error) => {
                assert!(is_expected(error.code), "run {run}, byte {at}: {error}");
                refused += 1;
            }
            // A few bytes of the footer say nothing about the rows: the writer's name, a hint.
            Ok(read) => assert_eq!(read.sequences, shard.sequences, "run {run}, byte {at}"),
        }
    }
    assert!(refused > runs * 4 / 5, "{refused} of {runs}");
}

/// The same without the hash that finds nearly everything: now every other check must hold.
#[test]
fn thousands_of_mutations_without_the_hash_neither_panic_nor_take_memory() {
    let (bytes, _) = valid();
    let bytes = without_hash(&bytes);
    let footer = footer_start(&bytes);
    for (seed, from, to, runs) in [
        (2, 0, bytes.len(), 3000),
        (3, footer, bytes.len() - 8, 3000),
        (4, 0, footer, 3000),
        (5, footer, footer + 600, 2000),
    ] {
        let mut rng = Counter::new(seed, Purpose::Sample, 0, 0);
        for run in 0..runs {
            let mut broken = bytes.to_vec();
            for _ in 0..1 + rng.below(4) {
                let at = from + rng.below((to - from) as u64) as usize;
                broken[at] = match rng.below(4) {
                    0 => broken[at] ^ (1 << rng.below(8)),
                    1 => 0xff,
                    2 => 0,
                    _ => rng.next_u64() as u8,
                };
            }
            LARGEST.store(0, Ordering::Relaxed);
            let outcome = decode(broken, Limits::default());
            let largest = LARGEST.load(Ordering::Relaxed);
            assert!(largest <= MOST_AT_ONCE, "seed {seed} run {run}: {largest} bytes at once");
            if let Err(error) = outcome {
                assert!(is_expected(error.code), "seed {seed} run {run}: {error}");
            }
        }
    }
}

#[test]
fn bytes_that_are_no_shard_are_told_so() {
    let say = |bytes: &[u8]| decode(Bytes::copy_from_slice(bytes), Limits::default()).unwrap_err().message;
    assert_eq!(say(b""), "the shard is corrupt: 0 bytes are too few for a parquet file");
    assert_eq!(
        say(b"{\"messages\": []}"),
        "the shard is corrupt: it does not begin and end with PAR1, so it is cut short or no parquet file"
    );
    assert_eq!(say(b"PAR1\xff\xff\xff\x7fPAR1"), "the shard is corrupt: its footer claims 2147483647 bytes");
    let mut rng = Counter::new(6, Purpose::Sample, 0, 0);
    for length in 0..2000u32 {
        let mut noise: Vec<u8> = (0..length % 300 + 8).map(|_| rng.next_u64() as u8).collect();
        let footer = (length % 300 + 4).to_le_bytes();
        noise = [b"PAR1", &noise[..], &footer, b"PAR1"].concat();
        assert_eq!(decode(noise, Limits::default()).unwrap_err().code, Code::ShardCorrupt);
    }
}

#[test]
fn a_newer_version_is_told_before_anything_else() {
    let (bytes, _) = valid();
    let newer = replace(&bytes, b"retort.schema_version\x18\x012", b"retort.schema_version\x18\x019");
    let error = decode(newer, Limits::default()).unwrap_err();
    assert_eq!(error.code, Code::ShardTooNew);
    assert_eq!(error.message, "the shard has schema version 9, this build reads up to 2; read it with a newer retort");
}

#[test]
fn limits_are_held_before_memory_is_taken() {
    let (bytes, _) = valid();
    let limited = |limits: Limits| decode(bytes.clone(), limits).unwrap_err();
    let all = Limits::default();
    let error = limited(Limits { max_bytes: 100, ..all });
    assert_eq!(error.code, Code::ObjectTooLarge);
    assert_eq!(
        error.message,
        format!("the shard has {} bytes, at most 100 bytes are read; use fewer or shorter rows a shard", bytes.len())
    );
    let error = limited(Limits { max_rows: 3, ..all });
    assert_eq!(error.message, "the shard has 4 rows, at most 3 rows are read; use fewer or shorter rows a shard");
    let error = limited(Limits { max_tokens_per_row: 2, ..all });
    assert_eq!(error.code, Code::ObjectTooLarge);
    let error = limited(Limits { max_entries: 10, ..all });
    assert!(error.message.contains("values of head_delta, at most 14 values"), "{error}");
}

#[test]
fn the_content_hash_names_both_sides() {
    let (bytes, _) = valid();
    let mut broken = bytes.to_vec();
    broken[100] ^= 1;
    let message = decode(broken, Limits::default()).unwrap_err().message;
    assert!(message.starts_with("the shard is corrupt: its content has sha256 "), "{message}");
    assert!(message.ends_with("or rewritten by a program that kept retort.content_sha256"), "{message}");
    let job = replace(&bytes, b"0190a0b0", b"0290a0b0");
    assert_eq!(decode(job, Limits::default()).unwrap_err().code, Code::ShardCorrupt);
}

fn valid() -> (Bytes, Shard) {
    let header = sample::header(600, 8, 4);
    let bytes = encode(&header, &sample::sequences(&header, 4, 12)).unwrap().bytes;
    let shard = decode(bytes.clone(), Limits::default()).unwrap();
    (bytes, shard)
}

/// Renames the hash's key, so that it is no longer looked at.
fn without_hash(bytes: &Bytes) -> Bytes {
    let bytes = replace(bytes, b"retort.content_sha256", b"xetort.content_sha256");
    decode(bytes.clone(), Limits::default()).unwrap();
    bytes
}

fn footer_start(bytes: &Bytes) -> usize {
    let length = bytes.len() - 8;
    length - u32::from_le_bytes(bytes[length..length + 4].try_into().unwrap()) as usize
}

fn replace(bytes: &Bytes, from: &[u8], to: &[u8]) -> Bytes {
    assert_eq!(from.len(), to.len());
    let at = bytes.windows(from.len()).position(|window| window == from).unwrap();
    let mut changed = bytes.to_vec();
    changed[at..at + to.len()].copy_from_slice(to);
    changed.into()
}

fn is_expected(code: Code) -> bool {
    matches!(code, Code::ShardCorrupt | Code::ShardTooNew | Code::ObjectTooLarge)
}
