//! How much memory scoring takes at one and at many times as many tokens: a process each, which scores once.

use std::path::Path;

use serde::Serialize;

use crate::{
    Failure, Options,
    machine::Machine,
    measure::start,
    work::{RETORT, SCORE, TRANSFORMERS, Work},
};

/// Rows of 512 tokens, scored in one piece of work. 64 rows of float32 logits would be 6.4 GB, more than
/// transformers is asked for.
const CASES: [(&str, usize); 5] = [(RETORT, 1), (RETORT, 8), (RETORT, 64), (TRANSFORMERS, 1), (TRANSFORMERS, 8)];

#[derive(Clone, Debug, Serialize)]
pub struct Memory {
    pub side: &'static str,
    pub tokens: usize,
    /// Resident size with the model loaded.
    pub before_mb: u64,
    /// Highest while it scored.
    pub peak_mb: u64,
    /// What float32 logits of all tokens would take.
    pub logits_mb: u64,
}

pub fn run(options: &Options, machine: &Machine, folder: &Path) -> Result<Vec<Memory>, Failure> {
    let vocab = u32::try_from(retort_llama::Config::from_dir(&options.model)?.vocab_size)?;
    let mut measured = Vec::new();
    for (side, rows) in CASES {
        if options.quick && rows > 8 {
            continue;
        }
        let work = Work { rows, ..SCORE };
        let answer = start(side, options, machine, folder).and_then(|mut side| side.ask(&work.request(vocab, 0)));
        match answer {
            Ok(answer) => {
                let tokens = rows * work.length;
                let logits_mb = (tokens * vocab as usize * 4 / 1_000_000) as u64;
                eprintln!("memory: {side}, {tokens} tokens: {} MB, {} before", answer.peak_mb, answer.before_mb);
                let (before_mb, peak_mb) = (answer.before_mb, answer.peak_mb);
                measured.push(Memory { side, tokens, before_mb, peak_mb, logits_mb });
            }
            Err(why) => eprintln!("memory: {side}, {rows} rows: left out: {why}"),
        }
    }
    Ok(measured)
}
