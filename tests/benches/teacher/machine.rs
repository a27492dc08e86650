//! What the sides run on, and the dtype and cores that they get.

use serde::Serialize;

use crate::{Failure, Options};

#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    pub cpu: String,
    pub cores: usize,
    /// Cores of each side.
    pub threads: usize,
    /// `f32` or `bf16`.
    pub dtype: &'static str,
    /// Why it is that.
    pub because: String,
}

impl Machine {
    pub fn of(options: &Options) -> Result<Self, Failure> {
        let info = std::fs::read_to_string("/proc/cpuinfo")?;
        let field = |name: &str| {
            let line = info.lines().find(|line| line.starts_with(name))?;
            Some(line.split_once(':')?.1.trim())
        };
        let flags: Vec<&str> = field("flags").unwrap_or_default().split(' ').collect();
        let found = ["amx_bf16", "avx512_bf16"].into_iter().find(|flag| flags.contains(flag));
        let (dtype, because) = match (options.dtype.as_str(), found) {
            ("f32", _) => ("f32", "as asked".to_owned()),
            ("bf16", _) => ("bf16", "as asked".to_owned()),
            (_, Some(flag)) => ("bf16", format!("this CPU multiplies it ({flag})")),
            (_, None) => ("f32", "this CPU has no bf16 products (neither AVX512-BF16 nor AMX)".to_owned()),
        };
        let cores = std::thread::available_parallelism()?.get();
        Ok(Self {
            cpu: field("model name").unwrap_or("an unnamed CPU").to_owned(),
            cores,
            threads: options.threads.map_or(cores, |threads| threads as usize),
            dtype,
            because,
        })
    }
}
