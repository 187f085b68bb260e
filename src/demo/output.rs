//! What the demo shows on stdout. Plain text, the same for a terminal and a pipe.

use std::fmt;
use std::io::Write;
use std::time::Duration;

/// Where the demo writes. A stdout that breaks (`demo | head -1`) does not end the demo: its result is the exit code.
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

    /// Writes a part of the answer, visible at once, without what could command a terminal.
    pub(super) fn answer(&mut self, text: &str) {
        let harmless: String = text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect();
        self.write(format_args!("{harmless}"));
    }

    /// Writes one line of the table.
    pub(super) fn row(&mut self, name: &str, value: &str, note: &str) {
        self.line(format_args!("  {name:<11}{value:>10}   {note}"));
    }

    fn write(&mut self, text: fmt::Arguments<'_>) {
        if self.broken {
            return;
        }
        let written = self.out.write_fmt(text).and_then(|()| self.out.flush());
        if let Err(error) = written {
            self.broken = true;
            log::warn!("stdout is gone, the demo goes on without it: {error}");
        }
    }
}

/// A duration in milliseconds, as exact as a person needs it.
pub(super) fn ms(duration: Duration) -> String {
    let digits = if duration < Duration::from_millis(10) { 2 } else { 0 };
    format!("{} ms", millis(duration, digits))
}

/// Milliseconds with this many decimals.
pub(super) fn millis(duration: Duration, decimals: usize) -> String {
    format!("{:.decimals$}", duration.as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_stdout_is_no_panic() {
        struct Broken;
        impl Write for Broken {
            fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
                Err(std::io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let mut page = Output { out: &mut Broken, broken: false };
        page.line(format_args!("one"));
        page.row("two", "2", "two");
        assert!(page.broken);
    }

    #[test]
    fn an_answer_cannot_command_the_terminal() {
        let mut out = Vec::new();
        Output::new(&mut out).answer("a\u{1b}[2Jb\r\nc\u{9b}");
        assert_eq!(out, b"a[2Jb\nc");
    }

    #[test]
    fn durations_are_as_exact_as_a_person_needs() {
        assert_eq!(ms(Duration::from_micros(1234)), "1.23 ms");
        assert_eq!(ms(Duration::from_micros(61_700)), "62 ms");
        assert_eq!(millis(Duration::from_nanos(1_999_600), 3), "2.000");
    }
}
