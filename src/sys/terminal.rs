//! The properties of the terminal on stdout or stderr (line width, character set, color), and line wrapping.

use std::io::{IsTerminal, stderr, stdout};
use std::os::fd::{AsRawFd, RawFd};

/// The line width in characters if neither `COLUMNS` nor the terminal provides one.
const WIDTH_DEFAULT: usize = 80;
/// The minimum line width, in characters: a column of labels and one word beside it.
const WIDTH_MIN: usize = 40;

/// The capabilities of an output stream.
#[derive(Debug, Clone, Copy)]
pub struct Terminal {
    /// Characters per line.
    pub width: usize,
    /// Whether the locale is UTF-8, so that `✓` can be shown.
    pub is_utf8: bool,
    /// Whether lines can be redrawn in place.
    pub is_live: bool,
    /// Whether color and bold are used.
    pub has_color: bool,
}

impl Terminal {
    /// The capabilities of stdout.
    pub fn of_stdout() -> Terminal {
        Terminal::of_stream(&stdout())
    }

    /// The capabilities of stderr.
    pub fn of_stderr() -> Terminal {
        Terminal::of_stream(&stderr())
    }

    fn of_stream(stream: &(impl IsTerminal + AsRawFd)) -> Terminal {
        Terminal::of(|name| std::env::var(name).ok(), stream.is_terminal(), window_width(stream.as_raw_fd()))
    }

    fn of(variable: impl Fn(&str) -> Option<String>, is_terminal: bool, window_width: Option<usize>) -> Terminal {
        let set = |name| variable(name).filter(|value| !value.is_empty());
        let columns = set("COLUMNS").and_then(|columns| columns.trim().parse().ok());
        let width = columns.or(window_width).unwrap_or(WIDTH_DEFAULT);
        let locale = ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().find_map(set).unwrap_or_default().to_ascii_lowercase();
        let is_live = is_terminal && set("TERM").is_none_or(|term| term != "dumb");
        Terminal {
            width: width.max(WIDTH_MIN),
            is_utf8: locale.contains("utf-8") || locale.contains("utf8"),
            is_live,
            has_color: is_live && set("NO_COLOR").is_none(),
        }
    }

    /// The mark for omitted text.
    pub fn ellipsis(&self) -> &'static str {
        if self.is_utf8 { "…" } else { "..." }
    }

    /// `text` in this color or weight, an SGR code such as `32`; unchanged without color.
    pub fn styled(&self, sgr: &str, text: &str) -> String {
        if self.has_color { format!("\x1b[{sgr}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// Returns the width of a terminal, in characters, and `None` for other files. Shells do not export `COLUMNS`.
fn window_width(file: RawFd) -> Option<usize> {
    let mut size = nix::libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    #[expect(unsafe_code, reason = "neither std nor nix has a safe form of it")]
    // SAFETY: the call changes nothing about the file; TIOCGWINSZ writes one `winsize`, which `size` is.
    unsafe { request::window_size(file, &mut size) }.ok()?;
    Some(usize::from(size.ws_col)).filter(|columns| *columns > 0)
}

mod request {
    nix::ioctl_read_bad!(window_size, nix::libc::TIOCGWINSZ, nix::libc::winsize);
}

/// Returns `label` followed by `text`, broken at spaces into lines of at most `width` characters, each with its line end. Lines
/// after the first are indented to the end of the label; after a label wider than half a line, the text starts on a line of
/// its own.
///
/// Text in backticks stays on one line if it fits, so that a command can be copied. A longer word is not broken. A no-break
/// space is printed as a space.
pub fn wrap(label: &str, text: &str, width: usize) -> String {
    let mut indent = label.chars().count();
    let (mut out, mut column) = (label.to_owned(), indent);
    if indent > width / 2 && !text.is_empty() {
        indent = label.len() - label.trim_start().len() + 2;
        out = format!("{}\n{:indent$}", label.trim_end(), "");
        column = indent;
    }
    let mut is_first = true;
    for word in (Words { rest: Some(text), room: width.saturating_sub(indent) }) {
        let length = word.chars().count();
        let space = usize::from(!is_first);
        if !is_first && column + space + length > width {
            out.truncate(out.trim_end().len());
            out.push_str(&format!("\n{:indent$}", ""));
            (column, is_first) = (indent, true);
        }
        // The second of two spaces at a line break.
        if word.is_empty() && is_first {
            continue;
        }
        if !is_first {
            out.push(' ');
        }
        out.push_str(&word.replace('\u{a0}', " "));
        column += length + usize::from(!is_first);
        is_first = false;
    }
    out.truncate(out.trim_end().len());
    out.push('\n');
    out
}

/// The pieces that [`wrap`] does not break.
struct Words<'a> {
    rest: Option<&'a str>,
    /// Characters between the indent and the end of the line.
    room: usize,
}

impl<'a> Iterator for Words<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        let rest = self.rest?;
        let first_space = rest.find(' ').unwrap_or(rest.len());
        let is_outside = |at: &usize| rest[..*at].matches('`').count() % 2 == 0;
        let spaces = rest.match_indices(' ').map(|(at, _)| at).chain([rest.len()]);
        let end = spaces.into_iter().find(is_outside).unwrap_or(first_space);
        let end = if rest[..end].chars().count() > self.room { first_space } else { end };
        self.rest = rest.get(end + 1..);
        Some(&rest[..end])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn terminal(variables: &[(&str, &str)], is_terminal: bool) -> Terminal {
        let value =
            |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
        Terminal::of(value, is_terminal, None)
    }

    #[test]
    fn width_is_that_of_columns_else_80() {
        for (columns, width) in [("60", 60), ("", 80), ("wide", 80), ("7", 40), ("-1", 80)] {
            assert_eq!(terminal(&[("COLUMNS", columns)], false).width, width, "{columns}");
        }
        assert_eq!(terminal(&[], true).width, 80);
    }

    #[test]
    fn the_first_locale_variable_that_is_set_decides_about_utf8() {
        for (variables, is_utf8) in [
            (&[][..], false),
            (&[("LANG", "en_US.UTF-8")], true),
            (&[("LANG", "C.utf8")], true),
            (&[("LC_ALL", ""), ("LC_CTYPE", "de_DE.UTF-8"), ("LANG", "C")], true),
            (&[("LC_ALL", "C"), ("LC_CTYPE", "de_DE.UTF-8"), ("LANG", "de_DE.UTF-8")], false),
            (&[("LANG", "de_DE.ISO-8859-1")], false),
        ] {
            assert_eq!(terminal(variables, true).is_utf8, is_utf8, "{variables:?}");
        }
    }

    #[test]
    fn color_needs_a_terminal_that_is_not_dumb_and_no_no_color() {
        for (variables, is_terminal, has_color) in [
            (&[("TERM", "xterm")][..], true, true),
            (&[("TERM", "xterm")], false, false),
            (&[("TERM", "dumb")], true, false),
            (&[("TERM", "xterm"), ("NO_COLOR", "1")], true, false),
            (&[("TERM", "xterm"), ("NO_COLOR", "")], true, true),
        ] {
            assert_eq!(terminal(variables, is_terminal).has_color, has_color, "{variables:?}");
        }
        assert_eq!(terminal(&[], true).styled("1", "x"), "\x1b[1mx\x1b[0m");
        assert_eq!(terminal(&[], false).styled("1", "x"), "x");
    }

    #[test]
    fn wrap_breaks_at_words_and_indents_to_the_label() {
        for (label, text, expected) in [
            ("", "", "\n"),
            ("label", "", "label\n"),
            ("", "one two three four", "one two\nthree four\n"),
            ("a: ", "one two three", "a: one two\n   three\n"),
            ("", "abcdefghijklmnop q", "abcdefghijklmnop\nq\n"),
            ("", "to do: `a bc` now", "to do:\n`a bc` now\n"),
            ("", "`a command too long`", "`a command\ntoo long`\n"),
            ("", "it`s one two", "it`s one\ntwo\n"),
            ("", "a  b  cdefg", "a  b\ncdefg\n"),
            ("", "price 1.00\u{a0}USD", "price\n1.00 USD\n"),
            ("  a-label ", "text", "  a-label\n    text\n"),
            ("", "ää öö üü ßß", "ää öö üü\nßß\n"),
        ] {
            assert_eq!(wrap(label, text, 10), expected, "{label:?} {text:?}");
        }
    }
}
