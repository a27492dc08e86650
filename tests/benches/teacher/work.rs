//! What the sides are asked: the works, who does which in what order, and the requests on the wire.

use retort_core::random::{Counter, Purpose};
use serde::{Deserialize, Serialize};

/// A piece of work that a side is timed at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Work {
    /// `score`, `generate` or `products`, as the side knows it.
    pub kind: &'static str,
    pub rows: usize,
    /// Given tokens of each row.
    pub length: usize,
    /// Tokens that each row goes on for.
    pub new_tokens: usize,
    /// Likeliest tokens that are wanted of each distribution.
    pub head: u32,
}

pub const SCORE: Work = Work { kind: "score", rows: 8, length: 512, new_tokens: 0, head: 64 };
pub const PRODUCTS: Work = Work { kind: "products", head: 0, ..SCORE };
pub const GENERATE_16: Work = Work { kind: "generate", rows: 16, length: 40, new_tokens: 96, head: 0 };
pub const GENERATE_64: Work = Work { rows: 64, ..GENERATE_16 };
pub const GENERATE_64_TOP: Work = Work { head: 64, ..GENERATE_64 };

pub const TRANSFORMERS: &str = "transformers";
pub const RETORT: &str = "retort";
/// A teacher group of two stages, which share the threads.
pub const RETORT_2: &str = "retort-2";
/// One of 16 stages, one thread each where there are fewer than 32.
pub const RETORT_16: &str = "retort-16";
pub const VLLM: &str = "vllm";
pub const ROOF: &str = "roof";
/// Every side. One that is not here cannot be left out.
pub const SIDES: [&str; 6] = [TRANSFORMERS, RETORT, RETORT_2, RETORT_16, VLLM, ROOF];

/// One round: who does what, in this order.
pub const ROUND: [(&str, Work); 11] = [
    (TRANSFORMERS, SCORE),
    (RETORT, SCORE),
    (RETORT_2, SCORE),
    (RETORT_16, SCORE),
    (VLLM, SCORE),
    (ROOF, PRODUCTS),
    (TRANSFORMERS, GENERATE_16),
    (RETORT, GENERATE_64_TOP),
    (RETORT_2, GENERATE_64_TOP),
    (VLLM, GENERATE_64),
    (VLLM, GENERATE_64_TOP),
];

/// A work as one side is asked it, in JSON on one line.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    pub work: String,
    pub token_ids: Vec<Vec<u32>>,
    pub new_tokens: usize,
    pub head: u32,
}

impl Work {
    /// The same work with less of it, so that a warm-up or a trial takes a tenth of the time.
    pub fn short(self) -> Self {
        Self { rows: self.rows.div_ceil(8), new_tokens: self.new_tokens.div_ceil(8), ..self }
    }

    /// Token ids are uniform and the same for every side that is asked this with the same seed.
    pub fn request(&self, vocab: u32, seed: u64) -> Request {
        let row = |row: usize| {
            let mut random = Counter::new(seed, Purpose::Sample, row as u64, 0);
            // The first ids are control tokens.
            (0..self.length).map(|_| 3 + (random.next_f64() * f64::from(vocab - 3)) as u32).collect()
        };
        Request {
            work: self.kind.to_owned(),
            token_ids: (0..self.rows).map(row).collect(),
            new_tokens: self.new_tokens,
            head: self.head,
        }
    }

    pub fn name(&self) -> String {
        let top = if self.head > 0 { format!(", top {}", self.head) } else { String::new() };
        match self.kind {
            "generate" => format!("generate, {} streams of {} + {}{top}", self.rows, self.length, self.new_tokens),
            kind => format!("{kind}, {} x {}{top}", self.rows, self.length),
        }
    }
}
