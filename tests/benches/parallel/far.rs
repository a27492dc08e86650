//! What stands in for a second machine: a network namespace behind a link of a given rate.

use std::{
    ffi::OsStr,
    process::{Command, Output},
};

use crate::Failure;

/// This end of the link, and the other.
pub const NEAR: &str = "10.201.78.1";
pub const FAR: &str = "10.201.78.2";

/// Of the namespaces that this benchmark makes; then comes the id of its process.
const STEM: &str = "retort-bench-";

/// A namespace and the link to it; dropped, both are gone.
pub struct Far {
    name: String,
    near: String,
}

impl Far {
    pub fn new() -> Result<Self, Failure> {
        remove_abandoned();
        let id = std::process::id();
        let far = Self { name: format!("{STEM}{id}"), near: format!("rtb{id}") };
        far.set_up().map_err(|error| format!("no network namespace can be made here, run it as root: {error}"))?;
        Ok(far)
    }

    fn set_up(&self) -> Result<(), Failure> {
        let (name, near, other) = (self.name.as_str(), self.near.as_str(), "far");
        ip(&["netns", "add", name])?;
        ip(&["link", "add", near, "type", "veth", "peer", "name", other, "netns", name])?;
        ip(&["addr", "add", &format!("{NEAR}/24"), "dev", near])?;
        ip(&["link", "set", near, "up"])?;
        ip(&["-n", name, "addr", "add", &format!("{FAR}/24"), "dev", other])?;
        ip(&["-n", name, "link", "set", "lo", "up"])?;
        ip(&["-n", name, "link", "set", other, "up"])
    }

    /// Gives the link this rate in each direction.
    pub fn shape(&self, mbit: u32) -> Result<(), Failure> {
        let rate = format!("{mbit}mbit");
        // Room for a whole segment of the largest size, or for a millisecond.
        let burst = (u64::from(mbit) * 125).max(128 << 10).to_string();
        let shape = |tc: &[&str], device: &str| {
            let arguments =
                ["qdisc", "replace", "dev", device, "root", "tbf", "rate", rate.as_str(), "burst", burst.as_str()];
            run("tc", tc.iter().chain(&arguments).chain(&["latency", "50ms"]))
        };
        shape(&[], &self.near)?;
        shape(&["-n", &self.name], "far")
    }

    /// A command that runs there.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }
}

impl Drop for Far {
    fn drop(&mut self) {
        // The far end goes with its namespace, and the near end with the far one.
        let _ = ip(&["netns", "delete", &self.name]);
    }
}

/// Removes what this process made.
pub fn remove_own() {
    let _ = ip(&["netns", "delete", &format!("{STEM}{}", std::process::id())]);
}

/// Removes what a killed benchmark left.
fn remove_abandoned() {
    let Ok(listed) = Command::new("ip").args(["netns", "list"]).output() else { return };
    for line in String::from_utf8_lossy(&listed.stdout).lines() {
        let Some(name) = line.split_whitespace().next() else { continue };
        let id = name.strip_prefix(STEM).and_then(|id| id.parse::<u32>().ok());
        if id.is_some_and(|id| !std::path::Path::new(&format!("/proc/{id}")).exists()) {
            let _ = ip(&["netns", "delete", name]);
        }
    }
}

fn ip(arguments: &[&str]) -> Result<(), Failure> {
    run("ip", arguments)
}

fn run(program: &str, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Result<(), Failure> {
    let mut command = Command::new(program);
    command.args(arguments);
    let Output { status, stderr, .. } = command.output().map_err(|error| format!("{program}: {error}"))?;
    match status.success() {
        true => Ok(()),
        false => Err(format!("{command:?}: {}", String::from_utf8_lossy(&stderr).trim()).into()),
    }
}
