//! Buffers a streamed JSON text in bounded memory. Short texts are kept verbatim; in long ones, long strings and nested arrays
//! are truncated, so that usage, end markers and errors survive.
//!
//! Invariants: the result depends on the bytes alone, not on how they were split. Truncated JSON is valid JSON with the same
//! keys in the same places (long keys are shortened). The result never exceeds [`TRUNCATED_BYTES_MAX`].

/// Maximum length of a text that is kept verbatim, in bytes.
pub const VERBATIM_BYTES_MAX: usize = 4 << 10;

/// Limit for a longer text after truncation, in bytes; a text that exceeds it even when truncated is discarded.
pub const TRUNCATED_BYTES_MAX: usize = 32 << 10;

/// Maximum length of a string in a longer text, in bytes: more than is passed on of an error.
const STRING_BYTES_MAX: usize = 1 << 10;

/// The same limit once half of [`TRUNCATED_BYTES_MAX`] is used up, so that many long strings do not displace the usage that
/// follows them.
const LATER_STRING_BYTES_MAX: usize = 64;

const _: () = assert!(STRING_BYTES_MAX > crate::backend::ERROR_BODY_MAX && VERBATIM_BYTES_MAX <= TRUNCATED_BYTES_MAX);

/// The buffer of one text.
#[derive(Debug, Default)]
pub struct BoundedJson {
    kept: Vec<u8>,
    mode: Mode,
}

#[derive(Debug, Default)]
enum Mode {
    #[default]
    Verbatim,
    Truncated(Truncator),
    Discarded,
}

impl BoundedJson {
    /// Appends the next piece.
    pub fn push(&mut self, bytes: &[u8]) {
        match &mut self.mode {
            Mode::Discarded => {}
            Mode::Verbatim if self.kept.len() + bytes.len() <= VERBATIM_BYTES_MAX => self.kept.extend_from_slice(bytes),
            Mode::Verbatim => {
                let whole = std::mem::take(&mut self.kept);
                self.mode = Mode::Truncated(Truncator::default());
                self.push(&whole);
                self.push(bytes);
            }
            Mode::Truncated(truncator) => {
                for byte in bytes {
                    if truncator.keeps(*byte, &self.kept) {
                        self.kept.push(*byte);
                    }
                }
                if self.kept.len() > TRUNCATED_BYTES_MAX {
                    self.discard();
                }
            }
        }
    }

    /// Discards this text, including all later pieces.
    pub fn discard(&mut self) {
        *self = BoundedJson { kept: Vec::new(), mode: Mode::Discarded };
    }

    /// The kept bytes; `None` if the text was discarded.
    pub fn bytes(&self) -> Option<&[u8]> {
        match self.mode {
            Mode::Discarded => None,
            Mode::Verbatim | Mode::Truncated(_) => Some(&self.kept),
        }
    }

    /// Whether nothing has been appended.
    pub fn is_empty(&self) -> bool {
        matches!(self.mode, Mode::Verbatim) && self.kept.is_empty()
    }

    /// An empty buffer for the next text, with the same allocation.
    pub fn recycle(mut self) -> BoundedJson {
        self.kept.clear();
        self.kept.shrink_to(VERBATIM_BYTES_MAX);
        BoundedJson { kept: self.kept, mode: Mode::Verbatim }
    }
}

/// Decides byte by byte whether to keep it: the beginning of a string and one of several blanks are kept, elements of nested arrays
/// are not. This removes, for example, images and the log probabilities of alternative tokens.
#[derive(Debug, Default)]
struct Truncator {
    /// Number of open arrays.
    arrays: u32,
    /// Open brackets within the skipped array, including its own; 0 outside of one.
    skipped_depth: u32,
    string: Option<StringState>,
}

/// The current string.
#[derive(Debug, Default)]
struct StringState {
    kept: usize,
    is_truncated: bool,
    /// Position within an escape sequence.
    escape: Escape,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Escape {
    #[default]
    None,
    Letter,
    Hex(u8),
}

impl Truncator {
    /// Whether to keep the next byte, after `kept`.
    fn keeps(&mut self, byte: u8, kept: &[u8]) -> bool {
        match &mut self.string {
            Some(string) => {
                let (is_kept, is_over) = string.read(byte, kept);
                if is_over {
                    self.string = None;
                }
                self.skipped_depth == 0 && is_kept
            }
            // Gateways may send blanks for minutes to keep a connection open.
            None if byte.is_ascii_whitespace() && kept.last().is_some_and(u8::is_ascii_whitespace) => false,
            None => self.keeps_outside(byte),
        }
    }

    fn keeps_outside(&mut self, byte: u8) -> bool {
        let was_skipping = self.skipped_depth > 0;
        match byte {
            b'"' => self.string = Some(StringState::default()),
            b'[' | b'{' if was_skipping => self.skipped_depth += 1,
            b']' | b'}' if was_skipping => {
                self.skipped_depth -= 1;
                if self.skipped_depth == 0 {
                    self.arrays -= 1;
                    return true;
                }
            }
            b'[' => {
                self.arrays += 1;
                self.skipped_depth = u32::from(self.arrays > 1);
            }
            b']' => self.arrays = self.arrays.saturating_sub(1),
            _ => {}
        }
        !was_skipping
    }
}

impl StringState {
    /// Whether to keep the byte, and whether it ends the string.
    fn read(&mut self, byte: u8, kept: &[u8]) -> (bool, bool) {
        let begins_character = self.escape == Escape::None && byte & 0xc0 != 0x80;
        if self.escape == Escape::None && byte == b'"' {
            return (true, true);
        }
        let limit = if kept.len() < TRUNCATED_BYTES_MAX / 2 { STRING_BYTES_MAX } else { LATER_STRING_BYTES_MAX };
        // Only between two characters, so that the result is valid text.
        if !self.is_truncated && begins_character && self.kept >= limit && !ends_in_high_surrogate(kept) {
            self.is_truncated = true;
        }
        self.escape = match self.escape {
            Escape::None if byte == b'\\' => Escape::Letter,
            Escape::Letter if byte == b'u' => Escape::Hex(4),
            Escape::Hex(left @ 2..) => Escape::Hex(left - 1),
            _ => Escape::None,
        };
        self.kept += usize::from(!self.is_truncated);
        (!self.is_truncated, false)
    }
}

/// Whether `kept` ends with a high surrogate (`\ud83d`) that lacks its low surrogate (`\ude00`).
fn ends_in_high_surrogate(kept: &[u8]) -> bool {
    let last = kept.last_chunk::<6>().map(|last| last.to_ascii_lowercase());
    last.is_some_and(|last| last.starts_with(b"\\ud") && matches!(last[3], b'8'..=b'b'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn truncated<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Option<String> {
        let mut buffer = BoundedJson::default();
        for piece in pieces {
            buffer.push(piece);
            assert!(buffer.kept.capacity() <= 2 * TRUNCATED_BYTES_MAX);
        }
        buffer.bytes().map(|text| String::from_utf8(text.to_vec()).expect("text stays text"))
    }

    #[test]
    fn long_event_keeps_what_matters() {
        let text = "é\\n\\ud83d\\ude00\\\"".repeat(10_000);
        let event = format!(
            r#"{{"choices":[{{"delta":{{"content":"{text}"}},"logprobs":{{"content":[{{"a":[1,"]",{{}}]}},2]}},"finish_reason":"stop"}}],"usage":{{"input":7}},"a":[[0],{{"b":[]}}]}}"#
        );
        let kept: Value = serde_json::from_str(&truncated([event.as_bytes()]).expect("kept")).expect("JSON");
        assert_eq!((&kept["usage"]["input"], &kept["choices"][0]["finish_reason"]), (&7.into(), &"stop".into()));
        assert_eq!(kept["choices"][0]["logprobs"]["content"], Value::Array(Vec::new()));
        let content = kept["choices"][0]["delta"]["content"].as_str().expect("a string");
        assert!(content.starts_with("é\n😀\"é") && content.len() < 2 * STRING_BYTES_MAX, "{} bytes", content.len());
    }

    #[test]
    fn no_character_is_truncated_in_two() {
        for before in 0..12 {
            for unit in [r"\ud83d\ude00", "😀", r"\u00e9", r"\n", r#"\\\""#] {
                let json = format!("\"{}{}\"", "x".repeat(before), unit.repeat(5000));
                let kept = truncated([json.as_bytes()]).expect("kept");
                assert!(
                    serde_json::from_str::<String>(&kept).is_ok_and(|text| text.len() < 2 * STRING_BYTES_MAX),
                    "{kept}"
                );
            }
        }
    }

    #[test]
    fn long_text_is_bounded_and_short_text_is_verbatim() {
        for (text, is_kept) in [
            ("x".repeat(VERBATIM_BYTES_MAX), true),
            ("x".repeat(TRUNCATED_BYTES_MAX), true),
            ("x".repeat(TRUNCATED_BYTES_MAX + 1), false),
            (format!("\"{}\"", "x".repeat(1 << 20)), true),
            (format!("[[{}0]]", "0,".repeat(1 << 19)), true),
            (format!("{}[0]", "\n  ".repeat(1 << 19)), true),
            (format!("[{}0]", "0,".repeat(1 << 19)), false),
            (format!("[{}0]", format!("\"{}\",", "x".repeat(4000)).repeat(200)), true),
        ] {
            let kept = truncated(text.as_bytes().chunks(1000));
            assert_eq!(kept.is_some(), is_kept, "{} bytes of {}", text.len(), &text[..3]);
            assert!(text.len() > VERBATIM_BYTES_MAX || kept == Some(text));
        }
    }

    #[test]
    fn truncated_json_is_json_with_the_same_keys_however_it_was_split() {
        fn value(u: &mut arbtest::arbitrary::Unstructured<'_>, depth: u32) -> arbtest::arbitrary::Result<Value> {
            Ok(match u.int_in_range(0..=if depth == 0 { 2 } else { 5 })? {
                0 => Value::from(u.arbitrary::<u32>()?),
                1 => Value::Null,
                2 | 3 => {
                    let unit: String = u.arbitrary()?;
                    Value::from(unit.repeat(u.int_in_range(0..=400)?))
                }
                4 => (0..u.int_in_range(0..=3)?).map(|_| value(u, depth - 1)).collect::<Result<_, _>>()?,
                _ => {
                    let keys = ["usage", "choices", "a", "ключ", "\"\\"].into_iter().take(u.int_in_range(0..=5)?);
                    Value::Object(keys.map(|k| Ok((k.to_owned(), value(u, depth - 1)?))).collect::<Result<_, _>>()?)
                }
            })
        }
        fn assert_same(whole: &Value, kept: &Value, arrays: u32) {
            match (whole, kept) {
                (Value::Object(whole), Value::Object(kept)) => {
                    assert!(whole.keys().eq(kept.keys()));
                    whole.values().zip(kept.values()).for_each(|(whole, kept)| assert_same(whole, kept, arrays));
                }
                (Value::Array(_), Value::Array(kept)) if arrays > 0 => assert!(kept.is_empty()),
                (Value::Array(whole), Value::Array(kept)) => {
                    assert_eq!(whole.len(), kept.len());
                    whole.iter().zip(kept).for_each(|(whole, kept)| assert_same(whole, kept, arrays + 1));
                }
                (Value::String(whole), Value::String(kept)) => assert!(whole.starts_with(kept.as_str())),
                (whole, kept) => assert_eq!(whole, kept),
            }
        }
        fn escaped(json: &str) -> String {
            let escape = |c: char| match c.is_ascii() {
                true => c.to_string(),
                false => c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")).collect(),
            };
            json.chars().map(escape).collect()
        }
        arbtest::arbtest(|u| {
            let whole = value(u, 4)?;
            let json = if u.arbitrary()? { whole.to_string() } else { escaped(&whole.to_string()) };
            let kept = truncated([json.as_bytes()]);
            let mut cuts = vec![0, json.len()];
            for _ in 0..u.int_in_range(0..=10)? {
                cuts.push(u.int_in_range(0..=json.len())?);
            }
            cuts.sort_unstable();
            assert_eq!(truncated(cuts.windows(2).map(|cut| &json.as_bytes()[cut[0]..cut[1]])), kept);
            match kept {
                Some(kept) if json.len() <= VERBATIM_BYTES_MAX => assert_eq!(kept, json),
                Some(kept) => assert_same(&whole, &serde_json::from_str(&kept).expect("JSON"), 0),
                None => assert!(json.len() > TRUNCATED_BYTES_MAX),
            }
            Ok(())
        })
        .budget_ms(700);
    }
}
