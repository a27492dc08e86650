//! A teacher group of processes on this machine.

use std::net::TcpListener;

use retort_core::{Code, Error, Result};

use crate::supervise::{Bond, Program};

/// The programs of teacher `n`, whose layers `stages` processes share: each the program that `stage`
/// makes for a name, told its place. The first is the worker and has the teacher's name.
pub fn stages(n: u32, stages: u32, stage: impl Fn(String) -> Program) -> Result<Vec<Program>> {
    let peers = addresses(stages)?.join(",");
    let bond = Bond::new();
    let place = |index: u32| {
        let name = match index {
            0 => format!("teacher-{n}"),
            _ => format!("teacher-{n}-stage-{index}"),
        };
        let mut program = stage(name);
        let flags =
            [("--group", format!("teacher-{n}")), ("--stage", format!("{index}/{stages}")), ("--peers", peers.clone())];
        program.args.extend(flags.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]));
        program.bond = Some(bond.clone());
        program
    };
    Ok((0..stages).map(place).collect())
}

/// Addresses that are free now. Each stage must know the others' before any is started, so another
/// process can take one meanwhile; that stage then says so and does not start.
fn addresses(count: u32) -> Result<Vec<String>> {
    let none = |error: std::io::Error| {
        Error::with_source(Code::PortInUse, "no free port on 127.0.0.1 for the stages of a teacher group", error)
    };
    // Held together, so that no two are the same.
    let held = (0..count).map(|_| TcpListener::bind("127.0.0.1:0").map_err(none)).collect::<Result<Vec<_>>>()?;
    held.iter().map(|listener| Ok(listener.local_addr().map_err(none)?.to_string())).collect()
}
