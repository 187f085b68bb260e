//! The standard output of a command.
//!
//! Invariant: every command writes its result through [`Stdout`], so that a result that was not written in full ends the process
//! with an error. A closed pipe is not an error: its reader needs no more output.

use std::io::{self, ErrorKind, Write};
use std::sync::OnceLock;

/// The first write that failed.
static FAILURE: OnceLock<String> = OnceLock::new();

/// Writes to stdout at once, and records a failure.
pub struct Stdout;

impl Stdout {
    /// The reason why output was lost; `None` if none was, or if nobody reads it.
    pub fn failure() -> Option<&'static str> {
        FAILURE.get().map(String::as_str)
    }
}

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut stdout = io::stdout().lock();
        let written = stdout.write_all(bytes).and_then(|()| stdout.flush());
        if let Err(e) = &written
            && e.kind() != ErrorKind::BrokenPipe
        {
            FAILURE.get_or_init(|| e.to_string());
        }
        written.map(|()| bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
