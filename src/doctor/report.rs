//! The output of the doctor: one entry per check, printed when the check is done, with the fix below it; and the verdict.
//!
//! Invariant: every printed text is bounded and printable, regardless of its content and origin.

use std::fmt::Display;
use std::io::Write;

use crate::sys::printable;
use crate::sys::terminal::{Terminal, wrap};

/// The maximum length of an entry's text, in characters; a server's error message may be longer.
const TEXT_MAX: usize = 600;
/// The width of the column of names, in characters; every name is shorter.
const NAME_WIDTH: usize = 12;

/// Clears the line that shows the pending check.
const CLEAR_LINE: &str = "\r\x1b[K";

/// Prints to `out` line by line. If `out` is broken, only the lines are lost.
pub struct Report<'a> {
    out: &'a mut dyn Write,
    terminal: Terminal,
    checks: u32,
    warnings: u32,
    failures: u32,
    first_failure: String,
}

/// The outcome of a check.
#[derive(Clone, Copy)]
enum Mark {
    Pass,
    Warning,
    Failure,
    Skipped,
}

impl Mark {
    /// The mark in UTF-8, the mark in ASCII, and the color as an SGR code.
    fn looks(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Mark::Pass => ("✓", "ok  ", "32"),
            Mark::Warning => ("!", "warn", "33"),
            Mark::Failure => ("✗", "FAIL", "31"),
            Mark::Skipped => ("-", "skip", "2"),
        }
    }
}

impl<'a> Report<'a> {
    /// Creates an empty report to `out`, whose properties `terminal` describes.
    pub fn new(out: &'a mut dyn Write, terminal: Terminal) -> Report<'a> {
        Report { out, terminal, checks: 0, warnings: 0, failures: 0, first_failure: String::new() }
    }

    /// Starts a section.
    pub fn heading(&mut self, text: impl Display) {
        self.print(&format!("\n{}", wrap("", &one_line(text), self.terminal.width)));
    }

    /// Shows the pending check until its result is printed.
    pub fn pending(&mut self, name: &str) {
        if self.terminal.is_live {
            let ellipsis = self.terminal.ellipsis();
            let _ = write!(self.out, "{CLEAR_LINE}  {ellipsis} {name}").and_then(|()| self.out.flush());
        }
    }

    /// Reports that the check passed.
    pub fn pass(&mut self, name: &str, what: impl Display) {
        self.checks += 1;
        self.entry(Mark::Pass, name, what);
    }

    /// Reports that the check found a problem that does not prevent the agent from serving.
    pub fn warn(&mut self, name: &str, what: impl Display, fix: impl Display) {
        self.checks += 1;
        self.warnings += 1;
        self.entry(Mark::Warning, name, what);
        self.fix(fix);
    }

    /// Reports that the check failed.
    pub fn fail(&mut self, name: &str, what: impl Display, fix: impl Display) {
        self.checks += 1;
        self.failures += 1;
        let what = what.to_string();
        if self.failures == 1 {
            self.first_failure = format!("{name}: {}", one_line(&what));
        }
        self.entry(Mark::Failure, name, what);
        self.fix(fix);
    }

    /// Reports that the check was skipped.
    pub fn skip(&mut self, name: &str, why: impl Display) {
        self.entry(Mark::Skipped, name, why);
    }

    /// Prints the verdict, with `summary` if no check failed. Returns whether no check failed.
    pub fn verdict(mut self, summary: impl Display) -> bool {
        let Report { checks, failures, warnings, .. } = self;
        let first = std::mem::take(&mut self.first_failure);
        if failures > 0 {
            self.heading(format_args!("{failures} of {checks} checks failed; begin with {first}"));
        } else if warnings > 0 {
            self.heading(format_args!("all is well: {summary}; {warnings} warning(s)"));
        } else {
            self.heading(format_args!("all is well: {summary}"));
        }
        failures == 0
    }

    fn entry(&mut self, mark: Mark, name: &str, what: impl Display) {
        let (utf8, ascii, color) = mark.looks();
        let mark = if self.terminal.is_utf8 { utf8 } else { ascii };
        let text = wrap(&format!("  {mark} {name:NAME_WIDTH$}"), &one_line(what), self.terminal.width);
        // Colored after wrapping, because escape codes have no width.
        let colored = text.replacen(mark, &self.terminal.styled(color, mark), 1);
        self.print(&colored);
    }

    fn fix(&mut self, fix: impl Display) {
        let mark_width = if self.terminal.is_utf8 { 1 } else { 4 };
        let indent = mark_width + 3 + NAME_WIDTH;
        self.print(&wrap(&format!("{:indent$}fix: ", ""), &one_line(fix), self.terminal.width));
    }

    fn print(&mut self, text: &str) {
        let start = if self.terminal.is_live { CLEAR_LINE } else { "" };
        let _ = write!(self.out, "{start}{text}").and_then(|()| self.out.flush());
    }
}

/// The text on one printable line, and bounded.
fn one_line(text: impl Display) -> String {
    let text: String = text.to_string().chars().take(TEXT_MAX).collect();
    printable::one_line(&text).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(terminal: Terminal) -> String {
        let mut out = Vec::new();
        let mut report = Report::new(&mut out, terminal);
        report.heading("this machine");
        report.pending("a");
        report.pass("a", "good");
        report.warn("b", "odd", "correct it");
        report.fail("c", "two\nlines\x1b[2J", "correct that");
        report.fail("d", "broken too", "later");
        report.skip("e", "not reached");
        assert!(!report.verdict("never said"));
        String::from_utf8(out).expect("text")
    }

    const PLAIN: Terminal = Terminal { width: 80, is_utf8: true, is_live: false, has_color: false };

    #[test]
    fn each_check_has_a_line_with_its_fix_below_and_the_verdict_names_the_first_failure() {
        let expected = "\nthis machine\n  ✓ a           good\n  ! b           odd\n                fix: correct it\n  \
            ✗ c           two\\nlines\\u{1b}[2J\n                fix: correct that\n  ✗ d           broken too\n                \
            fix: later\n  - e           not reached\n\n2 of 4 checks failed; begin with c: two\\nlines\\u{1b}[2J\n";
        assert_eq!(printed(PLAIN), expected);
    }

    #[test]
    fn without_utf8_the_marks_are_words_and_with_color_they_are_colored() {
        let text = printed(Terminal { is_utf8: false, ..PLAIN });
        assert!(text.is_ascii(), "{text}");
        for line in [
            "  ok   a           good\n",
            "  warn b           odd\n                   fix: correct it\n",
            "  FAIL c",
            "  skip e",
        ] {
            assert!(text.contains(line), "no `{line}` in {text}");
        }
        let text = printed(Terminal { has_color: true, ..PLAIN });
        assert!(text.contains("  \x1b[31m✗\x1b[0m c           two"), "{text}");
    }
}
