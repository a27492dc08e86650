//! Who else uses the cores while something is measured.

use std::{error::Error, fs};

use serde::Serialize;

/// Cores that others may use on average before the figures are not to be quoted.
const QUIET: f64 = 0.1;

/// Who used the cores meanwhile, besides this process and the children that it has ended.
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
    pub fn now() -> Result<Self, Box<dyn Error>> {
        let of_all = fs::read_to_string("/proc/stat")?;
        let line = of_all.lines().next().and_then(|line| line.strip_prefix("cpu ")).ok_or("/proc/stat: no \"cpu\"")?;
        let all = line.split_whitespace().map(str::parse).collect::<Result<Vec<f64>, _>>()?;
        let [user, nice, system, idle, waiting, interrupt, soft, stolen, ..] = all[..] else {
            return Err("/proc/stat: fewer than eight figures".into());
        };
        let of_us = fs::read_to_string("/proc/self/stat")?;
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
