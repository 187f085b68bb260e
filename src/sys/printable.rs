//! Escapes text from outside, so that a terminal shows it but does not interpret it.
//!
//! Characters without a glyph of their own are escaped: control characters, C1 included, and those that reorder or hide the text
//! around them, such as the bidirectional and zero-width ones. Quotes and backslashes stay as they are.

use std::borrow::Cow;
use std::io::{self, Write};

/// The text with everything escaped but printable characters, line ends and tabs.
pub fn printable(text: &str) -> Cow<'_, str> {
    escaped(text, |c| is_hidden(c) && !matches!(c, '\n' | '\t'), |c, out| out.extend(c.escape_default()))
}

/// Like [`printable`], on one line.
pub fn one_line(text: &str) -> Cow<'_, str> {
    escaped(text, is_hidden, |c, out| out.extend(c.escape_default()))
}

/// The same JSON document, printable. Outside of strings, JSON has no character that would be escaped.
pub fn printable_json(json: &str) -> Cow<'_, str> {
    let escape = |c: char, out: &mut String| {
        for unit in c.encode_utf16(&mut [0; 2]) {
            out.push_str(&format!("\\u{unit:04x}"));
        }
    };
    escaped(json, |c| is_hidden(c) && !matches!(c, '\n' | '\t'), escape)
}

/// Whether the character has no glyph of its own. Covers the control characters, the separators of lines and paragraphs, and
/// Unicode's `Default_Ignorable_Code_Point`, but not the variation selectors of the basic plane, which emoji use.
pub fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            '\u{ad}'
                | '\u{34f}'
                | '\u{61c}'
                | '\u{115f}'..='\u{1160}'
                | '\u{17b4}'..='\u{17b5}'
                | '\u{180b}'..='\u{180f}'
                | '\u{200b}'..='\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}'
                | '\u{3164}'
                | '\u{feff}'
                | '\u{ffa0}'
                | '\u{fff0}'..='\u{fffb}'
                | '\u{1bca0}'..='\u{1bca3}'
                | '\u{1d173}'..='\u{1d17a}'
                | '\u{e0000}'..='\u{e0fff}'
        )
}

/// Writes lines as printable text.
pub struct PrintableWriter<W>(pub W);

impl<W: Write> Write for PrintableWriter<W> {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        self.0.write_all(printable(&String::from_utf8_lossy(lines)).as_bytes())?;
        Ok(lines.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

fn escaped(text: &str, is_escaped: impl Fn(char) -> bool, escape: impl Fn(char, &mut String)) -> Cow<'_, str> {
    if !text.contains(&is_escaped) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_escaped(c) { escape(c, &mut out) } else { out.push(c) }
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_characters_are_escaped_and_all_others_are_kept() {
        for (text, expected) in [
            ("plain \"quotes\", it's \\ and é 日本 e\u{301} ❤\u{fe0f}", None),
            ("\u{1b}[2J", Some("\\u{1b}[2J")),
            ("\u{9b}31m\u{7f}", Some("\\u{9b}31m\\u{7f}")),
            ("a\u{202e}b\u{2066}c\u{200f}", Some("a\\u{202e}b\\u{2066}c\\u{200f}")),
            ("a\u{200b}b\u{feff}c\u{200d}d\u{ad}e", Some("a\\u{200b}b\\u{feff}c\\u{200d}d\\u{ad}e")),
            ("\u{e0041}\r", Some("\\u{e0041}\\r")),
        ] {
            assert_eq!(printable(text), expected.unwrap_or(text));
            assert_eq!(one_line(text), expected.unwrap_or(text));
        }
        assert_eq!((printable("a\n\tb"), one_line("a\n\tb")), ("a\n\tb".into(), "a\\n\\tb".into()));
    }

    #[test]
    fn printable_json_is_the_same_document() {
        let json = serde_json::json!({"a": "\u{1b}\u{9b}\u{202e}\u{e0041}\u{feff}\"é"});
        let text = serde_json::to_string_pretty(&json).expect("JSON");
        let shown = printable_json(&text);
        assert!(!shown.contains(|c| is_hidden(c) && c != '\n'), "{shown}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).expect("JSON"), json);
    }
}
