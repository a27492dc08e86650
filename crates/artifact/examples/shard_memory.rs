//! Peak memory of writing or reading a shard of a given size: `shard_memory write|read FILE MEGABYTES`.
//!
//! Rows are made as they are needed, so what the process holds is the writer's or the reader's. Prints one
//! JSON object. `make bench-shard-memory` runs it at 10 and 1,000 MB.

use std::{fs, path::Path, time::Instant};

use retort_artifact::soft_targets::{
    Header, Limits, Position, Reader, SCHEMA_VERSION, Sequence, Source, TailLogprobs, Writer,
};
use retort_core::{
    random::{Counter, Purpose},
    spec::{Codec, SoftTargets},
};
use serde_json::json;

const VOCABULARY: u32 = 49_152;
const HEAD: u32 = 50;
const TARGETS: usize = 512;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [what, path, megabytes] = arguments.as_slice() else {
        return Err("usage: shard_memory write|read FILE MEGABYTES".into());
    };
    let (path, bytes) = (Path::new(path), megabytes.parse::<u64>()? * 1_000_000);
    let limits = Limits { max_bytes: 2 << 30, max_rows: 1 << 20, ..Limits::default() };
    let before = peak_megabytes();
    let started = Instant::now();
    let (mut rows, mut targets) = (0u64, 0u64);
    match what.as_str() {
        "write" => {
            let mut writer = Writer::new(header(), fs::File::create(path)?)?;
            while fs::metadata(path)?.len() < bytes {
                writer.push(sequence(rows))?;
                rows += 1;
                targets += TARGETS as u64;
            }
            writer.finish()?;
        }
        "read" => {
            for group in Reader::open(Source::open(path)?, limits)? {
                let group = group?;
                rows += group.len() as u64;
                targets += group.iter().map(|sequence| sequence.targets.len() as u64).sum::<u64>();
            }
        }
        _ => return Err("write or read".into()),
    }
    let seconds = started.elapsed().as_secs_f64();
    let file = fs::metadata(path)?.len();
    println!(
        "{}",
        json!({
            "what": what, "file_mb": file / 1_000_000, "rows": rows, "targets": targets, "seconds": seconds,
            "peak_mb": peak_megabytes(), "at_start_mb": before,
        })
    );
    Ok(())
}

fn header() -> Header {
    Header {
        schema_version: SCHEMA_VERSION,
        job: "0".repeat(32),
        shard: 0,
        epoch: 1,
        work_sha256: "0".repeat(64),
        split: "train".to_owned(),
        engine: "native".to_owned(),
        engine_version: "0".to_owned(),
        dtype: "f32".to_owned(),
        teacher_sha256: "0".repeat(64),
        tokenizer_sha256: "0".repeat(64),
        chat_template_sha256: "0".repeat(64),
        vocab_size: VOCABULARY,
        soft_targets: SoftTargets::of(Codec::TopK { head: HEAD }),
        tail_logprobs: TailLogprobs::Mean(0.0),
        seed: 0,
        prompt_set_sha256: "0".repeat(64),
        mode: "score".to_owned(),
        sampling_json: "{}".to_owned(),
    }
}

/// Likely tokens are mostly low ids, as a byte-pair vocabulary has them.
fn sequence(row: u64) -> Sequence {
    let mut random = Counter::new(1, Purpose::Sample, row, 0);
    let mut id = || (random.next_f64().powi(3) * f64::from(VOCABULARY)) as u32;
    let position = |_| {
        let mut ids: Vec<u32> = (0..HEAD).map(|_| id()).collect();
        ids.sort_unstable();
        ids.dedup();
        let logprob =
            |at: usize| -1.5 - 1.3 * ((at * 7 % HEAD as usize + 1) as f32).ln() - (ids[at] % 13) as f32 / 50.0;
        let head: Vec<(u32, f32)> = ids.iter().enumerate().map(|(at, &id)| (id, logprob(at))).collect();
        Position { label_logprob: head[0].1, head, tail: vec![], log_sum_exps: vec![] }
    };
    let positions: Vec<Position> = (0..TARGETS).map(position).collect();
    Sequence {
        row_id: format!("row-{row}"),
        row,
        tags: vec![],
        token_ids: (0..=TARGETS as u32).collect(),
        target_mask: (0..=TARGETS).map(|at| at > 0).collect(),
        finish_reason: "stop".to_owned(),
        positions,
    }
}

/// Highest resident size so far; Linux only.
fn peak_megabytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? / 1000)
}
