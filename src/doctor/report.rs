//! What the doctor prints: a line for each check as it is done, the fix below it, and the verdict.
//!
//! Invariant: whatever a text holds, and wherever it comes from, a line stays one line, bounded, of what can be printed.

use std::fmt;
use std::io::Write;

/// The longest text that a line shows, in characters: a server's words on why it failed are longer.
const TEXT_MAX: usize = 600;
/// The widest name of a check is shorter.
const NAME_WIDTH: usize = 12;

/// Over whatever is pending.
const OVER: &str = "\r\x1b[K";

/// Goes to `out` line by line; a broken `out` loses the lines and nothing else.
pub struct Report<'a> {
    out: &'a mut dyn Write,
    /// Whether a line can be written over.
    live: bool,
    checks: u32,
    warnings: u32,
    failures: u32,
    first_failure: String,
}

impl<'a> Report<'a> {
    /// An empty one. `live` is for a terminal: it shows what is being waited for.
    pub fn new(out: &'a mut dyn Write, live: bool) -> Report<'a> {
        Report { out, live, checks: 0, warnings: 0, failures: 0, first_failure: String::new() }
    }

    /// What the next lines are about.
    pub fn heading(&mut self, text: fmt::Arguments<'_>) {
        self.line(format_args!("\n{}", one_line(text)));
    }

    /// Says what is being waited for, until its line comes.
    pub fn pending(&mut self, name: &str) {
        if self.live {
            let _ = write!(self.out, "{OVER}  … {name}").and_then(|()| self.out.flush());
        }
    }

    /// All right.
    pub fn pass(&mut self, name: &str, what: fmt::Arguments<'_>) {
        self.checks += 1;
        self.check('✓', name, what);
    }

    /// Odd, but the agent can earn.
    pub fn warn(&mut self, name: &str, what: fmt::Arguments<'_>, fix: fmt::Arguments<'_>) {
        self.checks += 1;
        self.warnings += 1;
        self.check('!', name, what);
        self.fix(fix);
    }

    /// Broken.
    pub fn fail(&mut self, name: &str, what: fmt::Arguments<'_>, fix: fmt::Arguments<'_>) {
        self.checks += 1;
        self.failures += 1;
        if self.failures == 1 {
            self.first_failure = format!("{name}: {}", one_line(what));
        }
        self.check('✗', name, what);
        self.fix(fix);
    }

    /// Not checked.
    pub fn skip(&mut self, name: &str, why: fmt::Arguments<'_>) {
        self.check('-', name, why);
    }

    /// The last line: `well` where nothing is broken. True then.
    pub fn verdict(mut self, well: fmt::Arguments<'_>) -> bool {
        let Report { checks, failures, warnings, .. } = self;
        let first = std::mem::take(&mut self.first_failure);
        if failures > 0 {
            self.heading(format_args!("{failures} of {checks} checks failed; begin with {first}"));
        } else if warnings > 0 {
            self.heading(format_args!("all that matters is well: {well}; {warnings} warning(s)"));
        } else {
            self.heading(format_args!("all is well: {well}"));
        }
        failures == 0
    }

    fn check(&mut self, mark: char, name: &str, what: fmt::Arguments<'_>) {
        self.line(format_args!("  {mark} {name:NAME_WIDTH$}{}", one_line(what)));
    }

    fn fix(&mut self, fix: fmt::Arguments<'_>) {
        self.line(format_args!("    {:NAME_WIDTH$}fix: {}", "", one_line(fix)));
    }

    fn line(&mut self, text: fmt::Arguments<'_>) {
        let start = if self.live { OVER } else { "" };
        let _ = writeln!(self.out, "{start}{text}").and_then(|()| self.out.flush());
    }
}

/// Without what would move a terminal's cursor or hide what is there. Quotes and backslashes stand for themselves.
fn one_line(text: fmt::Arguments<'_>) -> String {
    let mut line = String::new();
    for c in text.to_string().chars().take(TEXT_MAX) {
        match c {
            '"' | '\'' | '\\' => line.push(c),
            _ => line.extend(c.escape_debug()),
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_for_each_check_the_fix_below_it_and_the_first_failure_in_the_verdict() {
        let mut out = Vec::new();
        let mut report = Report::new(&mut out, false);
        report.heading(format_args!("the box"));
        report.pending("a");
        report.pass("a", format_args!("good"));
        report.warn("b", format_args!("odd"), format_args!("mend it"));
        report.fail("c", format_args!("two\nlines\x1b[2J"), format_args!("mend that"));
        report.fail("d", format_args!("broken too"), format_args!("later"));
        report.skip("e", format_args!("not reached"));
        assert!(!report.verdict(format_args!("never said")));
        let expected = "\nthe box\n  ✓ a           good\n  ! b           odd\n                fix: mend it\n  \
            ✗ c           two\\nlines\\u{1b}[2J\n                fix: mend that\n  ✗ d           broken too\n                \
            fix: later\n  - e           not reached\n\n2 of 4 checks failed; begin with c: two\\nlines\\u{1b}[2J\n";
        assert_eq!(String::from_utf8(out).expect("text"), expected);
    }
}
