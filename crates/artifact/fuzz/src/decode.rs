//! libFuzzer over `soft_targets::decode` and `describe`. An input is a whole file.

#![no_main]

mod file;
mod harness;
mod memory;
mod mutate;
mod thrift;

use libfuzzer_sys::{fuzz_crossover, fuzz_mutator, fuzz_target, fuzzer_mutate};

#[global_allocator]
static ALLOCATOR: memory::Counted = memory::Counted;

/// Most that decoding and describing may take at once, bytes: a column's text of 64 MiB, as its page
/// and as its values while they grow.
const MOST: usize = 512 << 20;

fuzz_target!(|data: &[u8]| {
    memory::within(MOST, || harness::check(data));
});

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    // One in eight is changed as plain bytes, and so is what cannot be taken apart.
    let whole = if seed % 8 == 0 { None } else { mutate::mutate(&data[..size], max_size, seed.into(), &fuzzer_mutate) };
    match whole {
        Some(file) => {
            data[..file.len()].copy_from_slice(&file);
            file.len()
        }
        None => fuzzer_mutate(data, size, max_size),
    }
});

fuzz_crossover!(|data1: &[u8], data2: &[u8], out: &mut [u8], seed: u32| {
    match mutate::cross(data1, data2, out.len(), seed.into()) {
        Some(file) => {
            out[..file.len()].copy_from_slice(&file);
            file.len()
        }
        None => 0,
    }
});
