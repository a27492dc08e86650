//! Where an export goes that is not a file of its own: standard output, a pipe or a device.

use std::{
    fs::File,
    io::{Write, stdout},
    path::Path,
};

use retort_core::{Error, Result};

/// Whether `out` is standard output, or a pipe or device that is there.
pub fn is_stream(out: &Path) -> bool {
    out == Path::new("-") || out.metadata().is_ok_and(|metadata| !metadata.is_file() && !metadata.is_dir())
}

/// Opens what [`is_stream`] says is one.
pub fn stream(out: &Path) -> Result<Box<dyn Write>> {
    if out == Path::new("-") {
        return Ok(Box::new(stdout().lock()));
    }
    let file = File::options().write(true).open(out).map_err(|error| Error::io(out, error))?;
    Ok(Box::new(file))
}
