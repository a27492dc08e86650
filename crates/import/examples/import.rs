//! Imports a model: `cargo run -p retort-import --example import -- FILE|DIR OUT`.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(source), Some(out)) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: import FILE|DIR OUT");
        return ExitCode::from(2);
    };
    match retort_import::import(&source, &out, &mut |_| {}) {
        Ok(imported) => {
            let _ = writeln!(std::io::stdout(), "{imported:#?}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{}: {}", error.code, error.chain());
            ExitCode::FAILURE
        }
    }
}
