use std::io::{self, Write};

/// Standard error for words that may be lost: on a full disk, or with nobody at the other end of the
/// pipe, they are, and the process goes on. (`eprintln!` would panic.)
#[derive(Clone, Copy, Debug, Default)]
pub struct LossyStderr;

impl Write for LossyStderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = io::stderr().lock().write_all(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let _ = io::stderr().flush();
        Ok(())
    }
}

/// One line on standard error, or nowhere.
pub fn remark(line: impl std::fmt::Display) {
    let _ = writeln!(LossyStderr, "{line}");
}
