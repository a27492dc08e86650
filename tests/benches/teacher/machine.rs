//! What the sides run on, and the dtype and cores that they get.

use serde::Serialize;

use crate::{Failure, Options};

/// Cores that others may use on average before the figures are not to be quoted.
const QUIET: f64 = 0.1;

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

/// Who used the cores meanwhile, besides this bench and the sides that it has ended.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Others {
    /// Cores that other processes of this machine used, on average.
    pub used: f64,
    /// Cores that the host did not give.
    pub stolen: f64,
}

impl Others {
    pub fn quiet(&self) -> bool {
        self.used + self.stolen <= QUIET
    }
}

/// Clock ticks until now, of all cores together.
pub struct Ticks {
    all: f64,
    busy: f64,
    stolen: f64,
    ours: f64,
}

impl Ticks {
    /// Linux only.
    pub fn now() -> Result<Self, Failure> {
        let of_all = std::fs::read_to_string("/proc/stat")?;
        let line = of_all.lines().next().and_then(|line| line.strip_prefix("cpu ")).ok_or("/proc/stat: no \"cpu\"")?;
        let all = line.split_whitespace().map(str::parse).collect::<Result<Vec<f64>, _>>()?;
        let [user, nice, system, idle, waiting, interrupt, soft, stolen, ..] = all[..] else {
            return Err("/proc/stat: fewer than eight figures".into());
        };
        let of_us = std::fs::read_to_string("/proc/self/stat")?;
        let (_, us) = of_us.rsplit_once(')').ok_or("/proc/self/stat: no name")?;
        // User and system time, of this process and of the children that have ended.
        let ours = us.split_whitespace().skip(11).take(4).map(str::parse::<f64>).sum::<Result<f64, _>>()?;
        let busy = user + nice + system + interrupt + soft;
        Ok(Self { all: busy + idle + waiting + stolen, busy, stolen, ours })
    }

    pub fn since(&self, before: &Self, cores: usize) -> Others {
        let share = |ticks: f64| (ticks / (self.all - before.all).max(1.0) * cores as f64).max(0.0);
        let used = (self.busy - before.busy) - (self.ours - before.ours);
        Others { used: share(used), stolen: share(self.stolen - before.stolen) }
    }
}
