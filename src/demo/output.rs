//! The demo's output on stdout: plain text, the same for a terminal and a pipe.

use std::fmt;
use std::io::Write;
use std::time::Duration;

use crate::sys::printable::{is_hidden, printable};

/// Writes to stdout. A closed stdout (`demo | head -1`) does not end the demo: its result is the exit code.
pub(super) struct Output<'a> {
    out: &'a mut dyn Write,
    broken: bool,
}

impl<'a> Output<'a> {
    pub(super) fn new(out: &'a mut dyn Write) -> Self {
        Self { out, broken: false }
    }

    /// Writes one line.
    pub(super) fn line(&mut self, text: fmt::Arguments<'_>) {
        self.write(format_args!("{text}\n"));
    }

    /// Writes a part of the response at once, without control characters.
    pub(super) fn response_text(&mut self, text: &str) {
        let harmless: String = text.chars().filter(|c| !is_hidden(*c) || matches!(c, '\n' | '\t')).collect();
        self.write(format_args!("{harmless}"));
    }

    /// Writes a row of the table.
    pub(super) fn row(&mut self, name: &str, value: &str, note: &str) {
        self.line(format_args!("  {name:<11}{value:>10}   {note}"));
    }

    fn write(&mut self, text: fmt::Arguments<'_>) {
        if self.broken {
            return;
        }
        let written = self.out.write_all(printable(&text.to_string()).as_bytes()).and_then(|()| self.out.flush());
        if let Err(error) = written {
            self.broken = true;
            log::warn!("stdout is closed; the demo continues without it: {error}");
        }
    }
}

/// A duration in milliseconds, rounded for people.
pub(super) fn ms(duration: Duration) -> String {
    let digits = if duration < Duration::from_millis(10) { 2 } else { 0 };
    format!("{} ms", millis(duration, digits))
}

/// A duration in milliseconds, with the given number of decimals.
pub(super) fn millis(duration: Duration, decimals: usize) -> String {
    format!("{:.decimals$}", duration.as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_survives_a_broken_stdout() {
        struct Broken;
        impl Write for Broken {
            fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
                Err(std::io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let mut output = Output { out: &mut Broken, broken: false };
        output.line(format_args!("one"));
        output.row("two", "2", "two");
        assert!(output.broken);
    }

    #[test]
    fn response_text_loses_its_control_characters() {
        let mut out = Vec::new();
        Output::new(&mut out).response_text("a\u{1b}[2Jb\r\nc\u{9b}");
        assert_eq!(out, b"a[2Jb\nc");
    }

    #[test]
    fn durations_are_rounded_for_people() {
        assert_eq!(ms(Duration::from_micros(1234)), "1.23 ms");
        assert_eq!(ms(Duration::from_micros(61_700)), "62 ms");
        assert_eq!(millis(Duration::from_nanos(1_999_600), 3), "2.000");
    }
}
